"""How a model is traced for a file: our ops as the torch ops they consist of, and nothing that depends on a free size.

Some operations of torch ask for the memory layout of their input, and the answer depends on whether a side is 1: torch
would tie the file to the example's case. Where sizes are free, these operations get a contiguous copy. In ONNX the copy
is no operation.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import takes_sizes_of_one
from ..attention_ops._graph.sizes import covering, is_surely, known
from ..attention_ops._op import REGISTERED

_ASKS_FOR_LAYOUT: set[Callable[..., Any]] = {
    torch.conv1d,
    torch.conv2d,
    F.linear,
    torch.flatten,
    torch.reshape,
    Tensor.flatten,
    Tensor.reshape,
}


_PRODUCTS: set[Callable[..., Any]] = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class SpelledOut(TorchFunctionMode):
    """Trace our ops as the torch ops they consist of, so that the file can be loaded without this package.

    `run_decompositions` after the export is not an alternative: it turns reshapes into views that are valid for one
    memory layout of attention's output, and torch returns another layout when gradients are recorded. It also runs
    Python code on symbols when nothing checks any more what they were compared with.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func).startswith("foveate."):
            with self:
                return REGISTERED[str(func).split(".")[1]](*args, **kwargs)
        if func in _PRODUCTS and takes_sizes_of_one() and args[0].dim() != args[1].dim():
            return _product(*args)
        if not args or not isinstance(args[0], Tensor) or known(*args[0].shape):
            return func(*args, **kwargs)
        if func is Tensor.contiguous:
            return _contiguous(args[0])
        if func in _ASKS_FOR_LAYOUT:
            return func(_contiguous(args[0]), *args[1:], **kwargs)
        if func is F.avg_pool2d:
            return _average(*args, **kwargs)
        if func is F.rms_norm and takes_sizes_of_one():
            return _rms_norm(*args, **kwargs)
        if func is F.adaptive_avg_pool2d and (*args, *kwargs.values())[1:] in ((1,), ((1, 1),)):
            return args[0].mean((2, 3), keepdim=True)
        return func(*args, **kwargs)


def _contiguous(x: Tensor) -> Tensor:
    """Copy to contiguous memory, unless the tensor is there for every size."""
    step = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not is_surely(stride == step):
            return torch.clone(x, memory_format=torch.contiguous_format)
        step = step * size
    return x


def _product(a: Tensor, b: Tensor) -> Tensor:
    """torch.matmul of tensors of different ranks, which asks whether free sizes are 1."""
    few, many = sorted((a, b), key=Tensor.dim)
    if few.dim() < 2 or (known(*a.shape) and known(*b.shape)):
        return torch.matmul(a, b)
    if few is b and b.dim() == 2:
        return torch.mm(_contiguous(a).flatten(0, -2), b).unflatten(0, tuple(a.shape[:-1]))
    few = few.expand(*many.shape[:-2], *few.shape[-2:])
    a, b = (_contiguous(x).flatten(0, -3) for x in ((few, many) if many is b else (many, few)))
    return torch.bmm(a, b).unflatten(0, tuple(many.shape[:-2]))


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """F.rms_norm, which asks how many numbers there are."""
    axes = tuple(range(-len(normalized_shape), 0))
    least = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + least)
    return out if weight is None else out * weight


def _average(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Pool by averages. Windows that overhang the map, of `ceil_mode`, are averaged by repeating the map's last tokens.

    torch's own formula asks whether the last window begins inside the map.
    """
    kernel, step = ((n, n) if isinstance(n, int) else tuple(n) for n in (kernel_size, stride or kernel_size))
    plain = kernel == step == (2, 2) and padding in (0, (0, 0)) and divisor_override is None
    if not (ceil_mode and plain):
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return F.avg_pool2d(_contiguous(x), *options)
    for axis in (2, 3):
        length = x.shape[axis]
        places = torch.arange(covering(length, 2) * 2, device=x.device).clamp(max=length - 1)
        x = x.index_select(axis, places)
    return F.avg_pool2d(_contiguous(x), 2)
