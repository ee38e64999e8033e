"""NAT: Neighborhood Attention Transformer.

Paper      Hassani, Walton, Li, Li, Shi 2023, arXiv:2204.07143.
Official   https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT); its checkpoints load as they are.
We differ  down-sampling opens a stage here and closes the one before there: keys `levels.i.downsample` become
           `stages.{i + 1}.downsample`, the maths is the same.

DiNAT and the isotropic models are the same network under another config: see dinat.py and nat_isotropic.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops import NeighborhoodAttention2d, neighborhood_attention
from ..attention_ops._graph.local import neighborhood_attention_up_to
from ..attention_ops._graph.sizes import known, sides
from ..attention_ops.packed import unpack
from ..attention_ops.tiling import map_size, pad_to_windows
from ._build import StateDict, build, cfg, check_fits, resize_rpb
from ._layers import layer_scale, pad_to_multiples, scaled, to_channels_last, to_nchw, to_nhwc
from ._pruning import AttentionLayout, Prunable
from ._staged import Stage, StageConfig, StagedBackbone

register_notrace_module(NeighborhoodAttention2d)  # it pads by the size of the map


@dataclass(frozen=True)
class NatConfig(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (64, 128, 256, 512)  # channels, per stage
    depths: tuple[int, ...] = (3, 4, 6, 5)  # blocks, per stage
    head_dim: int = 32
    kernel_size: int = 7  # tokens
    dilations: tuple[tuple[int, ...], ...] | None = None  # per stage, repeated over its blocks; None: all 1
    mlp_ratio: float = 3.0
    layer_scale: float | None = None  # initial value; None: no layer scale
    patch_size: int | None = None  # None: two overlapping 3x3 convolutions of stride 2
    downsample: str | None = "conv"  # "conv" (NAT), "merge" (Swin), or None (isotropic)
    dense: bool = False  # every token sees every token, up to kernel_size on each side: the ViT baseline

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.dims)
        if odd := [d for d in self.dims if d % self.head_dim]:
            raise ValueError(f"dims must be multiples of head_dim {self.head_dim}, got {odd}")
        if self.dilations is not None and (len(self.dilations) != stages or not all(self.dilations)):
            raise ValueError(f"dilations must have one tuple per stage, {stages} as dims, got {self.dilations}")
        if self.downsample not in ("conv", "merge", None):
            raise ValueError(f"downsample must be 'conv', 'merge' or None, got {self.downsample!r}")

    def dilation(self, stage: int, block: int) -> int:
        cycle = (1,) if self.dilations is None else self.dilations[stage]
        return cycle[block % len(cycle)]

    @property
    def reductions(self) -> list[int]:
        """Image pixels per token, per stage."""
        step = 1 if self.downsample is None else 2
        return [(self.patch_size or 4) * step**i for i in range(len(self.dims))]


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between, then a LayerNorm: (B, 3, H, W) -> (B, H/4, W/4, C)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(x)  # the convolutions then write what the norm reads
        return self.norm(to_nhwc(self.proj(x)))


@register_notrace_module
class PatchStem(nn.Module):
    """One convolution per patch, zero-padded right and bottom to whole patches, then a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(pad_to_multiples(x, self.patch_size))
        return self.norm(to_nhwc(self.proj(x)))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2, then a LayerNorm: (B, H, W, C) -> (B, H/2, W/2, D)."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.reduction(to_nchw(x))))


@register_notrace_module
class PatchMerging(nn.Module):
    """Swin's down-sampling: the four tokens of a 2x2 patch side by side, LayerNorm, Linear; odd sides padded by one."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_windows(x, [2, 2])
        top, bottom = x[:, 0::2], x[:, 1::2]
        x = torch.cat([top[:, :, 0::2], bottom[:, :, 0::2], top[:, :, 1::2], bottom[:, :, 1::2]], dim=-1)
        return self.reduction(self.norm(x))


@register_notrace_module
class DenseAttention2d(NeighborhoodAttention2d):
    """Attention of all tokens to all tokens with the bias of neighborhood attention: a kernel as large as the map.

    kernel_size is the largest map, in tokens a side, on which all see all; on larger ones the neighborhood is that
    large. (The official ViT baseline takes maps of one size only, where the two agree.)
    """

    rpb: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        q, k, v = unpack(self.qkv(x).unflatten(-1, (3, self.heads, -1)), 3)  # (B, H, W, heads, head_dim)
        if torch.jit.is_scripting():
            out = self.attend(q, k, v)
        elif known(*sides(x)):
            out = self.attend(q, k, v)
        else:  # a file's map of any size
            out = neighborhood_attention_up_to(q, k, v, self.rpb, self.kernel_size, self.scale)
        return self.proj_drop(self.proj(out.flatten(3)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, H, W, heads, head_dim)
        (rows, cols), (height, width) = self.kernel_size, map_size(q)
        kernel_h, kernel_w = min(rows, height), min(cols, width)
        rpb = self.rpb[:, rows - kernel_h : rows + kernel_h - 1, cols - kernel_w : cols + kernel_w - 1]
        return neighborhood_attention(q, k, v, [kernel_h, kernel_w], rpb=rpb, scale=self.scale)


class NatBlock(nn.Module):
    def __init__(self, dim: int, config: NatConfig, dilation: int, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        kind = DenseAttention2d if config.dense else NeighborhoodAttention2d
        self.attn = kind(dim, dim // config.head_dim, config.kernel_size, dilation, proj_drop=drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma1 = layer_scale((dim,), config.layer_scale, **dd)
        self.gamma2 = layer_scale((dim,), config.layer_scale, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))


class Nat(StagedBackbone):
    """Neighborhood attention backbone; maps are (B, H, W, C) inside."""

    output_fmt = "NHWC"

    prunable = Prunable(
        qkv=r".+\.attn\.qkv\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        attentions=(AttentionLayout(r".+\.attn", per_head=(("rpb", 0),)),),
    )

    def make_stem(self, config: NatConfig, in_chans: int, **dd) -> nn.Module:
        if config.patch_size is None:
            return ConvStem(in_chans, config.dims[0], **dd)
        return PatchStem(in_chans, config.dims[0], config.patch_size, **dd)

    def make_stage(self, config: NatConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim = config.dims[index]
        kinds = {"conv": ConvDownsample, "merge": PatchMerging}
        kind = kinds[config.downsample] if index and config.downsample is not None else None
        return Stage(
            kind(config.dims[index - 1], dim, **dd) if kind else nn.Identity(),
            [NatBlock(dim, config, config.dilation(index, j), drop, rate, **dd) for j, rate in enumerate(drop_paths)],
        )

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.LayerNorm(dim, **dd)

    def init_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".attn." not in name:  # attention draws its own
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official NAT, DiNAT, DiNAT_s or isotropic checkpoint; ours pass through.

    A model made with another kernel_size takes its relative position biases resized, as the authors' 11x11 model did.

    Raises:
        ValueError: the weights are another model's.
    """
    state_dict = {
        _our_key(key): value
        for key, value in unwrap(checkpoint).items()
        if not key.endswith(".relative_position_index")
    }
    for name, table in model.state_dict().items():
        if name.endswith(".rpb") and name in state_dict and state_dict[name].shape[0] == table.shape[0]:
            state_dict[name] = resize_rpb(state_dict[name], tuple(table.shape[1:]))
    return check_fits(state_dict, model)


def _our_key(key: str) -> str:
    key = re.sub(r"^patch_embed\.", "stem.", key)
    key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
    key = re.sub(r"^(?:levels|layers)\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
    key = re.sub(r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks.", key)
    return re.sub(r"^layers\.(\d+)\.", r"stages.\1.blocks.0.", key)  # isotropic: every layer is a stage


URL = "https://shi-labs.com/projects"
NAT = {
    "first_conv": "stem.proj.0",
    "license": "mit",
    "paper_ids": "arXiv:2204.07143",
    "paper_name": "Neighborhood Attention Transformer",
    "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
}

default_cfgs = generate_default_cfgs(
    {
        f"nat_{size}.in1k": cfg(f"{URL}/nat/checkpoints/CLS/nat_{size}.pth", **NAT)
        for size in ("mini", "tiny", "small", "base")
    }
)


def create_nat(variant: str, config: NatConfig, pretrained: bool, **kwargs) -> Nat:
    return build(Nat, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> Nat:
    """NAT-Mini, 20.0 M parameters, 2.7 GMACs at 224."""
    return create_nat("nat_mini", NatConfig(), pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> Nat:
    """NAT-Tiny, 27.9 M parameters, 4.3 GMACs at 224."""
    return create_nat("nat_tiny", NatConfig(depths=(3, 4, 18, 5)), pretrained, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> Nat:
    """NAT-Small, 50.7 M parameters, 7.8 GMACs at 224."""
    config = NatConfig(dims=(96, 192, 384, 768), depths=(3, 4, 18, 5), mlp_ratio=2.0, layer_scale=1e-5)
    return create_nat("nat_small", config, pretrained, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> Nat:
    """NAT-Base, 89.8 M parameters, 13.7 GMACs at 224."""
    config = NatConfig(dims=(128, 256, 512, 1024), depths=(3, 4, 18, 5), mlp_ratio=2.0, layer_scale=1e-5)
    return create_nat("nat_base", config, pretrained, **kwargs)
