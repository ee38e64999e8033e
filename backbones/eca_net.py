"""ECA-Net: ResNets and MobileNetV2 with efficient channel attention.

Paper      Wang, Wu, Zhu, Li, Zuo, Hu 2020, arXiv:1910.03151.
Official   https://github.com/BangguWu/ECANet (MIT); its checkpoints load as they are.
Kernels    the published networks state the kernel per stage, as 3, 5, 5, 7 in ECA-Net50; timm's `ecaresnet*` derive it
           from the width, so that the published weights do not fit them.
Placement  after the last BatchNorm of a residual branch, before the shortcut is added.
Reuse      the networks are timm's ResNet and EfficientNet with the gate in their blocks.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from .._weights import unwrap
from ..attention_ops import EfficientChannelAttention
from ._build import M, StateDict, build, cfg, check_fits
from ._pruning import Prunable
from ._staged import check_stages
from ._timm_classes import CheckedResNet, MobileNetV2

register_notrace_module(EfficientChannelAttention)


@dataclass(frozen=True)
class EcaResNetConfig:
    """What makes one variant differ from another."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks, per stage
    kernel_sizes: tuple[int, ...] = (3, 5, 5, 7)  # taps over channels, per stage
    bottleneck: bool = True  # False: two 3x3 convolutions a block

    def __post_init__(self) -> None:
        check_stages(self, ("depths", "kernel_sizes"), 4)
        if even := [k for k in self.kernel_sizes if k < 1 or k % 2 == 0]:
            raise ValueError(f"kernel_sizes must be odd and positive, got {even}")

    @property
    def kernels(self) -> dict[int, int]:
        """From the width of a stage's map to its kernel."""
        block = Bottleneck if self.bottleneck else BasicBlock
        return {64 * 2**i * block.expansion: size for i, size in enumerate(self.kernel_sizes)}


def _eca(channels: int, kernels: Mapping[int, int], **dd) -> EfficientChannelAttention:
    return EfficientChannelAttention(channels, kernels[channels], **dd)


class EcaResNet(CheckedResNet):
    """timm's ResNet with efficient channel attention in every block.

    Args:
        config: depths, kernels, kind of block.
        zero_init_last: start with every residual branch at zero; the authors did not.
        kwargs: as in timm's ResNet.
    """

    prunable = Prunable(conv=r"layer\d+\.\d+\.conv\d\.weight", gate=r".+\.se\.conv\.weight")

    def __init__(self, config: EcaResNetConfig, zero_init_last: bool = False, **kwargs) -> None:
        super().__init__(
            Bottleneck if config.bottleneck else BasicBlock,  # type: ignore[arg-type]  # timm wants the class
            config.depths,
            block_args={"attn_layer": partial(_eca, kernels=config.kernels)},
            zero_init_last=zero_init_last,
            **kwargs,
        )


@dataclass(frozen=True)
class EcaMobileNetConfig:
    """MobileNetV2 of width 1."""

    depths: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)  # blocks, per stage
    wide_from: int = 64  # output channels from which the kernel is 3, not 1; 96 in the authors' repository


class EcaMobileNetV2(MobileNetV2):
    """MobileNetV2 with efficient channel attention at the end of every block.

    Args:
        config: depths, and where the kernel grows.
        kwargs: as in timm's EfficientNet. (The authors trained with a `drop_rate` of 0.25.)
    """

    prunable = Prunable(
        conv=r"blocks\..+\.conv_pwl?\.weight", depthwise=r".+\.conv_dw\.weight", gate=r".+\.eca\.conv\.weight"
    )

    def __init__(self, config: EcaMobileNetConfig, device=None, dtype=None, **kwargs) -> None:
        super().__init__(config.depths, device=device, dtype=dtype, **kwargs)
        for stage in self.blocks:
            for block in stage.children():
                last = "bn3" if hasattr(block, "bn3") else "bn2"
                norm = getattr(block, last)
                channels = norm.num_features
                gate = EfficientChannelAttention(
                    channels, 3 if channels >= config.wide_from else 1, device=device, dtype=dtype
                )
                setattr(block, last, nn.Sequential(OrderedDict(norm=norm, eca=gate)))


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official ECA-Net checkpoint; ours pass through.

    Raises:
        ValueError: the weights are another model's.
    """
    state_dict = unwrap(checkpoint)
    rename: Callable[[str], str] = _resnet_key
    if isinstance(model, EcaMobileNetV2):
        rename = partial(_mobilenet_key, places=_places(model))
    return check_fits({rename(key): value for key, value in state_dict.items()}, model)


def _resnet_key(key: str) -> str:
    return re.sub(r"^(layer\d+\.\d+)\.eca\.", r"\1.se.", key)


def _places(model: EcaMobileNetV2) -> list[str]:
    """The blocks of the model in order: entry i is the authors' `features.{i + 1}`."""
    return [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j, _ in enumerate(stage.children())]


# What the authors' block holds at each place, in a block that does not expand and in one that does.
PLAIN = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2.norm", "3": "bn2.eca"}
EXPANDING = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl"}
EXPANDING |= {"3": "bn3.norm", "4": "bn3.eca"}


def _mobilenet_key(key: str, places: list[str]) -> str:
    key = re.sub(r"^features\.0\.0\.", "conv_stem.", key)
    key = re.sub(r"^features\.0\.1\.", "bn1.", key)
    key = re.sub(rf"^features\.{len(places) + 1}\.0\.", "conv_head.", key)
    key = re.sub(rf"^features\.{len(places) + 1}\.1\.", "bn2.", key)
    key = re.sub(r"^classifier\.1\.", "classifier.", key)
    found = re.match(r"features\.(\d+)\.conv\.(\d(?:\.\d)?)\.(.+)", key)
    if not found or int(found[1]) > len(places):
        return key
    layers = PLAIN if found[1] == "1" else EXPANDING
    return f"{places[int(found[1]) - 1]}.{layers.get(found[2], found[2])}.{found[3]}"


ECA: dict[str, Any] = {
    "license": "mit",
    "paper_ids": "arXiv:1910.03151",
    "paper_name": "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    "origin_url": "https://github.com/BangguWu/ECANet",
    "interpolation": "bilinear",
    "notes": (
        "The weights are on drive folders that the repository's README links; give a file of theirs with "
        "pretrained_cfg_overlay={'file': path}.",
    ),
}
RESNET: dict[str, Any] = {"first_conv": "conv1", "classifier": "fc", **ECA}

default_cfgs = generate_default_cfgs(
    {
        "eca_resnet18.in1k": cfg(**RESNET),
        "eca_resnet34.in1k": cfg(**RESNET),
        "eca_resnet50.in1k": cfg(**RESNET),
        "eca_resnet101.in1k": cfg(**RESNET),
        "eca_resnet152.in1k": cfg(**RESNET),
        "eca_mobilenet_v2.in1k": cfg(first_conv="conv_stem", **{**ECA, "classifier": "classifier"}),
    }
)

ECA18 = EcaResNetConfig(depths=(2, 2, 2, 2), kernel_sizes=(3, 5, 7, 7), bottleneck=False)
ECA101 = EcaResNetConfig(depths=(3, 4, 23, 3), kernel_sizes=(3, 3, 5, 7))


def _create(cls: type[M], variant: str, config: Any, pretrained: bool, **kwargs) -> M:
    return build(cls, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def eca_resnet18(pretrained: bool = False, **kwargs) -> EcaResNet:
    """ECA-Net18, kernels 3, 5, 7, 7; 11.7 M parameters, 1.8 GMACs at 224."""
    return _create(EcaResNet, "eca_resnet18", ECA18, pretrained, **kwargs)


@register_model
def eca_resnet34(pretrained: bool = False, **kwargs) -> EcaResNet:
    """ECA-Net34, kernels 3, 3, 5, 7; 21.8 M parameters, 3.7 GMACs at 224."""
    config = replace(ECA18, depths=(3, 4, 6, 3), kernel_sizes=(3, 3, 5, 7))
    return _create(EcaResNet, "eca_resnet34", config, pretrained, **kwargs)


@register_model
def eca_resnet50(pretrained: bool = False, **kwargs) -> EcaResNet:
    """ECA-Net50, kernels 3, 5, 5, 7; 25.6 M parameters, 4.1 GMACs at 224."""
    return _create(EcaResNet, "eca_resnet50", EcaResNetConfig(), pretrained, **kwargs)


@register_model
def eca_resnet101(pretrained: bool = False, **kwargs) -> EcaResNet:
    """ECA-Net101, kernels 3, 3, 5, 7; 44.5 M parameters, 7.9 GMACs at 224."""
    return _create(EcaResNet, "eca_resnet101", ECA101, pretrained, **kwargs)


@register_model
def eca_resnet152(pretrained: bool = False, **kwargs) -> EcaResNet:
    """ECA-Net152, kernels 3, 3, 5, 7; 60.2 M parameters, 11.6 GMACs at 224."""
    return _create(EcaResNet, "eca_resnet152", replace(ECA101, depths=(3, 8, 36, 3)), pretrained, **kwargs)


@register_model
def eca_mobilenet_v2(pretrained: bool = False, **kwargs) -> EcaMobileNetV2:
    """ECA-MobileNetV2 as published: kernel 3 from 64 channels on, else 1; 3.5 M parameters, 0.3 GMACs at 224."""
    return _create(EcaMobileNetV2, "eca_mobilenet_v2", EcaMobileNetConfig(), pretrained, **kwargs)
