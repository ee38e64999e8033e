"""VAN: Visual Attention Network.

Paper      Guo, Lu, Liu, Cheng, Hu 2022, arXiv:2202.09741.
Official   https://github.com/Visual-Attention-Network/VAN-Classification (Apache-2.0); its checkpoints load as is.
Layout     channels-last on a CPU, by itself: oneDNN's depthwise convolutions are 1.5 to 60 times faster there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops import LargeKernelAttention
from ._build import StateDict, build, cfg, check_fits
from ._layers import MapGELU
from ._pruning import Prunable
from ._staged import Stage, StageConfig, StagedBackbone

register_notrace_module(LargeKernelAttention)


@dataclass(frozen=True)
class VanConfig(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (32, 64, 160, 256)  # channels, per stage
    depths: tuple[int, ...] = (3, 3, 5, 2)  # blocks, per stage
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)  # hidden channels of the MLPs over dims, per stage
    layer_scale: float = 1e-2  # initial value

    per_stage = ("depths", "mlp_ratios")


class OverlapPatchEmbed(nn.Module):
    """Convolution of overlapping patches, then a BatchNorm."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class VanAttention(nn.Module):
    """Large kernel attention between two projections, with a shortcut of its own."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj_1 = nn.Conv2d(dim, dim, 1, **dd)
        self.activation = MapGELU()
        self.spatial_gating_unit = LargeKernelAttention(dim, **dd)
        self.proj_2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))


class VanMlp(nn.Module):
    """1x1 convolution, depthwise 3x3, GELU, 1x1 convolution."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = MapGELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        x = self.drop(self.act(self.dwconv(self.fc1(x))))
        return self.drop(self.fc2(x))


class VanBlock(nn.Module):
    """Attention and MLP, each after a BatchNorm and with a layer scale."""

    def __init__(self, dim: int, mlp_ratio: float, layer_scale: float, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = VanAttention(dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = VanMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), layer_scale, **dd))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class VanStage(Stage):
    """A stage with a LayerNorm at its end, which the next stage sees too."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, H / 2, W / 2)
        return self.norm(self.run_blocks(self.downsample(x)))


class Van(StagedBackbone):
    """Large kernel attention backbone; maps are (B, C, H, W)."""

    channels_last = True

    prunable = Prunable(
        prj=r".+\.attn\.(proj_[12]|spatial_gating_unit\.conv1)\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.(dwconv|conv0|conv_spatial)\.weight",
        square=r".+\.spatial_gating_unit",
    )

    def make_stem(self, config: VanConfig, in_chans: int, **dd) -> nn.Module:
        return OverlapPatchEmbed(in_chans, config.dims[0], 7, 4, **dd)

    def make_stage(self, config: VanConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim, mlp_ratio = config.dims[index], config.mlp_ratios[index]
        return VanStage(
            OverlapPatchEmbed(config.dims[index - 1], dim, 3, 2, **dd) if index else nn.Identity(),
            [VanBlock(dim, mlp_ratio, config.layer_scale, drop, rate, **dd) for rate in drop_paths],
            LayerNorm2d(dim, eps=1e-6, **dd),
        )

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official VAN checkpoint; ours pass through.

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


VAN: dict[str, Any] = {
    "first_conv": "stem.proj",
    "crop_pct": 0.9,
    "mean": IMAGENET_INCEPTION_MEAN,
    "std": IMAGENET_INCEPTION_STD,
    "license": "apache-2.0",
    "paper_ids": "arXiv:2202.09741",
    "paper_name": "Visual Attention Network",
    "origin_url": "https://github.com/Visual-Attention-Network/VAN-Classification",
}


def _url(name: str, file: str) -> str:
    return f"https://huggingface.co/Visual-Attention-Network/VAN-{name}-original/resolve/main/{file}.pth.tar"


default_cfgs = generate_default_cfgs(
    {
        "van_b0.in1k": cfg(_url("Tiny", "van_tiny_754"), **VAN),
        "van_b1.in1k": cfg(_url("Small", "van_small_811"), **VAN),
        "van_b2.in1k": cfg(_url("Base", "van_base_828"), **VAN),
        "van_b3.in1k": cfg(_url("Large", "van_large_839"), **VAN),
        "van_b4.untrained": cfg(**VAN),
        "van_b5.untrained": cfg(**VAN),
        "van_b6.untrained": cfg(**VAN),
    }
)

B1 = VanConfig(dims=(64, 128, 320, 512), depths=(2, 2, 4, 2))


def _create_van(variant: str, config: VanConfig, pretrained: bool, **kwargs) -> Van:
    return build(Van, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def van_b0(pretrained: bool = False, **kwargs) -> Van:
    """VAN-B0, 4.1 M parameters, 0.9 GMACs at 224."""
    return _create_van("van_b0", VanConfig(), pretrained, **kwargs)


@register_model
def van_b1(pretrained: bool = False, **kwargs) -> Van:
    """VAN-B1, 13.9 M parameters, 2.5 GMACs at 224."""
    return _create_van("van_b1", B1, pretrained, **kwargs)


@register_model
def van_b2(pretrained: bool = False, **kwargs) -> Van:
    """VAN-B2, 26.6 M parameters, 5.0 GMACs at 224."""
    return _create_van("van_b2", replace(B1, depths=(3, 3, 12, 3)), pretrained, **kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs) -> Van:
    """VAN-B3, 44.8 M parameters, 8.9 GMACs at 224."""
    return _create_van("van_b3", replace(B1, depths=(3, 5, 27, 3)), pretrained, **kwargs)


@register_model
def van_b4(pretrained: bool = False, **kwargs) -> Van:
    """VAN-B4, 60.3 M parameters, 12.1 GMACs at 224. No ImageNet-1k weights are published."""
    return _create_van("van_b4", replace(B1, depths=(3, 6, 40, 3)), pretrained, **kwargs)


@register_model
def van_b5(pretrained: bool = False, **kwargs) -> Van:
    """VAN-B5, 90.0 M parameters, 17.1 GMACs at 224. No ImageNet-1k weights are published."""
    return _create_van("van_b5", VanConfig(dims=(96, 192, 480, 768), depths=(3, 3, 24, 3)), pretrained, **kwargs)


@register_model
def van_b6(pretrained: bool = False, **kwargs) -> Van:
    """VAN-B6, 199.8 M parameters, 38.7 GMACs at 224. No ImageNet-1k weights are published."""
    return _create_van("van_b6", VanConfig(dims=(96, 192, 384, 768), depths=(6, 6, 90, 6)), pretrained, **kwargs)
