"""Agent-DeiT: DeiT with agent attention in all blocks, or in the first few.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention); the host is DeiT, Touvron et al. 2020, arXiv:2012.12877.
Official   https://github.com/LeapLabTHU/Agent-Attention (no license stated); its checkpoints load as they are.
We differ  any image size runs: images are padded right and bottom with zeros to whole patches, position embeddings are
           resized as the authors' loader does (bicubic), biases as in their dense code (bilinear).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from timm.layers import Attention, DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, get_device_dtype
from timm.models import (
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, fx, nn

from ..attention_ops import AgentAttention
from ..attention_ops._graph.sizes import covering
from ..attention_ops.agent_layer import init_linear
from ..attention_ops.resizing import resize_positions
from ._agent import AGENT, Pair, Shapes, at, build_agent, check_squares, image_pair, load_agent, numbers, on_drive
from ._build import StateDict, cfg, last_three
from ._layers import pad_to_multiples
from ._pruning import AttentionLayout, Prunable
from ._staged import take_image, take_maps

register_notrace_module(AgentAttention)
fx.wrap("take_image")  # a graph of the whole model calls it


@dataclass(frozen=True)
class AgentDeitConfig:
    """What makes one variant differ from another."""

    dim: int = 192  # channels
    depth: int = 12  # blocks
    heads: int = 3
    patch_size: int = 16  # pixels
    mlp_ratio: float = 4.0
    agent_num: tuple[int, ...] | str = (49, 49, 49, 49)  # agents in the first and second sixth, middle, last sixth
    agent_layer: int | None = None  # how many first blocks have agent attention; None: all
    downstream_agent_shapes: Shapes | None = None  # agents pooled, (rows, columns), four; None: squares of agent_num
    img_size: int | Pair = 224  # pixels; position tables are made for it

    def __post_init__(self) -> None:
        object.__setattr__(self, "agent_num", numbers("agent_num", self.agent_num, 4))
        check_squares("agent_num", numbers("agent_num", self.agent_num, 4))
        shapes = self.downstream_agent_shapes
        if shapes is not None and (len(shapes) != 4 or any(len(s) != 2 or min(s) < 1 for s in shapes)):
            raise ValueError(f"downstream_agent_shapes must have (rows, columns) four times, got {shapes}")
        if self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"heads must divide dim {self.dim}, got {self.heads}")
        if self.agent_layer is not None and not 0 <= self.agent_layer <= self.depth:
            raise ValueError(f"agent_layer must be 0 to depth {self.depth}, got {self.agent_layer}")
        if min(self.map_size) < 1:
            raise ValueError(f"img_size must have a patch of {self.patch_size} pixels, got {self.img_size!r}")

    @property
    def map_size(self) -> Pair:
        height, width = image_pair(self.img_size)
        return height // self.patch_size, width // self.patch_size

    def group(self, block: int) -> int:
        """Which of the four agent numbers a block has: blocks 0-1, 2-3, 4-9 and 10-11 of 12."""
        sixth = 6 * block // self.depth
        return sixth if sixth < 2 else 2 if sixth < 5 else 3

    def is_agent(self, block: int) -> bool:
        return block < (self.depth if self.agent_layer is None else self.agent_layer)


@register_notrace_function
def count_patches(image: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches that cover the images."""
    if torch.jit.is_scripting():
        return (image.shape[2] + patch - 1) // patch, (image.shape[3] + patch - 1) // patch
    else:
        return covering(image.shape[2], patch), covering(image.shape[3], patch)


fx.wrap("count_patches")


@register_notrace_module
class DeitStem(nn.Module):
    """Patches, a class token before them, and learned positions, resized (bicubic) to the map."""

    def __init__(self, config: AgentDeitConfig, in_chans: int, **dd) -> None:
        super().__init__()
        rows, cols = config.map_size
        self.patch_size = config.patch_size
        self.map_size = config.map_size
        self.patch_embed = PatchEmbed(None, config.patch_size, in_chans, config.dim, output_fmt="NHWC", **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * cols, config.dim, **dd))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 1 + patches, D)
        x = self.patch_embed(pad_to_multiples(x, self.patch_size))
        positions = resize_positions(self.pos_embed[:, 1:], self.map_size, x.shape[1], x.shape[2], cubic=True)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, x.flatten(1, 2) + positions], 1)


class DeitBlock(nn.Module):
    """Attention and MLP on tokens, each behind a LayerNorm and with a shortcut."""

    reads_size: Final[bool]

    def __init__(self, config: AgentDeitConfig, index: int, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.reads_size = config.is_agent(index)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        if self.reads_size:
            group, shapes = config.group(index), config.downstream_agent_shapes
            self.attn: nn.Module = AgentAttention(
                dim, heads, map_size=config.map_size, prefix_tokens=1, agents=int(config.agent_num[group]),
                agent_shape=None if shapes is None else shapes[group], proj_drop=drop, **dd,
            )  # fmt: skip
        else:
            self.attn = Attention(dim, heads, qkv_bias=True, proj_drop=drop, **dd)
            init_linear(self.attn.qkv, self.attn.proj)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), drop=drop, **dd)
        init_linear(self.mlp.fc1, self.mlp.fc2)  # type: ignore[arg-type]
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, 1 + H W, C), (H, W)
        y = self.norm1(x)
        if self.reads_size:
            y = self.attn(y, size)
        else:
            y = self.attn(y)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TokenHead(nn.Module):
    """The class token, or the mean of the patches, and a classifier: (B, 1 + N, C) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **dd) -> None:
        super().__init__()
        self.in_features = dim
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool, **dd)

    def reset(self, num_classes: int, global_pool: str | None, **dd) -> None:
        """Make a new classifier; keep the pooling if `global_pool` is None."""
        if global_pool is not None:
            if global_pool not in ("", "token", "avg"):
                raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
            self.global_pool = global_pool
        self.fc = nn.Linear(self.in_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            init_linear(self.fc)
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(1)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class AgentDeit(nn.Module):
    """Isotropic blocks of agent attention on patches and a class token.

    Args:
        config: sizes and kinds of layers.
        num_classes, in_chans: as in timm.
        global_pool: "token" (the class token), "avg" (of the patches) or "" (all tokens are classified).
        drop_rate, proj_drop_rate: dropout before the classifier, and inside blocks.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
    """

    prunable = Prunable(
        qkv=r".+\.attn\.qkv\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.attn\.dwc\.weight",
        attentions=(
            AttentionLayout(
                r".+\.attn",
                "AgentAttention",
                per_head=(
                    *(("an_bias", 0), ("na_bias", 0), ("ah_bias", 1), ("aw_bias", 1)),
                    *(("ha_bias", 1), ("wa_bias", 1), ("ac_bias", 1), ("ca_bias", 1)),
                ),
                per_value=("dwc",),
            ),
            AttentionLayout(
                r".+\.attn", "Attention", heads="num_heads", value_widths=("attn_dim",), cuts_channels=False
            ),
        ),
    )

    def __init__(
        self,
        config: AgentDeitConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = config.dim
        self.num_prefix_tokens = 1
        self.patch_size = config.patch_size
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": config.dim, "reduction": config.patch_size, "module": f"blocks.{i}"}
            for i in range(config.depth)
        ]
        self.stem = DeitStem(config, in_chans, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, config.depth)
        self.blocks = nn.ModuleList(DeitBlock(config, i, proj_drop_rate, rate, **dd) for i, rate in enumerate(rates))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, **dd)
        self.head = TokenHead(config.dim, num_classes, global_pool, drop_rate, **dd)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens after the norm, (B, 1 + patches, C), the class token first."""
        x = take_image(x, self.patch_size)
        size = count_patches(x, self.patch_size)
        x = self.stem(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, size)
            else:
                x = block(x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # timm's contract

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return all tokens after the norm, and what the chosen blocks make of the patches, as (B, C, H, W).

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks if an int, those blocks if a list, all if None.
            return_prefix_tokens: return pairs of a map and its class token, (B, 1, C).
            norm: apply the final norm to every map too.
            stop_early: run no block past the last one asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: leave the tokens after the norm out of the answer.

        Raises:
            ValueError: the images are too small, the model has no such block, or output_fmt is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, max_index = take_maps(len(self.blocks), indices)
        x = take_image(x, self.patch_size)
        size = count_patches(x, self.patch_size)
        x, found = self.stem(x), []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
            if i in take:
                tokens = self.norm(x) if norm else x
                patches = tokens[:, 1:]
                patches = patches.transpose(1, 2).unflatten(2, size) if output_fmt == "NCHW" else patches
                found.append((patches, tokens[:, :1]) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen blocks do not need; return their indices.

        Raises:
            ValueError: the model has no such block.
        """
        take, max_index = take_maps(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Say which parameters belong to one layer, for layer-wise learning rates; blocks are the layers either way."""
        blocks = r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"stem.cls_token", "stem.pos_embed"}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official Agent-DeiT checkpoint, and resize it to the model's image size.

    Raises:
        ValueError: the weights are another model's.
    """
    return load_agent(checkpoint, model, _our_key, {"stem.pos_embed": (model.stem.map_size, 1)})  # type: ignore[dict-item,union-attr]


def _our_key(key: str) -> str:
    key = re.sub(r"^(patch_embed\.|cls_token$|pos_embed$)", r"stem.\1", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


DEIT: dict[str, Any] = {**AGENT, "first_conv": "stem.patch_embed.proj", "pool_size": None}
AT_448 = at(448) | {"crop_pct": 0.875, "pool_size": None}

default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": cfg(**DEIT, **on_drive("57e0904221824ee7b7af")),
        "agent_deit_small.in1k": cfg(**DEIT, **on_drive("fdd43304372541db8ea7")),
        "agent_deit_small.in1k_448": cfg(**DEIT | AT_448, **on_drive("a228f86241c445f1969b")),
        "agent_deit_base.in1k": cfg(**DEIT, **on_drive("5115f15fdd7e4ab58fbc")),
    }
)

TINY = AgentDeitConfig()


def _create(variant: str, config: AgentDeitConfig, pretrained: bool, **kwargs) -> AgentDeit:
    kwargs = {"out_indices": last_three(kwargs.get("depth", config.depth)), **kwargs}
    return build_agent(AgentDeit, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs) -> AgentDeit:
    """Agent-DeiT-T, 6.0 M parameters, 1.2 GMACs at 224."""
    return _create("agent_deit_tiny", TINY, pretrained, **kwargs)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs) -> AgentDeit:
    """Agent-DeiT-S, 22.6 M parameters, 4.4 GMACs at 224. The tag in1k_448 builds it for 448 pixels, 17.6 GMACs."""
    return _create("agent_deit_small", replace(TINY, dim=384, heads=6), pretrained, **kwargs)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs) -> AgentDeit:
    """Agent-DeiT-B, 87.2 M parameters, 17.5 GMACs at 224: 81 agents in the first 4 blocks, ordinary attention after."""
    base = replace(TINY, dim=768, heads=12, agent_num=(81, 81, 81, 81), agent_layer=4)
    return _create("agent_deit_base", base, pretrained, **kwargs)
