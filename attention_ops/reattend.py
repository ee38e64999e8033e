"""Put another token mixer in the place of self-attention in timm's ViTs, DeiTs and Swins.

Blocks are found by their shape: an attribute `attn` with the linear layers `qkv` and `proj` and a number `num_heads`.
    ViT    attn(x) on tokens, class and register tokens first; the map is the model's grid of patches.
    Swin   attn(x) on windows; block has `window_size`, `shift_size`, `input_resolution`. The mixer sees the whole map
           of its stage as one window: mixers of linear cost need no windows, and none of them takes the mask that
           shifted windows need.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .mixers import create_mixer


class MapMixer(nn.Module):
    """A token mixer that is called as timm's blocks call their attention, for maps of one size.

    Args:
        mixer: called as mixer(x, size).
        map_size: (H, W) of the map in the tokens.
        drop: dropout after the mixer.
    """

    def __init__(self, mixer: nn.Module, map_size: tuple[int, int], drop: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.map_size = map_size
        self.drop = drop

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, mask: Tensor | None = None
    ) -> Tensor:  # (B, prefix + H W, C)
        if attn_mask is not None or is_causal or mask is not None:
            raise ValueError("a token mixer takes no mask")
        return self.drop(self.mixer(x, self.map_size))

    def extra_repr(self) -> str:
        return f"map_size={self.map_size}"


def reattend(model: nn.Module, mixer: str, *, blocks: Sequence[int] | None = None, **keywords: Any) -> nn.Module:
    """Replace self-attention in the blocks of `model` by a token mixer, in place, for fine-tuning.

    The weights of `qkv` and `proj` move into the mixer where it has layers of these names and shapes; its other
    weights start as the mixer makes them. The model keeps its image size: set that before (`img_size=`).

    Args:
        model: one of timm's VisionTransformers (ViT, DeiT, ...) or SwinTransformers.
        mixer: a registered name, such as "agent" (`attention_ops.mixers`).
        blocks: which blocks, counted over the whole model; all when None.
        keywords: of the mixer, such as agents=49.

    Returns:
        The model.

    Raises:
        ValueError: an unknown mixer or keyword, a model without such blocks, a model for images of any size, a block
            that does not exist, or attention that no mixer equals (normalized q and k, gates).
    """
    found = [m for m in model.modules() if _is_attention(getattr(m, "attn", None))]
    if not found:
        raise ValueError(f"reattend: {type(model).__name__} has no blocks with attn.qkv, attn.proj and attn.num_heads")
    if getattr(model, "dynamic_img_size", False) or getattr(found[0], "dynamic_mask", False):
        raise ValueError("reattend: wanted a model of one image size, got one that takes images of any size")
    if wrong := [i for i in blocks or () if not -len(found) <= i < len(found)]:
        raise ValueError(f"reattend: blocks must be {-len(found)} to {len(found) - 1}, got {wrong[0]}")
    chosen = found if blocks is None else [found[i] for i in blocks]
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    made = [_mixer_for(model, block, mixer, prefix, keywords) for block in chosen]  # before any block changes
    block: Any
    for block, new in zip(chosen, made, strict=True):
        block.attn = new
        if hasattr(block, "window_size"):
            block.window_size, block.shift_size = new.map_size, (0, 0)
            block.window_area = new.map_size[0] * new.map_size[1]
            block.attn_mask = None
    return model


def _is_attention(attn: Any) -> bool:
    layers = isinstance(getattr(attn, "qkv", None), nn.Linear) and isinstance(getattr(attn, "proj", None), nn.Linear)
    return layers and isinstance(getattr(attn, "num_heads", None), int)


def _mixer_for(model: nn.Module, block: nn.Module, name: str, prefix: int, keywords: dict[str, Any]) -> MapMixer:
    attn: Any = block.attn
    for part in ("q_norm", "k_norm", "norm", "gate"):
        if not isinstance(getattr(attn, part, None), nn.Identity | None):
            raise ValueError(f"reattend: {type(attn).__name__} has {part}, which no token mixer has")
    size = getattr(block, "input_resolution", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if size is None:
        raise ValueError(f"reattend: {type(model).__name__} does not say the size of its maps")
    size = (int(size[0]), int(size[1]))
    weight, bias = attn.qkv.weight, attn.qkv.bias is not None
    given = {"map_size": size, "prefix_tokens": prefix, "qkv_bias": bias, **keywords}
    mixer = create_mixer(name, attn.qkv.in_features, attn.num_heads, **given)
    mixer = mixer.to(device=weight.device, dtype=weight.dtype).train(attn.training)
    for layer in ("qkv", "proj"):
        _move(getattr(attn, layer), getattr(mixer, layer, None))
    drop = attn.proj_drop if isinstance(getattr(attn, "proj_drop", None), nn.Module) else nn.Identity()
    return MapMixer(mixer, size, drop).train(attn.training)


@torch.no_grad()
def _move(old: nn.Linear, new: Any) -> None:
    """Copy the weights of a layer into another one of its shape."""
    if not isinstance(new, nn.Linear) or new.weight.shape != old.weight.shape:
        return
    new.weight.copy_(old.weight)
    new.weight.requires_grad_(old.weight.requires_grad)
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(old.bias)
        new.bias.requires_grad_(old.bias.requires_grad)
