"""timm's ResNet, EfficientNet and ByobNet with the errors of our own backbones, and MobileNets made of one of them.

Everything else is timm's: modules, keys, memory layout and results.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.byobnet import ByobNet
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, fx, nn

from .._timm import decode_arch_def
from ._staged import check_indices, take_image

fx.wrap("take_image")


class _Checked:
    """Check images and feature indices before timm's methods see them.

    A mixin: the class beside it has the methods and `feature_info`, which type checkers cannot know.
    """

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, *args: Any, **kwargs: Any):
        """As timm's.

        Raises:
            ValueError: an image has no pixels, or the model has no such feature map.
        """
        if not kwargs.get("extra_blocks"):  # EfficientNet then counts blocks
            check_indices("indices", indices, len(self.feature_info))  # type: ignore[attr-defined]
        return super().forward_intermediates(take_image(x), indices, *args, **kwargs)  # type: ignore[misc]

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, *args: Any, **kwargs: Any) -> list[int]:
        """As timm's.

        Raises:
            ValueError: the model has no such feature map.
        """
        if not kwargs.get("extra_blocks"):
            check_indices("indices", indices, len(self.feature_info))  # type: ignore[attr-defined]
        return super().prune_intermediate_layers(indices, *args, **kwargs)  # type: ignore[misc]


class CheckedResNet(_Checked, ResNet):
    def forward_features(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, ceil(H / 32), ceil(W / 32))
        x = take_image(x)
        if torch.jit.is_scripting():  # TorchScript has no super()
            x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
            return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]
        else:
            return super().forward_features(x)


class CheckedEfficientNet(_Checked, EfficientNet):
    def forward_features(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, ceil(H / 32), ceil(W / 32))
        x = take_image(x)
        if torch.jit.is_scripting():
            return self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        else:
            return super().forward_features(x)


class CheckedByobNet(_Checked, ByobNet):
    def forward_features(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, D, ceil(H / 32), ceil(W / 32))
        x = take_image(x)
        if torch.jit.is_scripting():
            return self.final_conv(self.stages(self.stem(x)))
        else:
            return super().forward_features(x)


# The strings of timm's builder: kind, repeats, kernel, stride, expansion, output channels.
STAGES_V1 = ("dsa_r{}_k3_s1_c64", *(f"dsa_r{{}}_k3_s2_c{channels}" for channels in (128, 256, 512, 1024)))
STAGES = (
    *("ds_r{}_k3_s1_c16", "ir_r{}_k3_s2_e6_c24", "ir_r{}_k3_s2_e6_c32", "ir_r{}_k3_s2_e6_c64"),
    *("ir_r{}_k3_s1_e6_c96", "ir_r{}_k3_s2_e6_c160", "ir_r{}_k3_s1_e6_c320"),
)


def _blocks(stages: tuple[str, ...], depths: tuple[int, ...]) -> list:
    if len(depths) != len(stages):
        raise ValueError(f"depths must have one entry per stage, {len(stages)}, got {depths}")
    return decode_arch_def([[stage.format(depth)] for stage, depth in zip(stages, depths, strict=True)])


class MobileNetV1(CheckedEfficientNet):
    """MobileNetV1 of width 1 (Howard et al. 2017, arXiv:1704.04861), as timm's EfficientNet.

    Args:
        depths: blocks, per stage.
        kwargs: as in timm's EfficientNet.
    """

    def __init__(self, depths: tuple[int, ...], **kwargs) -> None:
        super().__init__(_blocks(STAGES_V1, depths), num_features=0, act_layer=nn.ReLU6, **kwargs)


class MobileNetV2(CheckedEfficientNet):
    """MobileNetV2 of width 1 (Sandler et al. 2018, arXiv:1801.04381), as timm's EfficientNet.

    Args:
        depths: blocks, per stage.
        kwargs: as in timm's EfficientNet.
    """

    def __init__(self, depths: tuple[int, ...], **kwargs) -> None:
        super().__init__(_blocks(STAGES, depths), act_layer=nn.ReLU6, **kwargs)
