"""DaViT: Dual Attention Vision Transformer, and the image tower of Florence-2.

Paper      Ding, Xiao, Codella, Luo, Wang, Yuan 2022, arXiv:2204.03645; Florence-2: Xiao et al. 2023, arXiv:2311.06242.
Official   https://github.com/dingmyu/davit (MIT); its checkpoints, timm's and Florence-2's load as they are.
Names      `fv_` because timm registers `davit_*`; keys and results equal timm's, so that timm's weights load.
Layout     maps stay (B, H, W, C) inside a stage and channels-last between stages: the depthwise convolutions write
           what the norms read.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, NormMlpClassifierHead
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops import ChannelAttention, WindowAttention2d, window_attention
from ..attention_ops.packed import unpack
from ..attention_ops.tiling import cover_with_windows, crop
from ..attention_ops.window import is_read_in_place
from ._build import StateDict, build, cfg, check_fits
from ._layers import pad_to_multiples, to_channels_last, to_nchw, to_nhwc
from ._pruning import AttentionLayout, Prunable
from ._staged import Head, Stage, StageConfig, StagedBackbone

register_notrace_module(ChannelAttention)


@dataclass(frozen=True)
class DavitConfig(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels, per stage
    depths: tuple[int, ...] = (1, 1, 3, 1)  # pairs of a window block and a channel block, per stage
    head_dim: int = 32
    window_size: int = 7  # tokens a side; 12 in the official 384-pixel models and in Florence-2
    mlp_ratio: float = 4.0
    florence: bool = False  # 3x3 down-sampling, channel attention scaled by tokens, blocks by name

    def __post_init__(self) -> None:
        super().__post_init__()
        if odd := [d for d in self.dims if d % self.head_dim]:
            raise ValueError(f"dims must be multiples of head_dim {self.head_dim}, got {odd}")


@register_notrace_module
class DavitStem(nn.Module):
    """7x7 convolution of stride 4 on the image padded right and bottom to whole patches, then a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 7, 4, 3, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))
        x = self.conv(to_channels_last(pad_to_multiples(x, 4)))
        return to_nchw(self.norm(to_nhwc(x)))


@register_notrace_module
class DavitDownsample(nn.Module):
    """LayerNorm, then a convolution of stride 2: 2x2 on the map padded to even sides, or 3x3 (Florence-2)."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pads = kernel_size == 2
        self.norm = nn.LayerNorm(dim, **dd)
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, 2, (kernel_size - 1) // 2, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, ceil(H / 2), ceil(W / 2))
        x = to_nchw(self.norm(to_nhwc(x)))
        return self.conv(pad_to_multiples(x, 2) if self.pads else x)


@register_notrace_module
class TileAttention(WindowAttention2d):
    """Window attention that cuts the map before the projections: one copy of x in place of three of q, k and v.

    Triton kernels read windows where they lie: for them nothing is cut.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        if torch.jit.is_scripting():
            return self.cut(x)
        else:  # TorchScript compiles the first branch only
            return super().forward(x) if is_read_in_place(x) else self.cut(x)

    def cut(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        size = x.shape[1:3]
        rows, cols = self.window_size[0], self.window_size[1]
        x = cover_with_windows(x, self.window_size)
        grid = [x.shape[1] // rows, x.shape[2] // cols]
        x = x.unflatten(2, (grid[1], cols)).unflatten(1, (grid[0], rows)).transpose(2, 3)  # (B, gy, gx, wy, wx, C)
        q, k, v = unpack(self.qkv(x.flatten(0, 2)).unflatten(-1, (3, self.heads, -1)), 3)
        out = window_attention(q, k, v, self.window_size, scale=self.scale)
        x = self.proj_drop(self.proj(out.flatten(3))).unflatten(0, (-1, grid[0], grid[1]))
        return crop(x.transpose(2, 3).flatten(3, 4).flatten(1, 2), size[0], size[1])


class ConvPosition(nn.Module):
    """Depthwise 3x3 convolution with a shortcut: what DaViT has for position encoding."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return x + to_nhwc(self.proj(to_nchw(x)))


class DavitBlock(nn.Module):
    """Position, attention, position, MLP, each with a shortcut; attention of windows or of channels."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        self.cpe1 = ConvPosition(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.cpe2 = ConvPosition(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _pair(dim: int, config: DavitConfig, drop: float, drop_path: float, **dd) -> nn.Sequential:
    """A window block and a channel block, under the names that timm gives them."""
    heads = dim // config.head_dim
    window = TileAttention(dim, heads, config.window_size, **dd)
    channel = ChannelAttention(dim, heads, by_tokens=config.florence, **dd)
    blocks = [DavitBlock(dim, attn, config.mlp_ratio, drop, drop_path, **dd) for attn in (window, channel)]
    names = ("spatial_block", "channel_block") if config.florence else ("0", "1")
    return nn.Sequential(OrderedDict(zip(names, blocks, strict=True)))


class DavitStage(Stage):
    """A stage whose blocks take (B, H, W, C) maps."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, H', W'), channels-last in memory
        return to_nchw(self.run_blocks(to_nhwc(self.downsample(x))))


class Davit(StagedBackbone):
    """Dual attention backbone: windows of tokens, then groups of channels. The head pools first, then norms."""

    channels_last = True

    prunable = Prunable(
        qkv=r".+\.attn\.qkv\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.cpe[12]\.proj\.weight",
        attentions=(
            AttentionLayout(r".+\.(0|spatial_block)\.attn"),
            AttentionLayout(r".+\.(1|channel_block)\.attn", cuts_channels=False),  # channels attend to each other
        ),
    )

    def make_stem(self, config: DavitConfig, in_chans: int, **dd) -> nn.Module:
        return DavitStem(in_chans, config.dims[0], **dd)

    def make_stage(self, config: DavitConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim, kernel_size = config.dims[index], 3 if config.florence else 2
        return DavitStage(
            DavitDownsample(config.dims[index - 1], dim, kernel_size, **dd) if index else nn.Identity(),
            [_pair(dim, config, drop, rate, **dd) for rate in drop_paths],
        )

    def make_head(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **dd) -> Head:
        norm = partial(LayerNorm2d, eps=1e-5)
        return NormMlpClassifierHead(
            dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm, **dd
        )


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official DaViT checkpoint or of a Florence-2 model; timm's and ours pass through.

    Florence-2 has no norm in front of a classifier: the model keeps its own.

    Raises:
        ValueError: the weights are another model's.
    """
    state_dict = unwrap(checkpoint)
    tower = "vision_tower."
    if any(key.startswith(tower) for key in state_dict):
        state_dict = {
            _florence_key(key.removeprefix(tower)): value for key, value in state_dict.items() if key.startswith(tower)
        }
        own = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
        state_dict = {**own, **state_dict}
    elif "stem.conv.weight" not in state_dict:
        state_dict = {_official_key(key): value for key, value in state_dict.items()}
    return check_fits(state_dict, model)


def _official_key(key: str) -> str:
    key = re.sub(r"^patch_embeds\.0\.proj\.", "stem.conv.", key)
    key = re.sub(r"^patch_embeds\.0\.", "stem.", key)
    key = re.sub(r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv.", key)
    key = re.sub(r"^patch_embeds\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^main_blocks\.(\d+)\.", r"stages.\1.blocks.", key)
    key = re.sub(r"\.cpe\.([01])\.", lambda m: f".cpe{int(m[1]) + 1}.", key)
    key = re.sub(r"^norms\.", "head.norm.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


def _florence_key(key: str) -> str:
    key = re.sub(r"^convs\.0\.proj\.", "stem.conv.", key)
    key = re.sub(r"^convs\.0\.", "stem.", key)
    key = re.sub(r"^convs\.(\d+)\.proj\.", r"stages.\1.downsample.conv.", key)
    key = re.sub(r"^convs\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^blocks\.(\d+)\.", r"stages.\1.blocks.", key)
    key = re.sub(r"\.(?:window|channel)_attn\.norm\.", ".norm1.", key)
    key = re.sub(r"\.(?:window|channel)_attn\.fn\.", ".attn.", key)
    key = re.sub(r"\.ffn\.norm\.", ".norm2.", key)
    key = re.sub(r"\.ffn\.fn\.net\.", ".mlp.", key)
    return re.sub(r"\.conv([12])\.fn\.dw\.", r".cpe\1.proj.", key)


DAVIT: dict[str, Any] = {
    "first_conv": "stem.conv",
    "crop_pct": 0.95,
    "license": "apache-2.0",
    "paper_ids": "arXiv:2204.03645",
    "paper_name": "DaViT: Dual Attention Vision Transformers",
    "origin_url": "https://github.com/dingmyu/davit",
}
FLORENCE: dict[str, Any] = {
    **DAVIT,
    "num_classes": 0,
    "input_size": (3, 768, 768),
    "pool_size": (24, 24),
    "license": "mit",
    "paper_ids": "arXiv:2311.06242",
    "paper_name": "Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks",
    "origin_url": "https://huggingface.co/microsoft/Florence-2-base",
}

default_cfgs = generate_default_cfgs(
    {
        "fv_davit_tiny.msft_in1k": cfg(hf_hub_id="timm/davit_tiny.msft_in1k", **DAVIT),
        "fv_davit_small.msft_in1k": cfg(hf_hub_id="timm/davit_small.msft_in1k", **DAVIT),
        "fv_davit_base.msft_in1k": cfg(hf_hub_id="timm/davit_base.msft_in1k", **DAVIT),
        "fv_davit_large.untrained": cfg(**DAVIT),
        "fv_davit_huge.untrained": cfg(**DAVIT),
        "fv_davit_giant.untrained": cfg(**DAVIT),
        "fv_davit_base_fl.msft_florence2": cfg(hf_hub_id="microsoft/Florence-2-base", **FLORENCE),
        "fv_davit_huge_fl.msft_florence2": cfg(hf_hub_id="microsoft/Florence-2-large", **FLORENCE),
    }
)

TINY = DavitConfig()
SMALL = DavitConfig(depths=(1, 1, 9, 1))
BASE = replace(SMALL, dims=(128, 256, 512, 1024))
HUGE = replace(SMALL, dims=(256, 512, 1024, 2048))


def _create_davit(variant: str, config: DavitConfig, pretrained: bool, **kwargs) -> Davit:
    return build(Davit, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def fv_davit_tiny(pretrained: bool = False, **kwargs) -> Davit:
    """DaViT-Tiny, 28.4 M parameters, 4.5 GMACs at 224."""
    return _create_davit("fv_davit_tiny", TINY, pretrained, **kwargs)


@register_model
def fv_davit_small(pretrained: bool = False, **kwargs) -> Davit:
    """DaViT-Small, 49.7 M parameters, 8.8 GMACs at 224."""
    return _create_davit("fv_davit_small", SMALL, pretrained, **kwargs)


@register_model
def fv_davit_base(pretrained: bool = False, **kwargs) -> Davit:
    """DaViT-Base, 88.0 M parameters, 15.5 GMACs at 224."""
    return _create_davit("fv_davit_base", BASE, pretrained, **kwargs)


@register_model
def fv_davit_large(pretrained: bool = False, **kwargs) -> Davit:
    """DaViT-Large, 196.8 M parameters; officially for 384 pixels and `window_size=12`. No weights are published."""
    config = replace(SMALL, dims=(192, 384, 768, 1536))
    return _create_davit("fv_davit_large", config, pretrained, **kwargs)


@register_model
def fv_davit_huge(pretrained: bool = False, **kwargs) -> Davit:
    """DaViT-Huge, 348.9 M parameters. No weights are published."""
    return _create_davit("fv_davit_huge", HUGE, pretrained, **kwargs)


@register_model
def fv_davit_giant(pretrained: bool = False, **kwargs) -> Davit:
    """DaViT-Giant, 1.4 G parameters. No weights are published."""
    config = DavitConfig(dims=(384, 768, 1536, 3072), depths=(1, 1, 12, 3))
    return _create_davit("fv_davit_giant", config, pretrained, **kwargs)


@register_model
def fv_davit_base_fl(pretrained: bool = False, **kwargs) -> Davit:
    """The image tower of Florence-2-base, 90.4 M parameters, without a classifier."""
    return _create_davit("fv_davit_base_fl", replace(BASE, window_size=12, florence=True), pretrained, **kwargs)


@register_model
def fv_davit_huge_fl(pretrained: bool = False, **kwargs) -> Davit:
    """The image tower of Florence-2-large, 360.6 M parameters, without a classifier."""
    return _create_davit("fv_davit_huge_fl", replace(HUGE, window_size=12, florence=True), pretrained, **kwargs)
