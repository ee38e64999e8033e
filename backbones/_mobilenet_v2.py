"""MobileNetV2 of width 1 (Sandler et al. 2018, arXiv:1801.04381), as timm's EfficientNet class builds it."""

from functools import partial

import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from ._folding import conv_norm
from ._layers import batch_matters, layers_by_images, take_images_channels_last

# The strings of timm's builder: kind, repeats, kernel, stride, expansion, output channels.
STAGES = ("ds_r{}_k3_s1_c16", "ir_r{}_k3_s2_e6_c24", "ir_r{}_k3_s2_e6_c32", "ir_r{}_k3_s2_e6_c64")
STAGES += ("ir_r{}_k3_s1_e6_c96", "ir_r{}_k3_s2_e6_c160", "ir_r{}_k3_s1_e6_c320")


class FirstBlock(DepthwiseSeparableConv):
    """timm's block that does not expand; CPU inference folds its norms."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        if torch.jit.is_scripting():
            y = self.bn2(self.conv_pw(self.se(self.aa(self.bn1(self.conv_dw(x))))))
        else:
            y = self.se(self.aa(conv_norm(self.conv_dw, self.bn1, x)))
            y = conv_norm(self.conv_pw, self.bn2, y)
        return self.drop_path(y) + x if self.has_skip else y


class Block(InvertedResidual):
    """timm's inverted residual; CPU inference folds its norms."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        if torch.jit.is_scripting():
            y = self.aa(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x)))))
            y = self.bn3(self.conv_pwl(self.se(y)))
        else:
            y = self.aa(conv_norm(self.conv_dw, self.bn2, conv_norm(self.conv_pw, self.bn1, x)))
            y = conv_norm(self.conv_pwl, self.bn3, self.se(y))
        return self.drop_path(y) + x if self.has_skip else y


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
        for stage in self.blocks:
            for block in stage:
                block.__class__ = Block if type(block) is InvertedResidual else FirstBlock

    def forward_features(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 1280, ceil(H / 32), ceil(W / 32))
        if torch.jit.is_scripting():
            return self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        elif self.grad_checkpointing or batch_matters(self.conv_stem, self.bn1, self.blocks):
            return super().forward_features(x)
        else:
            stages = list(self.blocks)
            few = [partial(conv_norm, self.conv_stem, self.bn1), *stages[:2]]  # 96 channels at half the side
            x = layers_by_images(few, x, values_per_pixel=24)
            for stage in stages[2:]:
                x = stage(x)
            return conv_norm(self.conv_head, self.bn2, x)
