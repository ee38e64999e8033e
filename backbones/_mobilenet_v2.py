"""MobileNetV2 of width 1 (Sandler et al. 2018, arXiv:1801.04381), as timm's EfficientNet class builds it."""

from timm.models._efficientnet_builder import decode_arch_def
from torch import nn

from ._timm_classes import CheckedEfficientNet

# The strings of timm's builder: kind, repeats, kernel, stride, expansion, output channels.
STAGES = ("ds_r{}_k3_s1_c16", "ir_r{}_k3_s2_e6_c24", "ir_r{}_k3_s2_e6_c32", "ir_r{}_k3_s2_e6_c64")
STAGES += ("ir_r{}_k3_s1_e6_c96", "ir_r{}_k3_s2_e6_c160", "ir_r{}_k3_s1_e6_c320")


class MobileNetV2(CheckedEfficientNet):
    """timm's EfficientNet as MobileNetV2 of width 1.

    Args:
        depths: blocks, per stage.
        kwargs: as in timm's EfficientNet.
    """

    def __init__(self, depths: tuple[int, ...], **kwargs) -> None:
        if len(depths) != len(STAGES):
            raise ValueError(f"depths must have one entry per stage, {len(STAGES)}, got {depths}")
        stages = [[stage.format(depth)] for stage, depth in zip(STAGES, depths, strict=True)]
        super().__init__(decode_arch_def(stages), act_layer=nn.ReLU6, **kwargs)
