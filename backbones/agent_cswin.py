"""Agent-CSwin: CSWin Transformer whose first stages have agent attention.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention); the host is CSWin, Dong et al. 2021, arXiv:2107.00652.
Official   https://github.com/LeapLabTHU/Agent-Attention (no license stated); its checkpoints load as they are.
Semantics  of the authors' classification code at the image size that the model is built for. The authors have no code
           for other sizes: biases are resized as in their dense Agent-PVT and Agent-Swin, one branch sees the whole
           map, and stripes cover a map that is padded right and bottom with zeros before the projection, as in Swin.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model, register_notrace_function, register_notrace_module
from torch import Tensor, fx, nn

from ..attention_ops import window_attention
from ..attention_ops.agent_layer import AgentBiases, init_linear
from ..attention_ops.tiling import crop, pad_to_windows
from ._agent import AGENT, AgentConfig, Pair, agent_blocks, at, build_agent, image_pair, load_agent, numbers, on_drive
from ._build import StateDict, cfg
from ._layers import to_channels_last, to_nchw, to_nhwc
from ._pruning import Prunable
from ._staged import Stage, StagedBackbone


@dataclass(frozen=True)
class AgentCSwinConfig(AgentConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 4, 18, 1)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    attn_type: str = "AABB"
    la_split_size: tuple[int, ...] | str | None = (
        None  # stripes of A blocks, tokens; None, or the map's side: no stripes
    )
    split_size: tuple[int, ...] | str | None = None  # of B blocks; None: 1, 2, then the side of the last map
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("la_split_size", "split_size"):
            if (given := getattr(self, name)) is not None:
                splits = numbers(name, given, len(self.dims))
                object.__setattr__(self, name, splits)
                if min(splits) < 1:
                    raise ValueError(f"{name} must be at least 1, got {splits}")
        if odd := [h for i, h in enumerate(self.heads) if h % 2 and self.has_stripes(i)]:
            raise ValueError(f"heads must be even where a block has two branches, got {odd[0]}")

    @property
    def maps(self) -> list[Pair]:
        height, width = ((side - 3) // 4 + 1 for side in image_pair(self.img_size))
        found = []
        for _ in self.dims:
            found.append((height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
        return found

    def stripe(self, stage: int, is_agent: bool) -> int:
        """Width of the stripes of a stage's A or B blocks; 0: one branch sees the whole map."""
        given, own, last = self.la_split_size if is_agent else self.split_size, self.maps[stage], self.maps[-1]
        if given is not None:
            width = int(given[stage])
        else:
            width = 0 if is_agent else (1, 2, min(last))[min(stage, 2)]
        whole = own == (width, width) or (stage == len(self.dims) - 1 and not is_agent)
        return 0 if whole else width

    def has_stripes(self, stage: int) -> bool:
        kinds = set(agent_blocks(self.attn_type, self.depths)[stage])
        return any(self.stripe(stage, is_agent) for is_agent in kinds)


@register_notrace_module
class ConvEmbed(nn.Module):
    """Overlapping convolution, then a LayerNorm: the stem on images, or down-sampling on (B, H, W, C) maps."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int, is_stem: bool, **dd) -> None:
        super().__init__()
        self.is_stem = is_stem
        self.conv = nn.Conv2d(in_chans, dim, kernel, stride, padding, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(x) if self.is_stem else to_nchw(x)
        return self.norm(to_nhwc(self.conv(x)))


def cut_stripes(x: Tensor, stripe: int, upright: bool) -> Tensor:
    """(B, H, W, C) -> (B * stripes, rows, columns, C): upright stripes have all rows; 0 tokens wide: the map itself."""
    if stripe == 0:
        return x
    if upright:
        return x.unflatten(2, [-1, stripe]).transpose(1, 2).flatten(0, 1)
    return x.unflatten(1, [-1, stripe]).flatten(0, 1)


def join_stripes(x: Tensor, stripe: int, upright: bool, height: int, width: int) -> Tensor:
    """The inverse of `cut_stripes`, for a map of this size."""
    if stripe == 0:
        return x
    if upright:
        return x.unflatten(0, [-1, width // stripe]).transpose(1, 2).flatten(2, 3)
    return x.unflatten(0, [-1, height // stripe]).flatten(1, 2)


@register_notrace_module
class StripeAttention(nn.Module):
    """CSWin's attention in stripes, plus a depthwise 3x3 convolution of the values inside each (LePE).

    Args:
        dim: channels of this branch.
        heads: of this branch.
        stripe: width, tokens; 0: the whole map.
        upright: stripes have all rows, else all columns.
    """

    def __init__(self, dim: int, heads: int, stripe: int, upright: bool, **dd) -> None:
        super().__init__()
        self.heads = heads
        self.stripe, self.upright = stripe, upright
        self.scale = (dim // heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, H, W, C of the branch)
        height, width = v.shape[1], v.shape[2]
        window = [height, width]
        if self.stripe > 0:
            window = [height, self.stripe] if self.upright else [self.stripe, width]
        out = window_attention(
            q.unflatten(-1, [self.heads, -1]),
            k.unflatten(-1, [self.heads, -1]),
            v.unflatten(-1, [self.heads, -1]),
            window,
            scale=self.scale,
        )
        local = to_nhwc(self.get_v(to_nchw(cut_stripes(v, self.stripe, self.upright))))
        return out.flatten(3) + join_stripes(local, self.stripe, self.upright, height, width)


@register_notrace_module
class StripeAgentAttention(AgentBiases):
    """Agent attention in stripes or on the whole map, plus the convolution of the values of `StripeAttention`.

    Args:
        dim, heads, stripe, upright: as in `StripeAttention`.
        map_size: of the whole map.
        agents, agent_shape: as in `AgentBiases`; agents are pooled in each stripe.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        stripe: int,
        upright: bool,
        *,
        map_size: Pair,
        agents: int,
        agent_shape: Pair | None,
        **dd,
    ) -> None:
        own = map_size if stripe == 0 else (map_size[0], stripe) if upright else (stripe, map_size[1])
        super().__init__(heads, agents, own, None, agent_shape, **dd)
        self.stripe, self.upright = stripe, upright
        self.scale = (dim // heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, H, W, C of the branch)
        height, width = v.shape[1], v.shape[2]
        q, k, v = (
            cut_stripes(q, self.stripe, self.upright),
            cut_stripes(k, self.stripe, self.upright),
            cut_stripes(v, self.stripe, self.upright),
        )
        size = (v.shape[1], v.shape[2])
        out = self.attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), size, size, self.scale)
        out = out.unflatten(1, [size[0], size[1]]) + to_nhwc(self.get_v(to_nchw(v)))
        return join_stripes(out, self.stripe, self.upright, height, width)


@register_notrace_function
def cover_map(x: Tensor, stripe: int) -> Tensor:
    """Pad (B, H, W, C) right and bottom with zeros to whole stripes."""
    return pad_to_windows(x, [stripe, stripe])


@register_notrace_function
def crop_map(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left part of (B, H, W, C)."""
    return crop(x, height, width)


fx.wrap("cover_map")
fx.wrap("crop_map")


class CSwinBlock(nn.Module):
    """Attention in one branch on the whole map, or in two with half the channels each; then an MLP."""

    def __init__(
        self, dim: int, attns: list[nn.Module], stripe: int, mlp_ratio: float, drop: float, drop_path: float, **dd
    ) -> None:
        super().__init__()
        self.stripe = stripe
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.attns = nn.ModuleList(attns)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        init_linear(self.qkv, self.proj)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = x + self.drop_path(self.proj_drop(self.proj(self.attend(self.norm1(x)))))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = cover_map(x, self.stripe) if self.stripe > 0 else x
        q, k, v = self.qkv(x).unflatten(-1, [3, len(self.attns), -1]).unbind(3)  # (B, H, W, branches, C of a branch)
        outs = []
        for i, attn in enumerate(self.attns):
            outs.append(attn(q[:, :, :, i], k[:, :, :, i], v[:, :, :, i]))
        out = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
        return crop_map(out, height, width) if self.stripe > 0 else out


class AgentCSwin(StagedBackbone):
    """Agent attention, then stripes; maps are (B, H, W, C)."""

    output_fmt = "NHWC"

    prunable = Prunable(  # no heads: those of two branches share a projection
        qkv=r".+\.qkv\.weight",
        prj=r".+\.blocks\.\d+\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.get_v\.weight",
    )

    def make_stem(self, config: AgentCSwinConfig, in_chans: int, **dd) -> nn.Module:
        return ConvEmbed(in_chans, config.dims[0], 7, 4, 2, True, **dd)

    def make_stage(self, config: AgentCSwinConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim, heads, blocks = config.dims[index], config.heads[index], []
        for is_agent, rate in zip(agent_blocks(config.attn_type, config.depths)[index], drop_paths, strict=True):
            stripe = config.stripe(index, is_agent)
            branches = 2 if stripe else 1
            attns: list[nn.Module] = []
            for branch in range(branches):
                place = (dim // branches, heads // branches, stripe, branch == 0)
                if is_agent:
                    given = {"map_size": config.maps[index], **config.agents(index)}
                    attns.append(StripeAgentAttention(*place, **given, **dd))  # type: ignore[misc]
                else:
                    attns.append(StripeAttention(*place, **dd))
            blocks.append(CSwinBlock(dim, attns, stripe, config.mlp_ratio, drop, rate, **dd))
        down = ConvEmbed(config.dims[index - 1], dim, 3, 2, 1, False, **dd) if index else nn.Identity()
        return Stage(down, blocks)

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.LayerNorm(dim, **dd)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official Agent-CSwin checkpoint, and resize it to the model's image size.

    Raises:
        ValueError: the weights are another model's.
    """
    return load_agent(checkpoint, model, _our_key)


def _our_key(key: str) -> str:
    key = re.sub(r"^stage1_conv_embed\.0\.", "stem.conv.", key)
    key = re.sub(r"^stage1_conv_embed\.2\.", "stem.norm.", key)
    key = re.sub(r"^merge(\d)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^stage(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


CSWIN: dict[str, Any] = {**AGENT, "first_conv": "stem.conv", "crop_pct": 0.875}

default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny.in1k": cfg(**CSWIN, **on_drive("8c562a74441e46d5902b")),
        "agent_cswin_small.in1k": cfg(**CSWIN, **on_drive("30eb8af675bc4b7a8747")),
        "agent_cswin_base.in1k": cfg(**CSWIN, **on_drive("c8035b0839b2410c8c9f")),
        "agent_cswin_base.in1k_384": cfg(**CSWIN | at(384), **on_drive("1239be0df44b47719432")),
    }
)

TINY = AgentCSwinConfig()
DEEP = (3, 6, 29, 2)


def _create(variant: str, config: AgentCSwinConfig, pretrained: bool, **kwargs) -> AgentCSwin:
    return build_agent(AgentCSwin, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs) -> AgentCSwin:
    """Agent-CSwin-T, 20.5 M parameters, 4.3 GMACs at 224."""
    return _create("agent_cswin_tiny", TINY, pretrained, **kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs) -> AgentCSwin:
    """Agent-CSwin-S, 32.8 M parameters, 6.7 GMACs at 224."""
    return _create("agent_cswin_small", replace(TINY, depths=DEEP), pretrained, **kwargs)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs) -> AgentCSwin:
    """Agent-CSwin-B, 73 M parameters, 14.9 GMACs at 224. The tag in1k_384 builds it for 384 pixels."""
    base = replace(TINY, dims=(96, 192, 384, 768), depths=DEEP, heads=(4, 8, 16, 32))
    return _create("agent_cswin_base", base, pretrained, **kwargs)
