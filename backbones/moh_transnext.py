"""MoH-ViT: TransNeXt whose tokens choose the heads that work for them.

Papers     Jin et al. 2024, arXiv:2410.11842 (MoH); Shi 2024, arXiv:2311.17132 (TransNeXt).
Official   https://github.com/SkyworkAI/MoH (Apache-2.0), folder MoH-ViT; its checkpoints load as they are.
We differ  images of any size run. The unit of positions is the map at hand, as in a model that is built for its size,
           or that of an image of `pretrain_size` or `img_size`.
Layout     maps are (B, H, W, C) inside; every stage ends with a LayerNorm.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, to_2tuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops.moh import MohAggregatedAttention, MohAttention
from ._build import StateDict, build, cfg, check_fits
from ._layers import to_nchw, to_nhwc
from ._pruning import AttentionLayout, Projection, Prunable
from ._staged import Stage, StageConfig, StagedBackbone

register_notrace_module(MohAttention)
register_notrace_module(MohAggregatedAttention)


@dataclass(frozen=True)
class MohConfig(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (72, 144, 288, 576)  # channels, per stage
    depths: tuple[int, ...] = (5, 5, 22, 5)  # blocks, per stage
    heads: tuple[int, ...] = (3, 6, 12, 24)  # per stage
    shared: tuple[int, ...] = (3, 6, 3, 4)  # heads that all tokens use, per stage
    routed: tuple[int, ...] = (0, 0, 6, 12)  # heads that a token chooses of the others, per stage
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)  # per stage
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)  # tokens of a pooled cell's side, per stage; 1: plain attention
    fixed_pool_size: int | None = None  # pooled cells a side, where sr_ratio is above 1
    pretrain_size: int | tuple[int, int] | None = None  # px, of the image whose map is the unit of positions
    img_size: int | tuple[int, int] | None = None  # px, the same where pretrain_size is None; None: the map at hand

    per_stage = ("depths", "heads", "shared", "routed", "mlp_ratios", "sr_ratios")

    def coordinate_size(self, stage: int) -> tuple[int, int] | None:
        """The map whose side is the unit of distances."""
        px = self.img_size if self.pretrain_size is None else self.pretrain_size
        if px is None:
            return None
        height, width = to_2tuple(px)
        return height // self.reductions[stage], width // self.reductions[stage]


class OverlapPatchEmbed(nn.Module):
    """A convolution with overlapping patches, then a LayerNorm: (B, D, H, W) -> (B, H / stride, W / stride, C)."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.proj(x)))


class MapPatchEmbed(OverlapPatchEmbed):
    """The same on (B, H, W, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.proj(to_nchw(x))))


@register_notrace_module
class ConvGlu(nn.Module):
    """Gated linear unit whose gate sees its neighbors: GELU(depthwise 3x3(a)) * b of two projections of a map."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = int(2 * hidden_dim / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        gate = self.act(to_nhwc(self.dwconv(to_nchw(gate))))
        return self.drop(self.fc2(self.drop(gate * value)))


class MohBlock(nn.Module):
    def __init__(self, config: MohConfig, stage: int, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        dim, ratio = config.dims[stage], config.sr_ratios[stage]
        chosen: dict[str, Any] = {
            "shared": config.shared[stage],
            "routed": config.routed[stage],
            "coordinate_size": config.coordinate_size(stage),
            "proj_drop": drop,
        }
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        if ratio > 1:
            pool = {"sr_ratio": ratio, "fixed_pool_size": config.fixed_pool_size}
            self.attn = MohAggregatedAttention(dim, config.heads[stage], **pool, **chosen, **dd)
        else:
            self.attn = MohAttention(dim, config.heads[stage], **chosen, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvGlu(dim, int(dim * config.mlp_ratios[stage]), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MohStage(Stage):
    """A stage with a LayerNorm behind its blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], dim: int, **dd) -> None:
        super().__init__(downsample, blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run_blocks(self.downsample(x)))


OF_HEADS: dict[str, Any] = {
    "per_head": (*(("temperature", 0), ("query_embedding", 0), ("cpb_fc2.weight", 0), ("cpb_fc2.bias", 0)),),
    "kept": "kept_heads",  # gates are those of all heads, so that tokens choose as before
    "cuts_channels": False,  # queries and keys are normalized
}
OF_LOCAL_KEYS = (("relative_pos_bias_local", 0), ("learnable_tokens", 0), ("learnable_bias", 0))


class MohTransNeXt(StagedBackbone):
    """TransNeXt with mixtures of heads; maps are (B, H, W, C) inside."""

    output_fmt = "NHWC"

    prunable = Prunable(
        qkv=r".+\.attn\.(q|kv|qkv)\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.dwconv\.weight",
        gate=r".+\.attn\.wg(_[01])?\.weight",
        glu=r".+\.mlp",
        attentions=(
            AttentionLayout(r".+\.attn", "MohAttention", **OF_HEADS),
            AttentionLayout(
                r".+\.attn",
                "MohAggregatedAttention",
                projections=(Projection("q", ("q",)), Projection("kv", ("k", "v"))),
                **{**OF_HEADS, "per_head": (*OF_HEADS["per_head"], *OF_LOCAL_KEYS)},
            ),
        ),
    )

    def make_stem(self, config: MohConfig, in_chans: int, **dd) -> nn.Module:
        return OverlapPatchEmbed(in_chans, config.dims[0], 7, 4, **dd)

    def make_stage(self, config: MohConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim = config.dims[index]
        return MohStage(
            MapPatchEmbed(config.dims[index - 1], dim, 3, 2, **dd) if index else nn.Identity(),
            [MohBlock(config, index, drop, rate, **dd) for rate in drop_paths],
            dim,
            **dd,
        )

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        kept = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(word in name for word in kept)}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official MoH-ViT checkpoint; ours pass through.

    Raises:
        ValueError: the weights are another model's.
    """
    return check_fits({_our_key(key): value for key, value in unwrap(checkpoint).items()}, model)


def _our_key(key: str) -> str:
    key = re.sub(r"^patch_embed1\.", "stem.", key)
    key = re.sub(r"^patch_embed(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.", key)
    key = re.sub(r"^block(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    key = re.sub(r"^norm(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.norm.", key)
    key = re.sub(r"\.dwconv\.dwconv\.", ".dwconv.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


MOH: dict[str, Any] = {
    "first_conv": "stem.proj",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2410.11842",
    "paper_name": "MoH: Multi-Head Attention as Mixture-of-Head Attention",
    "origin_url": "https://github.com/SkyworkAI/MoH",
}


def _notes(variant: str) -> tuple[str, ...]:
    return (
        f"The authors' weights: https://huggingface.co/Chat-UniVi/MoH-ViT-{variant}. Load the file with "
        "pretrained=True, pretrained_cfg_overlay=dict(file=...).",
    )


default_cfgs = generate_default_cfgs(
    {
        # no `url`: the names of the files in the authors' repositories are not known
        f"moh_transnext_{size}.untrained": cfg(**MOH, notes=_notes(variant))
        for size, variant in (("small_75", "S-75"), ("small_80", "S-80"), ("base_50", "B-50"), ("base_75", "B-75"))
    }
)

BASE = MohConfig(
    dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), heads=(4, 8, 16, 32), shared=(4, 8, 4, 5), routed=(0, 0, 8, 16)
)


def _create_moh(variant: str, config: MohConfig, pretrained: bool, **kwargs) -> MohTransNeXt:
    return build(MohTransNeXt, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs) -> MohTransNeXt:
    """MoH-ViT-S that uses 75 % of its heads, 49.9 M parameters, 10.3 GMACs at 224 with all heads."""
    return _create_moh("moh_transnext_small_75", MohConfig(), pretrained, **kwargs)


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs) -> MohTransNeXt:
    """MoH-ViT-S that uses 80 % of its heads, 49.9 M parameters, 10.3 GMACs at 224 with all heads."""
    return _create_moh("moh_transnext_small_80", MohConfig(shared=(3, 6, 3, 8)), pretrained, **kwargs)


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs) -> MohTransNeXt:
    """MoH-ViT-B that uses 50 % of its heads, 90.0 M parameters, 18.4 GMACs at 224 with all heads."""
    config = MohConfig(
        dims=BASE.dims, depths=BASE.depths, heads=BASE.heads, shared=(2, 2, 2, 4), routed=(2, 4, 6, 8)
    )  # fmt: skip
    return _create_moh("moh_transnext_base_50", config, pretrained, **kwargs)


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs) -> MohTransNeXt:
    """MoH-ViT-B that uses 75 % of its heads, 90.0 M parameters, 18.3 GMACs at 224 with all heads."""
    return _create_moh("moh_transnext_base_75", BASE, pretrained, **kwargs)
