"""NiNformer: an MLP-Mixer inside every block, whose output is a gate.

Paper      Abdullah and Aydin 2024, arXiv:2403.02411 (NiNformer: A Network in Network Transformer).
Official   https://github.com/Abdullah-88/NiNformer (BSD-3); its state dicts load as they are. None is published.
Block      n = norm(x); x = x + proj(n) * mixer(n); x = x + mlp(norm(x)), with one norm for both places.
One size   the mixer's product over tokens fixes their number. Images with another number of patches are refused.
We differ  dropout, 0.5 in every MLP there, is 0 by default (`proj_drop_rate`); stochastic depth is an option. Every
           block counts as a stage, so that `features_only` can take any.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops._checks import pair
from ._build import StateDict, build, cfg, check_fits
from ._layers import to_nhwc
from ._pruning import Prunable
from ._staged import Stage, StageConfig, StagedBackbone


@dataclass(frozen=True)
class NinformerConfig(StageConfig):
    """What makes one variant differ from another. `dims` has one entry per block, all equal."""

    dims: tuple[int, ...] = (256,) * 4  # channels
    depths: tuple[int, ...] = (1,) * 4
    hidden_dim: int = 512  # of every MLP, over tokens and over channels
    patch_size: int = 4  # pixels a side

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.dims)) != 1:
            raise ValueError(f"dims must be equal, one entry per block, got {self.dims}")

    @property
    def reductions(self) -> list[int]:
        """Image pixels per token, per block."""
        return [self.patch_size] * len(self.dims)


@dataclass(frozen=True)
class _SizedConfig(NinformerConfig):
    tokens: int = 0  # of an image


@register_notrace_module
class FixedPatchStem(nn.Module):
    """One convolution per patch; refuses images with another number of patches."""

    def __init__(self, in_chans: int, config: _SizedConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.tokens = config.tokens
        self.proj = nn.Conv2d(
            in_chans, config.dims[0], config.patch_size, config.patch_size, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, H / patch, W / patch, D)
        height, width, side = x.shape[2], x.shape[3], self.patch_size
        if height % side != 0 or width % side != 0 or (height // side) * (width // side) != self.tokens:
            raise ValueError(
                f"ninformer: this model takes images of {self.tokens} patches of {side}x{side} px, got "
                f"{height}x{width} px; make a model for another size with img_size="
            )
        return to_nhwc(self.proj(x))


class TokenMixer(nn.Module):
    """A block of MLP-Mixer: an MLP over tokens, then one over channels, each with a norm and a shortcut."""

    def __init__(self, dim: int, config: _SizedConfig, drop: float, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.tokens = Mlp(config.tokens, config.hidden_dim, drop=drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.channels = Mlp(dim, config.hidden_dim, drop=drop, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class NinformerBlock(nn.Module):
    def __init__(self, dim: int, config: _SizedConfig, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = TokenMixer(dim, config, drop, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.mlp = Mlp(dim, config.hidden_dim, drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        n = self.norm(x)
        x = x + self.drop_path(self.proj(n) * self.mixer(n))
        x = x + self.drop_path(self.mlp(self.norm(x)))
        return x.unflatten(1, size)


class Ninformer(StagedBackbone):
    """NiNformer; maps are (B, H, W, C) inside.

    Args:
        config: sizes of the layers.
        img_size: pixels, an int or (height, width), multiples of the patch. Images of other sizes run if they have as
            many patches.
        kwargs: as in `StagedBackbone`; proj_drop_rate is the dropout in every MLP.
    """

    output_fmt = "NHWC"

    prunable = Prunable(mlp=r".+\.(mlp|mixer\.(tokens|channels))\.fc[12]\.weight")

    def __init__(self, config: NinformerConfig, img_size: int | tuple[int, int] = 32, **kwargs) -> None:
        height, width = pair("ninformer", "img_size", img_size)
        side = config.patch_size
        if side < 1 or min(height, width) < side or height % side or width % side:
            raise ValueError(f"ninformer: img_size must be a multiple of patch_size {side}, got {(height, width)}")
        own = {field.name: getattr(config, field.name) for field in fields(config)}
        super().__init__(_SizedConfig(**own, tokens=(height // side) * (width // side)), **kwargs)
        self.img_size = (height, width)

    def make_stem(self, config: _SizedConfig, in_chans: int, **dd) -> nn.Module:
        return FixedPatchStem(in_chans, config, **dd)

    def make_stage(self, config: _SizedConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        blocks = [NinformerBlock(config.dims[index], config, drop, rate, **dd) for rate in drop_paths]
        return Stage(nn.Identity(), blocks)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official state dict; ours pass through.

    Raises:
        ValueError: the weights are another model's, or of another number of patches.
    """
    return check_fits({_our_key(key): value for key, value in unwrap(checkpoint).items()}, model)


PARTS = {"token_mix.0": "norm1", "token_mix.2": "tokens", "channel_mix.0": "norm2", "channel_mix.1": "channels"}


def _our_key(key: str) -> str:
    key = re.sub(r"^patcher\.", "stem.proj.", key)
    key = re.sub(r"^classifier\.", "head.fc.", key)
    key = re.sub(r"^model\.(\d+)\.", r"stages.\1.blocks.0.", key)
    key = re.sub(r"\.mgu\.Mixer\.(\w+\.\d)\.", lambda part: f".mixer.{PARTS.get(part[1], part[1])}.", key)
    key = re.sub(r"\.mgu\.proj\.", ".proj.", key)
    key = re.sub(r"\.ffn\.", ".mlp.", key)
    return re.sub(r"\.net\.([03])\.", lambda part: f".fc{1 if part[1] == '0' else 2}.", key)


NINFORMER: dict[str, Any] = {
    "first_conv": "stem.proj",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "fixed_input_size": True,
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "paper_ids": "arXiv:2403.02411",
    "paper_name": "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
    "origin_url": "https://github.com/Abdullah-88/NiNformer",
}
default_cfgs = generate_default_cfgs({"ninformer.untrained": cfg(**NINFORMER)})


@register_model
def ninformer(pretrained: bool = False, **kwargs) -> Ninformer:
    """NiNformer for CIFAR-10: four blocks on 8x8 patches of 4x4 px; 2.7 M parameters, 0.2 GMACs."""
    return build(Ninformer, NinformerConfig(), "ninformer", pretrained, checkpoint_filter_fn, **kwargs)
