"""MobileNetV2 of width 1 (Sandler et al. 2018, arXiv:1801.04381), as timm's EfficientNet class builds it."""

import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from ._layers import batch_matters, layers_by_images, take_images_channels_last

# The strings of timm's builder: kind, repeats, kernel, stride, expansion, output channels.
STAGES = ("ds_r{}_k3_s1_c16", "ir_r{}_k3_s2_e6_c24", "ir_r{}_k3_s2_e6_c32", "ir_r{}_k3_s2_e6_c64")
STAGES += ("ir_r{}_k3_s1_e6_c96", "ir_r{}_k3_s2_e6_c160", "ir_r{}_k3_s1_e6_c320")


class MobileNetV2(EfficientNet):
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
        take_images_channels_last(self)

    def forward_features(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 1280, ceil(H / 32), ceil(W / 32))
        if torch.jit.is_scripting():
            return self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        elif self.grad_checkpointing or batch_matters(self.conv_stem, self.bn1, self.blocks):
            return super().forward_features(x)
        else:
            stages = list(self.blocks)
            few = [self.conv_stem, self.bn1, *stages[:2]]  # 96 channels at half the side
            x = layers_by_images(few, x, values_per_pixel=24)
            for stage in stages[2:]:
                x = stage(x)
            return self.bn2(self.conv_head(x))
