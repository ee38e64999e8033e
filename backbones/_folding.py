"""Norms at rest folded into the convolutions beside them, for CPU inference.

The weights are made anew at every call, so they may change in between; where a map is large, writing it once in place
of twice pays for that. Without and with folding 8 images took ECA-MobileNetV2 80 and 50 ms, ELA-MobileNetV2 81 and 66
ms (224 px), HaloNet-H1 522 and 508 ms (256 px; 2 threads of a Xeon with AVX-512, torch 2.15).
"""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ._layers import ImageConv2d, cpu_inference, hooked

LEAST_FOLDED = 1 << 18  # elements of a map; folding takes twenty small operations, as long as the norms of such a map
LEAST_REUSE = 2  # elements of the map for each weight that is multiplied


def slope_and_offset(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm at rest does: slope * x + offset, both (C,)."""
    slope = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return slope, norm.bias - slope * norm.running_mean


def at_rest(x: Tensor, *modules: nn.Module) -> bool:
    """Say whether this is CPU inference in full precision, and the modules neither train nor are looked at."""
    if not cpu_inference(x) or torch.is_autocast_enabled("cpu"):  # first: a tracer asks no more
        return False
    return x.dtype in (torch.float32, torch.float64) and not any(m.training or hooked(m) for m in modules)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Return norm(conv(x)); CPU inference folds the norm where that pays.

    Args:
        conv: any module; folding wants a plain nn.Conv2d (or `ImageConv2d`) with a BatchNorm behind it.
        norm: may have an activation, as timm's, or be a Sequential whose first layer is the norm.
    """
    if type(norm) is nn.Sequential and not hooked(norm):
        x = conv_norm(conv, norm[0], x)
        for layer in list(norm)[1:]:
            x = layer(x)
        return x
    if not _can_fold(conv, norm, x):
        return norm(conv(x))
    slope, offset = slope_and_offset(norm)
    if conv.bias is not None:
        offset = offset + slope * conv.bias
    if isinstance(conv, ImageConv2d):
        x = conv.laid_out(x)
    x = conv._conv_forward(x, conv.weight * slope[:, None, None, None], offset)
    return norm.act(x) if isinstance(norm, BatchNormAct2d) else x


def _can_fold(conv: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    if not at_rest(x, conv, norm):
        return False
    if type(conv) not in (nn.Conv2d, ImageConv2d) or type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
        return False
    if type(conv.weight) is not nn.Parameter or norm.running_var is None or norm.weight is None:
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    return pixels * conv.out_channels >= max(LEAST_FOLDED, LEAST_REUSE * conv.weight.numel())
