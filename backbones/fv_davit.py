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
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, NormMlpClassifierHead, calculate_drop_path_rates
from timm.models import checkpoint_seq, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from ..attention_ops import ChannelAttention, WindowAttention2d
from ..attention_ops.tiling import cover_with_windows
from ._build import StateDict, build, cfg, check_fits, unwrap
from ._layers import to_channels_last
from ._prunable import AttentionLayout, Prunable
from ._staged import StagedBackbone

register_notrace_module(ChannelAttention)


@dataclass(frozen=True)
class DavitConfig:
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels, per stage
    depths: tuple[int, ...] = (1, 1, 3, 1)  # pairs of a window block and a channel block, per stage
    head_dim: int = 32
    window_size: int = 7  # tokens a side; 12 in the official 384-pixel models and in Florence-2
    mlp_ratio: float = 4.0
    florence: bool = False  # 3x3 down-sampling, channel attention scaled by tokens, blocks by name

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.dims):
            raise ValueError(f"depths must have one entry per stage, {len(self.dims)} as dims, got {self.depths}")
        if odd := [d for d in self.dims if d % self.head_dim]:
            raise ValueError(f"dims must be multiples of head_dim {self.head_dim}, got {odd}")

    @property
    def reductions(self) -> list[int]:
        """Image pixels per token, per stage."""
        return [4 * 2**i for i in range(len(self.dims))]


def _to_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@register_notrace_module
class DavitStem(nn.Module):
    """7x7 convolution of stride 4 on the image padded right and bottom to whole patches, then a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 7, 4, 3, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))
        rest_h, rest_w = x.shape[2] % 4, x.shape[3] % 4
        if rest_h > 0 or rest_w > 0:
            x = F.pad(x, [0, (4 - rest_w) % 4, 0, (4 - rest_h) % 4])
        x = self.conv(to_channels_last(x))
        return _to_nchw(self.norm(_to_nhwc(x)))


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
        x = _to_nchw(self.norm(_to_nhwc(x)))
        if self.pads and (x.shape[2] % 2 > 0 or x.shape[3] % 2 > 0):
            x = F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2])
        return self.conv(x)


@register_notrace_module
class TileAttention(WindowAttention2d):
    """Window attention that cuts the map before the projections: one copy of x in place of three of q, k and v."""

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        size = x.shape[1:3]
        rows, cols = self.window_size[0], self.window_size[1]
        x = cover_with_windows(x, self.window_size)
        grid = [x.shape[1] // rows, x.shape[2] // cols]
        x = x.unflatten(2, (grid[1], cols)).unflatten(1, (grid[0], rows)).transpose(2, 3)  # (B, gy, gx, wy, wx, C)
        q, k, v = self.qkv(x.flatten(0, 2)).unflatten(-1, (3, self.heads, -1)).unbind(3)
        out = torch.ops.foveate.window_attention(q, k, v, self.window_size, scale=self.scale)
        x = self.proj_drop(self.proj(out.flatten(3))).unflatten(0, (-1, grid[0], grid[1]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


class ConvPosition(nn.Module):
    """Depthwise 3x3 convolution with a shortcut: what DaViT has for position encoding."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return x + _to_nhwc(self.proj(_to_nchw(x)))


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


class DavitStage(nn.Module):
    """Down-sampling (all stages but the first), then pairs of blocks."""

    def __init__(
        self, in_dim: int, index: int, config: DavitConfig, drop: float, drop_paths: list[float], **dd
    ) -> None:
        super().__init__()
        dim = config.dims[index]
        self.downsample = DavitDownsample(in_dim, dim, 3 if config.florence else 2, **dd) if index else nn.Identity()
        self.blocks = nn.Sequential(*(_pair(dim, config, drop, rate, **dd) for rate in drop_paths))
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, H', W'), channels-last in memory
        x = _to_nhwc(self.downsample(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return _to_nchw(x)


class Davit(StagedBackbone):
    """Dual attention backbone: windows of tokens, then groups of channels. The head pools first, then norms.

    Args:
        config: sizes of layers.
        num_classes, in_chans, global_pool, drop_rate: as in timm; drop_rate acts before the classifier.
        proj_drop_rate: dropout inside the MLPs, twice.
        drop_path_rate: stochastic depth of the last pair of blocks; grows linearly from 0.
    """

    channels_last: Final[bool] = True

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

    def __init__(
        self,
        config: DavitConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dims = config.dims
        self.stem = DavitStem(in_chans, dims[0], **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(config.depths), stagewise=True)
        self.stages = nn.Sequential()
        for i, own in enumerate(rates):
            self.stages.append(DavitStage(dims[max(i - 1, 0)], i, config, proj_drop_rate, own, **dd))
        self.norm = nn.Identity()
        self.finish(
            dims,
            config.reductions,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=_head_norm, **dd
        )
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _head_norm(dim: int, **dd) -> nn.Module:
    return LayerNorm2d(dim, eps=1e-5, **dd)


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


DAVIT = {
    "first_conv": "stem.conv",
    "crop_pct": 0.95,
    "license": "apache-2.0",
    "paper_ids": "arXiv:2204.03645",
    "paper_name": "DaViT: Dual Attention Vision Transformers",
    "origin_url": "https://github.com/dingmyu/davit",
}
FLORENCE = {
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
