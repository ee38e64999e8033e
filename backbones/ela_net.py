"""ELA: ResNets and MobileNetV2 with efficient local attention.

Paper      Xu and Wan 2024, arXiv:2403.01123. Variants T, B, S, L differ in the gate's kernel, groups and norm.
Official   https://github.com/Xuwei86/ELA_Code; it publishes no ImageNet weights.
Placement  ResNet: in a bottleneck before the last 1x1 convolution, in a basic block after the last BatchNorm.
           MobileNetV2: before the linear 1x1 convolution of blocks that expand. As in the authors' code.
Open       the authors' segmentation ResNets add every gate's input to its output, and gate whole stages besides;
           whether the ImageNet tables did is not said. Here the gates are plain; `ela_residual=True` adds the inputs
           inside blocks.
Reuse      the networks are timm's ResNet and EfficientNet with the gate in their blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops import EfficientLocalAttention, insert_attention
from ..attention_ops.strip_gate import VARIANTS, ElaVariant
from ._build import M, StateDict, build, cfg, check_fits
from ._pruning import Prunable
from ._staged import check_stages
from ._timm_classes import CheckedResNet, MobileNetV2

register_notrace_module(EfficientLocalAttention)


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"ela_variant must be one of {list(VARIANTS)}, got {variant!r}")


@dataclass(frozen=True)
class ElaResNetConfig:
    """What makes one variant differ from another."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks, per stage
    bottleneck: bool = True  # False: two 3x3 convolutions a block
    ela_variant: ElaVariant = "b"  # "t", "b", "s" or "l"
    ela_residual: bool = False  # add the gate's input to its output

    def __post_init__(self) -> None:
        check_stages(self, ("depths",), 4)
        _check_variant(self.ela_variant)


class ElaBottleneck(Bottleneck):
    """timm's bottleneck, the gate before its last convolution."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        # The gate takes the place of timm's optional squeeze-and-excitation.
        x = self.se(self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x))))))  # type: ignore[misc]
        x = self.bn3(self.conv3(x))
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act3(x + shortcut)


class ElaResNet(CheckedResNet):
    """timm's ResNet with efficient local attention in every block.

    Args:
        config: depths, kind of block, the gate.
        zero_init_last: start with every residual branch at zero.
        kwargs: as in timm's ResNet.
    """

    prunable = Prunable(conv=r"layer\d+\.\d+\.conv\d\.weight", gate=r".+\.se\.conv\.weight")

    def __init__(self, config: ElaResNetConfig, zero_init_last: bool = False, **kwargs) -> None:
        gate = partial(_gate, shrink=4 if config.bottleneck else 1, config=config)
        super().__init__(
            ElaBottleneck if config.bottleneck else BasicBlock,  # type: ignore[arg-type]  # timm wants the class
            config.depths,
            block_args={"attn_layer": gate},
            zero_init_last=zero_init_last,
            **kwargs,
        )


def _gate(out_channels: int, shrink: int, config: ElaResNetConfig, **dd) -> EfficientLocalAttention:
    """Make the gate of a block from what timm tells it: the channels that the block returns."""
    return EfficientLocalAttention(out_channels // shrink, config.ela_variant, residual=config.ela_residual, **dd)


@dataclass(frozen=True)
class ElaMobileNetConfig:
    """MobileNetV2 of width 1. The GroupNorm of "t" has 24 or 16 groups where 32 do not divide the channels."""

    depths: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)  # blocks, per stage
    ela_variant: ElaVariant = "l"  # "t", "b", "s" or "l"; the authors' code has "l"
    ela_residual: bool = False  # add the gate's input to its output

    def __post_init__(self) -> None:
        _check_variant(self.ela_variant)


class ElaMobileNetV2(MobileNetV2):
    """MobileNetV2 with efficient local attention in every block that expands.

    Args:
        config: depths, the gate.
        kwargs: as in timm's EfficientNet.
    """

    prunable = Prunable(
        conv=r"blocks\..+\.conv_pwl?\.weight", depthwise=r".+\.conv_dw\.weight", gate=r".+\.se\.conv\.weight"
    )

    def __init__(self, config: ElaMobileNetConfig, **kwargs) -> None:
        super().__init__(config.depths, **kwargs)
        for stage in self.blocks[1:]:  # the first does not expand
            insert_attention(stage, "ela", variant=config.ela_variant, residual=config.ela_residual)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Unwrap a checkpoint of ours; none of the authors' is public.

    Raises:
        ValueError: the weights are another model's.
    """
    return check_fits(unwrap(checkpoint), model)


ELA: dict[str, Any] = {
    "paper_ids": "arXiv:2403.01123",
    "paper_name": "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
    "origin_url": "https://github.com/Xuwei86/ELA_Code",
    "interpolation": "bilinear",
}
RESNET: dict[str, Any] = {"first_conv": "conv1", "classifier": "fc", **ELA}
MOBILENET: dict[str, Any] = {"first_conv": "conv_stem", "classifier": "classifier", **ELA}

KINDS = ("", *(f"_{variant}" for variant in VARIANTS))
default_cfgs = generate_default_cfgs(
    {
        **{f"ela_resnet{size}{kind}.untrained": cfg(**RESNET) for size in (18, 34, 50, 101, 152) for kind in KINDS},
        **{f"ela_mobilenet_v2{kind}.untrained": cfg(**MOBILENET) for kind in KINDS},
    }
)

BASIC18 = ElaResNetConfig(depths=(2, 2, 2, 2), bottleneck=False)
BASIC34 = ElaResNetConfig(bottleneck=False)
DEEP101 = ElaResNetConfig(depths=(3, 4, 23, 3))
DEEP152 = ElaResNetConfig(depths=(3, 8, 36, 3))


def _create(cls: type[M], variant: str, config: Any, pretrained: bool, **kwargs) -> M:
    kind = variant.rpartition("_")[2]
    config = replace(config, ela_variant=kind) if kind in VARIANTS else config
    return build(cls, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def ela_resnet18(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-18, or the variant that `ela_variant` names."""
    return _create(ElaResNet, "ela_resnet18", BASIC18, pretrained, **kwargs)


@register_model
def ela_resnet18_t(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-T in ResNet-18, 11.7 M parameters."""
    return _create(ElaResNet, "ela_resnet18_t", BASIC18, pretrained, **kwargs)


@register_model
def ela_resnet18_b(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-18, 11.7 M parameters."""
    return _create(ElaResNet, "ela_resnet18_b", BASIC18, pretrained, **kwargs)


@register_model
def ela_resnet18_s(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-S in ResNet-18, 11.8 M parameters."""
    return _create(ElaResNet, "ela_resnet18_s", BASIC18, pretrained, **kwargs)


@register_model
def ela_resnet18_l(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-L in ResNet-18, 11.8 M parameters."""
    return _create(ElaResNet, "ela_resnet18_l", BASIC18, pretrained, **kwargs)


@register_model
def ela_resnet34(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-34, or the variant that `ela_variant` names."""
    return _create(ElaResNet, "ela_resnet34", BASIC34, pretrained, **kwargs)


@register_model
def ela_resnet34_t(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-T in ResNet-34, 21.8 M parameters."""
    return _create(ElaResNet, "ela_resnet34_t", BASIC34, pretrained, **kwargs)


@register_model
def ela_resnet34_b(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-34, 21.8 M parameters."""
    return _create(ElaResNet, "ela_resnet34_b", BASIC34, pretrained, **kwargs)


@register_model
def ela_resnet34_s(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-S in ResNet-34, 22.0 M parameters."""
    return _create(ElaResNet, "ela_resnet34_s", BASIC34, pretrained, **kwargs)


@register_model
def ela_resnet34_l(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-L in ResNet-34, 22.0 M parameters."""
    return _create(ElaResNet, "ela_resnet34_l", BASIC34, pretrained, **kwargs)


@register_model
def ela_resnet50(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-50, or the variant that `ela_variant` names."""
    return _create(ElaResNet, "ela_resnet50", ElaResNetConfig(), pretrained, **kwargs)


@register_model
def ela_resnet50_t(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-T in ResNet-50, 25.6 M parameters."""
    return _create(ElaResNet, "ela_resnet50_t", ElaResNetConfig(), pretrained, **kwargs)


@register_model
def ela_resnet50_b(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-50, 25.6 M parameters."""
    return _create(ElaResNet, "ela_resnet50_b", ElaResNetConfig(), pretrained, **kwargs)


@register_model
def ela_resnet50_s(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-S in ResNet-50, 25.7 M parameters."""
    return _create(ElaResNet, "ela_resnet50_s", ElaResNetConfig(), pretrained, **kwargs)


@register_model
def ela_resnet50_l(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-L in ResNet-50, 25.8 M parameters."""
    return _create(ElaResNet, "ela_resnet50_l", ElaResNetConfig(), pretrained, **kwargs)


@register_model
def ela_resnet101(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-101, or the variant that `ela_variant` names."""
    return _create(ElaResNet, "ela_resnet101", DEEP101, pretrained, **kwargs)


@register_model
def ela_resnet101_t(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-T in ResNet-101, 44.6 M parameters."""
    return _create(ElaResNet, "ela_resnet101_t", DEEP101, pretrained, **kwargs)


@register_model
def ela_resnet101_b(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-101, 44.6 M parameters."""
    return _create(ElaResNet, "ela_resnet101_b", DEEP101, pretrained, **kwargs)


@register_model
def ela_resnet101_s(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-S in ResNet-101, 44.9 M parameters."""
    return _create(ElaResNet, "ela_resnet101_s", DEEP101, pretrained, **kwargs)


@register_model
def ela_resnet101_l(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-L in ResNet-101, 45.0 M parameters."""
    return _create(ElaResNet, "ela_resnet101_l", DEEP101, pretrained, **kwargs)


@register_model
def ela_resnet152(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-152, or the variant that `ela_variant` names."""
    return _create(ElaResNet, "ela_resnet152", DEEP152, pretrained, **kwargs)


@register_model
def ela_resnet152_t(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-T in ResNet-152, 60.3 M parameters."""
    return _create(ElaResNet, "ela_resnet152_t", DEEP152, pretrained, **kwargs)


@register_model
def ela_resnet152_b(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-B in ResNet-152, 60.3 M parameters."""
    return _create(ElaResNet, "ela_resnet152_b", DEEP152, pretrained, **kwargs)


@register_model
def ela_resnet152_s(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-S in ResNet-152, 60.7 M parameters."""
    return _create(ElaResNet, "ela_resnet152_s", DEEP152, pretrained, **kwargs)


@register_model
def ela_resnet152_l(pretrained: bool = False, **kwargs) -> ElaResNet:
    """ELA-L in ResNet-152, 60.9 M parameters."""
    return _create(ElaResNet, "ela_resnet152_l", DEEP152, pretrained, **kwargs)


@register_model
def ela_mobilenet_v2(pretrained: bool = False, **kwargs) -> ElaMobileNetV2:
    """ELA-L in MobileNetV2, or the variant that `ela_variant` names."""
    return _create(ElaMobileNetV2, "ela_mobilenet_v2", ElaMobileNetConfig(), pretrained, **kwargs)


@register_model
def ela_mobilenet_v2_t(pretrained: bool = False, **kwargs) -> ElaMobileNetV2:
    """ELA-T in MobileNetV2, 3.6 M parameters."""
    return _create(ElaMobileNetV2, "ela_mobilenet_v2_t", ElaMobileNetConfig(), pretrained, **kwargs)


@register_model
def ela_mobilenet_v2_b(pretrained: bool = False, **kwargs) -> ElaMobileNetV2:
    """ELA-B in MobileNetV2, 3.6 M parameters."""
    return _create(ElaMobileNetV2, "ela_mobilenet_v2_b", ElaMobileNetConfig(), pretrained, **kwargs)


@register_model
def ela_mobilenet_v2_s(pretrained: bool = False, **kwargs) -> ElaMobileNetV2:
    """ELA-S in MobileNetV2, 3.8 M parameters."""
    return _create(ElaMobileNetV2, "ela_mobilenet_v2_s", ElaMobileNetConfig(), pretrained, **kwargs)


@register_model
def ela_mobilenet_v2_l(pretrained: bool = False, **kwargs) -> ElaMobileNetV2:
    """ELA-L in MobileNetV2, 3.9 M parameters."""
    return _create(ElaMobileNetV2, "ela_mobilenet_v2_l", ElaMobileNetConfig(), pretrained, **kwargs)
