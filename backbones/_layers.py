"""Layers that timm has not, or not as fast."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import register_notrace_module
from torch import Tensor, nn


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Layer scale, where there is one."""
    return x if gamma is None else x * gamma


class MapGELU(nn.Module):
    """Exact GELU of a (B, C, H, W) map that lies channels-last in memory.

    PyTorch has oneDNN's GELU for contiguous tensors only; seen as (B, H, W, C) the map is one. 8 x 256 x 56 x 56 took
    1.6 ms so and 3.5 ms otherwise (2 threads of a Xeon with AVX-512, torch 2.15); a whole VAN-B0 gains a tenth.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@register_notrace_module
class ImageConv2d(nn.Conv2d):
    """A network's first convolution: on a CPU it makes its map channels-last in memory, and what follows keeps that.

    For networks of timm's classes. ResNet-50 gains a sixth so, MobileNetV2 a third (2 threads of a Xeon with AVX-512).
    HaloNets do without: under weights that amplify rounding it moved their logits by 5e-5 of their deviation.
    Gradients in eval mode keep the order of sums that timm's networks have, and can be compared with theirs: where a
    ReLU's input is zero but for rounding, another order moves single gradients by a hundredth.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda and (self.training or not torch.is_grad_enabled()):
            x = x.contiguous(memory_format=torch.channels_last)
        return self._conv_forward(x, self.weight, self.bias)


def take_images_channels_last(model: nn.Module) -> None:
    """Put an `ImageConv2d` with the same parameters in the place of the model's first convolution."""
    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    with torch.device("meta"):
        ours = ImageConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
        )
    ours.weight, ours.bias = conv.weight, conv.bias
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, ours)


def _cpu_inference(x: Tensor) -> bool:
    """Say whether `x` is a real tensor on a CPU whose gradient nobody will ask for: no tracer, no compiler."""
    traced = type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (traced or x.is_cuda or torch.is_grad_enabled())


class OverwritingGELU(nn.GELU):
    """Exact GELU of a layer's output, which in CPU inference takes that output's memory for its own.

    A second hidden tensor costs more than the GELU: the system clears every page that it hands out. Where somebody
    hooked the layer, and may have kept its output, that stays as it is.

    Args:
        layer: whose output this takes; nobody else must read it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no part of this module

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.gelu(x)
        else:
            hooked = self._layer[0]._forward_hooks or torch.nn.modules.module._global_forward_hooks
            return torch.ops.aten.gelu_(x) if _cpu_inference(x) and not hooked else F.gelu(x)


# glibc maps anything above 32 MB anew at every call, and the kernel clears its pages: a block of VAN-B0's first stage
# took 33 ms for 8 images at once (26 MB of hidden channels) and 12 ms for 4 and 4; VAN-B1's 67 and 33 ms (as above).
CHUNK_BYTES = 12 << 20


def by_images(f: Callable[[Tensor], Tensor], x: Tensor, hidden_numel: int) -> Tensor:
    """Return f(x), on a CPU without gradients a few images at a time, so that what `f` makes stays small.

    Args:
        f: a map from (B, ...) to the same shape that treats every image alone.
        x: the batch; under a tracer or compiler it passes whole.
        hidden_numel: elements of the largest tensor that `f` makes for one image.
    """
    if not _cpu_inference(x):
        return f(x)
    images = max(1, CHUNK_BYTES // (hidden_numel * x.element_size()))
    if len(x) <= images:
        return f(x)
    parts = x.split(images)
    first = f(parts[0])
    out = torch.empty_like(x, dtype=first.dtype)  # joining parts at the end would hold all of them beside the result
    places = out.split(images)
    places[0].copy_(first)
    for place, part in zip(places[1:], parts[1:], strict=True):
        place.copy_(f(part))
    return out


class MapMlp(Mlp):
    """timm's MLP on maps, (B, H, W, C), or (B, C, H, W) with `use_conv`; CPU inference takes a few images at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.mix(x)
        else:
            hidden_dim, dim = self.fc1.weight.shape[:2]
            return by_images(self.mix, x, x.shape[1] * x.shape[2] * x.shape[3] // dim * hidden_dim)

    def mix(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class DepthwiseMlp(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, Linear on (B, H, W, C) maps; CPU inference as `MapMlp`."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.mix(x)
        else:
            return by_images(self.mix, x, x.shape[1] * x.shape[2] * self.fc1.weight.shape[0])

    def mix(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(x))))
