"""Agent-Swin: Swin Transformer whose first stages have agent attention over the whole map.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention); the host is Swin, Liu et al. 2021, arXiv:2103.14030.
Official   https://github.com/LeapLabTHU/Agent-Attention (no license stated); its checkpoints load as they are.
Semantics  of the authors' classification code at the image size that the model is built for, and of their segmentation
           code at any other. A blocks: a map whose short side is the block's window, and whose long side is a multiple
           of it, is cut into squares, as in the classification code; any other map is seen whole. B blocks: Swin's
           windows; a map that they do not cover is padded right and bottom with zeros before the projection. Where one
           window covers the map that a B block is built for, odd blocks do not shift. With `downstream_agent_shapes`
           the blocks are those of the segmentation code at every size: A blocks see whole maps, odd B blocks shift.
           Masked pairs have weight 0 (there: logits minus 100).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, gen_relative_position_index
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..attention_ops import AgentAttention, window_attention
from ..attention_ops._graph.sizes import known
from ..attention_ops.agent_layer import check_heads, init_linear
from ..attention_ops.packed import unpack
from ..attention_ops.tiling import crop, cut_regions, join_regions, pad_to_windows
from ._agent import (
    AGENT,
    AgentBlock,
    AgentConfig,
    Pair,
    agent_blocks,
    at,
    build_agent,
    image_pair,
    load_agent,
    on_drive,
)
from ._build import StateDict, cfg
from ._layers import pad_to_multiples, to_channels_last
from ._pruning import AttentionLayout, Prunable
from ._staged import Stage, StagedBackbone


@dataclass(frozen=True)
class AgentSwinConfig(AgentConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    attn_type: str = "AAAB"
    window_size: int | None = (
        None  # tokens a side of A blocks; None: the short side of the first map (56 at 224 pixels)
    )
    mlp_ratio: float = 4.0

    @property
    def is_dense(self) -> bool:
        """Whether blocks are those of the authors' dense code at every size."""
        return self.downstream_agent_shapes is not None

    @property
    def maps(self) -> list[Pair]:
        size, found = [-(-side // 4) for side in image_pair(self.img_size)], []
        for _ in self.dims:
            found.append((size[0], size[1]))
            size = [-(-side // 2) for side in size]
        return found

    def window(self, stage: int, is_agent: bool) -> tuple[int, bool]:
        """Side of the windows of a stage's A or B blocks, and whether odd blocks shift them."""
        whole = min(self.maps[0]) if self.window_size is None else self.window_size
        wanted, short = whole if is_agent else max(7, whole // 8), min(self.maps[stage])
        if self.is_dense and not is_agent:
            return wanted, True
        return (short, False) if short <= wanted else (wanted, True)


@register_notrace_module
class SwinStem(nn.Module):
    """4x4 convolution of stride 4 on the image padded right and bottom to whole patches, then a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        norm = partial(nn.LayerNorm, **dd)
        self.patch_embed = PatchEmbed(None, 4, in_chans, dim, norm_layer=norm, output_fmt="NHWC", **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, ceil(H / 4), ceil(W / 4), C)
        return self.patch_embed(to_channels_last(pad_to_multiples(x, 4)))


@register_notrace_module
class SwinDownsample(PatchMerging):
    """timm's patch merging, padded in a way that files for free sizes can hold."""

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)
        x = pad_to_windows(x, [2, 2])
        x = x.unflatten(2, [-1, 2]).unflatten(1, [-1, 2])  # (B, h, 2, w, 2, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


def in_squares(height: int, width: int, side: int) -> bool:
    """Say whether several squares cover a map whose short side is theirs."""
    if torch.jit.is_scripting():
        return min(height, width) == side and max(height, width) > side and height % side == 0 and width % side == 0
    elif not known(height, width):  # a file for free sizes sees every map whole
        return False
    else:
        return min(height, width) == side and max(height, width) > side and height % side == width % side == 0


@register_notrace_module
class SwinAgentAttention(AgentAttention):
    """Agent attention on maps, seen whole or cut into squares.

    Args:
        side: of the squares, tokens; the biases are made for one.
        shift: tokens by which the squares are shifted, where the map has more than one each way.
        own: the map that the block is made for: it is cut into squares whenever they cover it.
        cuts: False: every map is seen whole.
        keywords: of `AgentAttention`.
    """

    def __init__(self, dim: int, heads: int, *, side: int, shift: int, own: Pair, cuts: bool, **keywords: Any) -> None:
        super().__init__(dim, heads, map_size=(side, side), **keywords)
        self.side, self.shift, self.own, self.cuts = side, shift, own, cuts

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        height, width = x.shape[1], x.shape[2]
        if not self.is_cut(height, width):
            return self.mix(x.flatten(1, 2), (height, width)).unflatten(1, [height, width])
        x = torch.roll(x, [-self.shift, -self.shift], [1, 2]) if self.shift > 0 else x
        squares = cut_regions(x, [self.side, self.side])  # (B, rows, columns, side, side, C)
        grid = [squares.shape[1], squares.shape[2]]
        out = self.mix(squares.flatten(0, 2).flatten(1, 2), (self.side, self.side))
        x = join_regions(out.unflatten(1, [self.side, self.side]).unflatten(0, [-1, grid[0], grid[1]]))
        return torch.roll(x, [self.shift, self.shift], [1, 2]) if self.shift > 0 else x

    def is_cut(self, height: int, width: int) -> bool:
        if not self.cuts:
            return False
        if self.shift > 0 or min(self.own[0], self.own[1]) > self.side:  # windows smaller than the map
            own = height == self.own[0] and width == self.own[1]
            return own and height % self.side == 0 and width % self.side == 0
        return in_squares(height, width, self.side)


@register_notrace_module
class SwinWindowAttention(nn.Module):
    """Swin's attention in (shifted) windows with a table of relative positions, on maps."""

    def __init__(
        self, dim: int, heads: int, window: int, shift: int, proj_drop: float, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_heads("SwinWindowAttention", dim, heads)
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.window, self.shift = window, shift
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads, **dd))
        index = torch.empty(window**2, window**2, dtype=torch.long, device=device)
        self.register_buffer("relative_position_index", index, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        init_linear(self.qkv, self.proj)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Compute the index again, as timm does after construction on the meta device."""
        own = self.relative_position_index
        own.copy_(gen_relative_position_index((self.window, self.window), device=own.device))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        height, width = x.shape[1], x.shape[2]
        x = pad_to_windows(x, [self.window, self.window])
        q, k, v = unpack(self.qkv(x).unflatten(-1, [3, self.heads, -1]), 3)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # type: ignore[index]
        out = window_attention(
            q, k, v, [self.window, self.window], shift=[self.shift, self.shift], bias=bias, scale=self.scale
        )
        return self.proj_drop(crop(self.proj(out.flatten(3)), height, width))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, shift={self.shift}"


class AgentSwin(StagedBackbone):
    """Agent attention, then windows; maps are (B, H, W, C)."""

    output_fmt = "NHWC"

    prunable = Prunable(
        qkv=r".+\.attn\.qkv\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.attn\.dwc\.weight",
        attentions=(
            AttentionLayout(
                r".+\.attn",
                "SwinAgentAttention",
                per_head=(
                    *(("an_bias", 0), ("na_bias", 0), ("ah_bias", 1)),
                    *(("aw_bias", 1), ("ha_bias", 1), ("wa_bias", 1)),
                ),
                per_value=("dwc",),
            ),
            AttentionLayout(r".+\.attn", "SwinWindowAttention", per_head=(("relative_position_bias_table", 1),)),
        ),
    )

    def make_stem(self, config: AgentSwinConfig, in_chans: int, **dd) -> nn.Module:
        return SwinStem(in_chans, config.dims[0], **dd)

    def make_stage(self, config: AgentSwinConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim, heads = config.dims[index], config.heads[index]
        blocks = []
        for i, is_agent in enumerate(agent_blocks(config.attn_type, config.depths)[index]):
            side, shifts = config.window(index, is_agent)
            shift = side // 2 if shifts and i % 2 else 0
            if is_agent:
                cuts = not config.is_dense
                attn: nn.Module = SwinAgentAttention(
                    dim, heads, side=side, shift=shift, own=config.maps[index], cuts=cuts, proj_drop=drop,
                    **config.agents(index), **dd,
                )  # fmt: skip
            else:
                attn = SwinWindowAttention(dim, heads, side, shift, drop, **dd)
            blocks.append(AgentBlock(dim, attn, config.mlp_ratio, 1e-5, drop, drop_paths[i], **dd))
        down = SwinDownsample(config.dims[index - 1], dim, **dd) if index else nn.Identity()
        return Stage(down, blocks)

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.LayerNorm(dim, **dd)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official Agent-Swin checkpoint, and resize it to the model's image size.

    Raises:
        ValueError: the weights are another model's.
    """
    return load_agent(checkpoint, model, _our_key)


def _our_key(key: str) -> str:
    key = re.sub(r"^patch_embed\.", "stem.patch_embed.", key)
    key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
    key = re.sub(r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


SWIN: dict[str, Any] = {**AGENT, "first_conv": "stem.patch_embed.proj", "crop_pct": 0.875}

default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.in1k": cfg(**SWIN, **on_drive("a2ddc1190c224f768a41")),
        "agent_swin_small.in1k": cfg(**SWIN, **on_drive("f607172c9fea4d6e99bb")),
        "agent_swin_small.in1k_288": cfg(**SWIN | at(288), **on_drive("09760394e93b4046a25e")),
        "agent_swin_base.in1k": cfg(**SWIN, **on_drive("4fcd2d0114bb490483c3")),
        "agent_swin_base.in1k_384": cfg(**SWIN | at(384), **on_drive("bb84ee9058954706a557")),
    }
)

TINY = AgentSwinConfig()
DEEP = (2, 2, 18, 2)


def _create(variant: str, config: AgentSwinConfig, pretrained: bool, **kwargs) -> AgentSwin:
    return build_agent(AgentSwin, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-T, 28.9 M parameters, 4.5 GMACs at 224."""
    return _create("agent_swin_tiny", TINY, pretrained, **kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-S, 49.7 M parameters, 8.7 GMACs at 224. The tag in1k_288 builds it for 288 pixels, 14.5 GMACs."""
    return _create("agent_swin_small", replace(TINY, depths=DEEP, attn_type="AABB"), pretrained, **kwargs)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-B, 88.1 M parameters, 15.4 GMACs at 224. The tag in1k_384 builds it for 384 pixels."""
    base = replace(TINY, dims=(128, 256, 512, 1024), depths=DEEP, heads=(4, 8, 16, 32), attn_type="AAMB2")
    return _create("agent_swin_base", base, pretrained, **kwargs)
