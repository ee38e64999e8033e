"""The layers of the gates with their weights handed to the ops: the way to the fused kernels."""

import torch
from torch import Tensor, nn

from foveate.attention_ops import EfficientChannelAttention, EfficientLocalAttention, LargeKernelAttention

OPS = torch.ops.foveate


class ChannelGate(nn.Module):
    def __init__(self, layer: EfficientChannelAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return OPS.channel_gate(x, self.layer.conv.weight)


class StripGate(nn.Module):
    def __init__(self, layer: EfficientLocalAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        norm = self.layer.norm
        return OPS.strip_gate(x, self.layer.conv.weight, norm.weight, norm.bias, norm.num_groups, norm.eps)


class LargeKernel(nn.Module):
    def __init__(self, layer: LargeKernelAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        convs = self.layer.conv0, self.layer.conv_spatial, self.layer.conv1
        weights = [tensor for conv in convs for tensor in (conv.weight, conv.bias)]
        return OPS.large_kernel_attention(x, *weights, self.layer.dilation)


BY_OP = {EfficientChannelAttention: ChannelGate, EfficientLocalAttention: StripGate, LargeKernelAttention: LargeKernel}


def by_op(layer: nn.Module) -> nn.Module:
    """Return a module that computes what the gate's layer does, by its op."""
    return BY_OP[type(layer)](layer)


def gates_by_op(model: nn.Module) -> nn.Module:
    """Let every gate of the model run by its op, in place."""
    for name, layer in list(model.named_modules()):
        if type(layer) in BY_OP:
            model.set_submodule(name, by_op(layer))
    return model
