"""Layers that timm has not, or not as fast."""

from collections.abc import Callable, Sequence

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
    timm's HaloNets do without: under weights that amplify rounding it moved logits by 5e-5 of their deviation.
    Gradients in eval mode keep the order of sums that timm's networks have, and can be compared with theirs: where a
    ReLU's input is zero but for rounding, another order moves single gradients by a hundredth.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.laid_out(x), self.weight, self.bias)

    def laid_out(self, x: Tensor) -> Tensor:
        rounding_may_change = self.training or not torch.is_grad_enabled()
        return x.contiguous(memory_format=torch.channels_last) if rounding_may_change and not x.is_cuda else x


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


def cpu_inference(x: Tensor) -> bool:
    """Say whether `x` is a real tensor on a CPU whose gradient nobody will ask for: no tracer, no compiler."""
    traced = type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (traced or x.is_cuda or torch.is_grad_enabled())


def hooked(module: nn.Module) -> bool:
    """Say whether somebody may look at what the module takes or gives."""
    everywhere = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    )


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
            return torch.ops.aten.gelu_(x) if cpu_inference(x) and not hooked(self._layer[0]) else F.gelu(x)


class BiasLastLinear(nn.Linear):
    """nn.Linear that in CPU inference adds its bias to the product, in place.

    PyTorch writes the bias into every row of the output and adds the product to that: 6272 rows from 96 to 384 channels
    took 1.97 ms so and 1.65 ms this way, 1568 from 384 to 1536 6.04 and 5.54 ms; a whole DaViT-T gains a thirtieth (as
    above).
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        else:
            plain = type(self.weight) is nn.Parameter and self.bias is not None  # no quantized or sparse weight
            if plain and cpu_inference(x) and not torch.is_autocast_enabled("cpu"):
                return torch.matmul(x, self.weight.t()).add_(self.bias)
            return F.linear(x, self.weight, self.bias)


def add_biases_last(module: nn.Module) -> None:
    """Make every nn.Linear inside a `BiasLastLinear`; layers and parameters stay the objects that they are."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = BiasLastLinear


# glibc maps anything above 32 MB anew at every call, and the kernel clears its pages: a block of VAN-B0's first stage
# took 33 ms for 8 images at once (26 MB of hidden channels) and 12 ms for 4 and 4; VAN-B1's 67 and 33 ms (as above).
CHUNK_BYTES = 12 << 20


def by_images(f: Callable[[Tensor], Tensor], x: Tensor, hidden_numel: int) -> Tensor:
    """Return f(x), on a CPU without gradients a few images at a time, so that what `f` makes stays small.

    Args:
        f: treats every image alone, batch first.
        x: the batch; under a tracer or compiler it passes whole.
        hidden_numel: elements of the largest tensor that `f` makes for one image.
    """
    if not cpu_inference(x):
        return f(x)
    images = max(1, CHUNK_BYTES // (hidden_numel * x.element_size()))
    if len(x) <= images:
        return f(x)
    parts = x.split(images)
    first = f(parts[0])
    by_pixel = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if by_pixel else torch.contiguous_format
    shape = (len(x), *first.shape[1:])  # joining parts at the end would hold all of them beside the result
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    places = out.split(images)
    places[0].copy_(first)
    for place, part in zip(places[1:], parts[1:], strict=True):
        place.copy_(f(part))
    return out


def batch_matters(*modules: nn.Module) -> bool:
    """Say whether a layer inside must see the batch whole: one in training mode, as a BatchNorm, or a hooked one."""
    return any(layer.training or hooked(layer) for module in modules for layer in module.modules())


def layers_by_images(layers: Sequence[Callable[[Tensor], Tensor]], images: Tensor, values_per_pixel: int) -> Tensor:
    """Run a network's first layers one after the other, in CPU inference on a few images at a time.

    8 images of 256 px took 474 ms through halonet26t and 328 ms so; 8 of 224 px through MobileNetV2 97 and 67 ms
    (2 threads of a Xeon with AVX-512, torch 2.15).

    Args:
        layers: those whose maps are large; they treat every image alone (see `batch_matters`).
        images: (B, C, H, W).
        values_per_pixel: of their largest map, for a pixel of the image.
    """

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return by_images(run, images, values_per_pixel * images.shape[2] * images.shape[3])


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
