"""Agent-PVT: the Pyramid Vision Transformer with agent attention.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention); the host is PVT, Wang et al. 2021, arXiv:2102.12122.
Official   https://github.com/LeapLabTHU/Agent-Attention (no license stated); its checkpoints load as they are.
Semantics  of the authors' classification code at the image size that the model is built for, and of their segmentation
           code at any other: position embeddings and biases are resized, convolutions floor odd sizes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from ..attention_ops import ReducedAgentAttention
from ..attention_ops.agent_layer import check_heads, init_linear
from ..attention_ops.resizing import resize_positions
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
    numbers,
    on_drive,
)
from ._build import StateDict, cfg
from ._layers import to_channels_last, to_nchw
from ._pruning import AttentionLayout, Projection, Prunable
from ._staged import Stage, StagedBackbone, check_stages


@dataclass(frozen=True)
class AgentPvtConfig(AgentConfig):
    """What makes one variant differ from another."""

    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)  # per stage
    agent_sr_ratios: tuple[int, ...] | str = (1, 1, 1, 1)  # reduction of keys and values in A blocks, per stage
    sr_ratios: tuple[int, ...] | str = (8, 4, 2, 1)  # in B blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self, ("mlp_ratios",), len(self.dims))
        for name in ("agent_sr_ratios", "sr_ratios"):
            ratios = numbers(name, getattr(self, name), len(self.dims))
            object.__setattr__(self, name, ratios)
            if min(ratios) < 1:
                raise ValueError(f"{name} must be at least 1, got {ratios}")

    @property
    def maps(self) -> list[Pair]:
        height, width = image_pair(self.img_size)
        return [(height // step, width // step) for step in self.reductions]


@register_notrace_module
class PvtEmbed(nn.Module):
    """Convolution with the stride of its kernel, LayerNorm, learned positions, resized (bilinear) to the map."""

    def __init__(self, in_chans: int, dim: int, patch: int, map_size: Pair, **dd) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, **dd)
        self.patch_embed = PatchEmbed(None, patch, in_chans, dim, norm_layer=norm, output_fmt="NHWC", **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, map_size[0] * map_size[1], dim, **dd))
        self.map_size = map_size
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, H / patch, W / patch, D)
        x = self.patch_embed(x)
        height, width = x.shape[1], x.shape[2]
        positions = resize_positions(self.pos_embed, self.map_size, height, width)
        return (x.flatten(1, 2) + positions).unflatten(1, [height, width])

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(to_channels_last(x))


@register_notrace_module
class PvtDownsample(PvtEmbed):
    """The same between stages, on (B, H, W, C) maps."""

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(to_nchw(x))


@register_notrace_module
class PvtAttention(nn.Module):
    """PVT's own attention: all queries see a map that a convolution made smaller."""

    def __init__(self, dim: int, num_heads: int, *, sr_ratio: int, proj_drop: float, **dd) -> None:
        super().__init__()
        check_heads("PvtAttention", dim, num_heads)
        self.heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, **dd) if sr_ratio > 1 else None
        self.proj_drop = nn.Dropout(proj_drop)
        init_linear(self.q, self.kv, self.proj)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        height, width = x.shape[1], x.shape[2]
        keys = x.flatten(1, 2)
        q = self.q(keys).unflatten(-1, [self.heads, -1]).transpose(1, 2)
        if self.sr is not None and self.norm is not None:
            keys = self.norm(self.sr(to_nchw(x)).flatten(2).transpose(1, 2))
        k, v = self.kv(keys).unflatten(-1, [2, self.heads, -1]).transpose(1, 3).unbind(2)  # (B, heads, N, d)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out)).unflatten(1, [height, width])


class AgentPvt(StagedBackbone):
    """Pyramid of agent attention, without a norm behind the last stage; maps are (B, H, W, C)."""

    output_fmt = "NHWC"

    prunable = Prunable(
        qkv=r".+\.attn\.(q|kv)\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.attn\.dwc\.weight",
        attentions=(
            AttentionLayout(
                r".+\.attn",
                "ReducedAgentAttention",
                projections=(Projection("q", ("q",)), Projection("kv", ("k", "v"))),
                per_head=(
                    *(("an_bias", 0), ("na_bias", 0), ("ah_bias", 1)),
                    *(("aw_bias", 1), ("ha_bias", 1), ("wa_bias", 1)),
                ),
                per_value=("dwc",),
                cuts_channels=False,  # q alone has channels of its own: agents are means of q
            ),
            AttentionLayout(
                r".+\.attn",
                "PvtAttention",
                projections=(Projection("q", ("q",)), Projection("kv", ("k", "v"))),
                cuts_channels=False,
            ),
        ),
    )

    def make_stem(self, config: AgentPvtConfig, in_chans: int, **dd) -> nn.Module:
        return PvtEmbed(in_chans, config.dims[0], 4, config.maps[0], **dd)

    def make_stage(self, config: AgentPvtConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim, size, heads = config.dims[index], config.maps[index], config.heads[index]
        blocks = []
        for is_agent, rate in zip(agent_blocks(config.attn_type, config.depths)[index], drop_paths, strict=True):
            if is_agent:
                sr_ratio, agents = int(config.agent_sr_ratios[index]), config.agents(index)
                attn: nn.Module = ReducedAgentAttention(
                    dim, heads, map_size=size, sr_ratio=sr_ratio, proj_drop=drop, **agents, **dd
                )
            else:
                attn = PvtAttention(dim, heads, sr_ratio=int(config.sr_ratios[index]), proj_drop=drop, **dd)
            blocks.append(AgentBlock(dim, attn, config.mlp_ratios[index], 1e-6, drop, rate, **dd))
        down = PvtDownsample(config.dims[index - 1], dim, 2, size, **dd) if index else nn.Identity()
        return Stage(down, blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official Agent-PVT checkpoint, and resize it to the model's image size.

    Raises:
        ValueError: the weights are another model's.
    """
    embeds = {name: m for name, m in model.named_modules() if isinstance(m, PvtEmbed)}
    positions = {f"{name}.pos_embed": (embed.map_size, 0) for name, embed in embeds.items()}
    return load_agent(checkpoint, model, _our_key, positions)


def _our_key(key: str) -> str:
    def embed(number: str) -> str:
        return "stem" if number == "1" else f"stages.{int(number) - 1}.downsample"

    key = re.sub(r"^patch_embed(\d)\.", lambda m: f"{embed(m[1])}.patch_embed.", key)
    key = re.sub(r"^pos_embed(\d)$", lambda m: f"{embed(m[1])}.pos_embed", key)
    key = re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


PVT: dict[str, Any] = {**AGENT, "first_conv": "stem.patch_embed.proj"}
AT_256 = at(256) | {"crop_pct": 0.875}

default_cfgs = generate_default_cfgs(
    {
        "agent_pvt_tiny.in1k": cfg(**PVT, **on_drive("13fdf0e0a7c5498c934f")),
        "agent_pvt_small.in1k": cfg(**PVT, **on_drive("36b8be9a8863456685a3")),
        "agent_pvt_medium.in1k": cfg(**PVT, **on_drive("4d00ecacf18b45f9b88c")),
        "agent_pvt_medium.in1k_256": cfg(**PVT, **on_drive("654df734121643b19c52"), **AT_256),
        "agent_pvt_large.in1k": cfg(**PVT, **on_drive("040cfe0cfbbe4762ad09")),
    }
)

TINY = AgentPvtConfig()


def _create(variant: str, config: AgentPvtConfig, pretrained: bool, **kwargs) -> AgentPvt:
    return build_agent(AgentPvt, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs) -> AgentPvt:
    """Agent-PVT-T, 11.6 M parameters, 2.0 GMACs at 224."""
    return _create("agent_pvt_tiny", TINY, pretrained, **kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs) -> AgentPvt:
    """Agent-PVT-S, 20.6 M parameters, 4.0 GMACs at 224."""
    return _create("agent_pvt_small", replace(TINY, depths=(3, 4, 6, 3)), pretrained, **kwargs)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs) -> AgentPvt:
    """Agent-PVT-M, 35.9 M parameters. The tag in1k_256 builds it for 256 pixels: 36.1 M, 9.1 GMACs."""
    return _create("agent_pvt_medium", replace(TINY, depths=(3, 4, 18, 3)), pretrained, **kwargs)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs) -> AgentPvt:
    """Agent-PVT-L, 48.7 M parameters, 10.4 GMACs at 224."""
    return _create("agent_pvt_large", replace(TINY, depths=(3, 8, 27, 3)), pretrained, **kwargs)
