"""LITv2: vision transformer with HiLo attention and deformable token merging.

Paper      Pan, Cai, Zhuang 2022, arXiv:2205.13213; deformable token merging from LIT, arXiv:2105.14217.
Official   https://github.com/ziplab/LITv2 (Apache-2.0); its checkpoints load as they are.
We differ  any image size runs, padded as the authors' dense backbones do (their classifier takes squares of one size,
           on which nothing is padded); merging runs on torchvision's deformable convolution, always in float32, as
           theirs does (in files by gathers and a product); it opens a stage here and closes the one before there, the
           maths is the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from .._weights import unwrap
from ..attention_ops import HiLoAttention
from ..attention_ops._graph.deform import deform_conv2d_graph
from ..attention_ops._graph.exporting import is_exported
from ._build import StateDict, build, cfg, check_fits
from ._layers import DepthwiseMlp, pad_to_multiples, to_channels_last, to_nchw, to_nhwc
from ._pruning import AttentionLayout, Projection, Prunable
from ._staged import Stage, StageConfig, StagedBackbone

register_notrace_module(HiLoAttention)  # it pads by the size of the map


@dataclass(frozen=True)
class Litv2Config(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels, per stage
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks, per stage
    windows: tuple[int | None, ...] = (None, None, 2, 1)  # tokens a side, per stage; None: blocks without attention
    alpha: float = 0.9  # share of low-frequency heads
    head_dim: int = 32
    mlp_ratio: float = 4.0

    per_stage = ("depths", "windows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")
        if odd := [d for d, w in zip(self.dims, self.windows, strict=True) if w is not None and d % self.head_dim]:
            raise ValueError(f"dims must be multiples of head_dim {self.head_dim}, got {odd}")
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1, got {self.alpha!r}")


@register_notrace_module
class PatchEmbed(nn.Module):
    """4x4 convolution of stride 4, zero-padded right and bottom to whole patches, then a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, 4, 4, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, H / 4, W / 4, C)
        x = to_channels_last(pad_to_multiples(x, 4))  # the convolution then writes what the norm reads
        return self.norm(to_nhwc(self.proj(x)))


class DeformConv(nn.Module):
    """2x2 convolution of stride 2 whose taps are moved by offsets, which a plain one computes from the same map."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_dim, dim, 2, 2, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd))
        self.conv_offset = nn.Conv2d(dim, 8, 2, 2, **dd)  # (rows, columns) of each tap
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        reach = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -reach, reach)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, H / 2, W / 2)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        offset = self.conv_offset(x).to(dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if torch.jit.is_scripting():
            out = deform_conv2d(x.to(dtype), offset, weight, bias, (2, 2))
        elif is_exported():
            out = deform_conv2d_graph(x.to(dtype), offset, weight, bias, 2)
        else:
            out = deform_conv2d(x.to(dtype), offset, weight, bias, (2, 2))
        return out.to(x.dtype)


@register_notrace_module
class DeformableMerging(nn.Module):
    """Down-sampling: deformable convolution, BatchNorm, GELU; channels-last maps, odd sides lose one token."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dconv = DeformConv(dim, out_dim, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H / 2, W / 2, D)
        x = self.norm(self.dconv(to_nchw(x)))
        return F.gelu(to_nhwc(x).contiguous())


class Litv2Block(nn.Module):
    def __init__(self, dim: int, window: int | None, config: Litv2Config, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        heads = dim // config.head_dim
        self.norm1 = None if window is None else nn.LayerNorm(dim, **dd)
        self.attn = None if window is None else HiLoAttention(dim, heads, window, config.alpha, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * config.mlp_ratio), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        if self.norm1 is not None and self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Litv2(StagedBackbone):
    """HiLo attention backbone; maps are (B, H, W, C), and (B, C, H, W) where timm asks for features."""

    output_fmt = "NHWC"

    prunable = Prunable(
        qkv=r".+\.attn\.(l_q|l_kv|h_qkv)\.weight",
        prj=r".+\.attn\.[lh]_proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.dwconv\.weight",
        attentions=(
            AttentionLayout(
                r".+\.attn",
                projections=(Projection("l_q", ("q",)), Projection("l_kv", ("k", "v"))),
                out="l_proj",
                heads="low_heads",
                cuts_channels=False,  # one head_dim serves both branches
            ),
            AttentionLayout(
                r".+\.attn",
                projections=(Projection("h_qkv"),),
                out="h_proj",
                heads="high_heads",
                cuts_channels=False,
            ),
        ),
    )

    def make_stem(self, config: Litv2Config, in_chans: int, **dd) -> nn.Module:
        return PatchEmbed(in_chans, config.dims[0], **dd)

    def make_stage(self, config: Litv2Config, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim, window = config.dims[index], config.windows[index]
        return Stage(
            DeformableMerging(config.dims[index - 1], dim, **dd) if index else nn.Identity(),
            [Litv2Block(dim, window, config, drop, rate, **dd) for rate in drop_paths],
        )

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.LayerNorm(dim, **dd)

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, DepthwiseMlp):
                nn.init.normal_(module.dwconv.weight, 0.0, (2.0 / 9) ** 0.5)  # fan out of a depthwise 3x3 convolution
                if module.dwconv.bias is not None:
                    nn.init.zeros_(module.dwconv.bias)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official LITv2 checkpoint; ours pass through.

    Raises:
        ValueError: the weights are another model's, or of another alpha.
    """
    return check_fits({_our_key(key): value for key, value in unwrap(checkpoint).items()}, model)


def _our_key(key: str) -> str:
    key = re.sub(r"^patch_embed\.", "stem.", key)
    key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
    key = re.sub(r"\.downsample\.norm_layer\.", ".downsample.norm.", key)
    key = re.sub(r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks.", key)
    key = re.sub(r"\.dwconv\.dwconv\.", ".dwconv.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


LITV2 = {
    "first_conv": "stem.proj",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2205.13213",
    "paper_name": "Fast Vision Transformers with HiLo Attention",
    "origin_url": "https://github.com/ziplab/LITv2",
}
AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}
# The weights of the paper's ablation, by tag: the tag sets alpha, unless the caller does.
ALPHAS = {f"alpha{int(10 * a):02d}_in1k": a for a in (0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0)}


def _url(version: str, file: str) -> str:
    return f"https://github.com/ziplab/LITv2/releases/download/{version}/{file}.pth"


default_cfgs = generate_default_cfgs(
    {
        "litv2_small.in1k": cfg(_url("v1.0", "litv2_s"), **LITV2),
        **{f"litv2_small.{tag}": cfg(_url("v1.1", f"alpha_{alpha:g}"), **LITV2) for tag, alpha in ALPHAS.items()},
        "litv2_medium.in1k": cfg(_url("v1.0", "litv2_m"), **LITV2),
        "litv2_base.in1k": cfg(_url("v1.0", "litv2_b"), **LITV2),
        "litv2_base.in1k_384": cfg(_url("v1.0", "litv2_b_384"), **LITV2, **AT_384),
    }
)


def _create_litv2(variant: str, config: Litv2Config, pretrained: bool, **kwargs) -> Litv2:
    return build(Litv2, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _alpha_of(pretrained_cfg: Any) -> float:
    """The alpha of the weights that timm asks for: their tag, or a config that holds it."""
    tag: Any = pretrained_cfg.get("tag") if isinstance(pretrained_cfg, Mapping) else pretrained_cfg
    return ALPHAS.get(getattr(tag, "tag", tag), Litv2Config.alpha)


@register_model
def litv2_small(pretrained: bool = False, **kwargs) -> Litv2:
    """LITv2-S, 27.8 M parameters, 3.7 GMACs at 224. Tags alpha00_in1k to alpha10_in1k set alpha too."""
    config = Litv2Config(alpha=_alpha_of(kwargs.get("pretrained_cfg")))
    return _create_litv2("litv2_small", config, pretrained, **kwargs)


@register_model
def litv2_medium(pretrained: bool = False, **kwargs) -> Litv2:
    """LITv2-M, 48.8 M parameters, 7.5 GMACs at 224."""
    return _create_litv2("litv2_medium", Litv2Config(depths=(2, 2, 18, 2)), pretrained, **kwargs)


@register_model
def litv2_base(pretrained: bool = False, **kwargs) -> Litv2:
    """LITv2-B, 86.5 M parameters, 13.2 GMACs at 224."""
    config = Litv2Config(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2))
    return _create_litv2("litv2_base", config, pretrained, **kwargs)
