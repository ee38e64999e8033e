"""oneDNN's convolutions and products with fused epilogues, as torch's own compiler calls them.

They belong to no public interface: every one is tried once against plain torch before it is used, and a build of torch
that lacks one, or answers something else, runs without. Maps are (B, C, H, W), channels-last in memory.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiling import on_dilation_groups


class Activation(NamedTuple):
    """An elementwise function, in oneDNN's terms."""

    name: str
    numbers: tuple[float, ...] = ()
    algorithm: str = ""


class Place(NamedTuple):
    """Where a convolution's taps lie."""

    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


NONE, RELU, SILU, GELU = Activation("none"), Activation("relu"), Activation("swish"), Activation("gelu", (), "none")
RELU6 = Activation("hardtanh", (0.0, 6.0))
POINT = Place((0, 0), (1, 1), (1, 1), 1)


def pack(weight: Tensor, place: Place, input_size: Sequence[int]) -> Tensor:
    """Lay a convolution's weight out as oneDNN wants it for inputs of one size (B, C, H, W)."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, place.padding, place.stride, place.dilation, place.groups, list(input_size)
    )


# The functions below are called from generated code: `place` and `activation` are taken as plain tuples too.


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, place: Place, activation: Activation) -> Tensor:
    """Convolution, bias and activation in one pass; a new (B, D, H', W'), channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *place, *activation)


def convolve_groups(
    x: Tensor, weight: Tensor, bias: Tensor | None, place: Place, activation: Activation, dilation: tuple[int, int]
) -> Tensor:
    """Convolution of every dilation group of x, as `convolve`; `place` is that of a group: it has no dilation."""
    return on_dilation_groups(x, dilation, lambda group: convolve(group, weight, bias, place, activation))


def convolve_onto(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: Place,
    activation: Activation,
    other: Tensor,
    operation: str = "add",
    in_place: bool = False,
) -> Tensor:
    """activation(convolution + other), or the convolution times other, in one pass.

    Args:
        other: (B, D, H', W').
        operation: "add" or "mul".
        in_place: write into `other` where it lies channels-last, for "add"; else the answer is a new tensor.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    name, numbers, algorithm = activation
    tail = (*place, operation, 1.0, None if name == "none" else name, numbers, algorithm)
    if in_place and other.is_contiguous(memory_format=torch.channels_last):
        return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, weight, bias, *tail)
    other = other.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, other, weight, bias, *tail)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """(..., K) times a packed (N, K, 1, 1), bias and activation in one pass: (..., N)."""
    return from_image(convolve(as_image(x), weight, bias, POINT, activation), x.shape)


def multiply_onto(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    other: Tensor,
    operation: str = "add",
    in_place: bool = False,
) -> Tensor:
    """activation(product + other), or the product times other, as in `convolve_onto`; other is (..., N)."""
    in_place = in_place and other.is_contiguous()
    image = convolve_onto(as_image(x), weight, bias, POINT, activation, as_image(other), operation, in_place)
    return from_image(image, x.shape)


def as_image(x: Tensor) -> Tensor:
    """View (..., K) as the image (1, K, 1, rows) whose 1x1 convolution is a product with a (N, K) matrix."""
    return x.contiguous().view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def from_image(image: Tensor, shape: Sequence[int]) -> Tensor:
    """View the image (1, N, 1, rows) as (..., N), where `shape` is that of the (..., K) before."""
    return image.permute(0, 2, 3, 1).view(*shape[:-1], image.shape[1])


@lru_cache
def works(dtype: torch.dtype) -> bool:
    """Try every call above against plain torch, once; say whether this build has them and computes the same."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return _agrees(dtype)
    except (RuntimeError, AttributeError, TypeError):
        return False


@torch.no_grad()
def _agrees(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 8, 6, 5), (16, 8, 3, 3), (16,), (2, 16, 6, 5))
    x, weight, bias, other = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    place = Place((1, 1), (1, 1), (1, 1), 1)
    x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
    packed = pack(weight, place, x.shape)
    plain = F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    tried = [
        (convolve(x, packed, bias, place, GELU), F.gelu(plain)),
        (convolve(x, packed, bias, place, RELU), plain.relu()),
        (convolve(x, packed, bias, place, SILU), F.silu(plain)),
        (convolve(x, packed, bias, place, RELU6), F.relu6(plain)),
        (convolve_onto(x, packed, bias, place, RELU, other), (plain + other.float()).relu()),
        (convolve_onto(x, packed, bias, place, NONE, other, "mul"), plain * other.float()),
        (convolve_onto(x, packed, bias, place, NONE, other.clone(), "add", True), plain + other.float()),
    ]
    rows = torch.randn(7, 8, generator=generator).to(dtype)
    matrix = weight[:, :, 0, 0]
    product = multiply(rows, pack(matrix[:, :, None, None], POINT, (1, 8, 1, 7)), bias, NONE)
    tried.append((product, F.linear(rows.float(), matrix.float(), bias.float())))
    most = 1e-5 if dtype == torch.float32 else 3e-2
    return all(torch.allclose(out.float(), wanted, rtol=most, atol=most * 8) for out, wanted in tried)
