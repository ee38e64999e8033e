"""q, k and v of a packed projection, whose gradients need no stacking where a kernel wrote them to one buffer."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels._launch import in_eager_mode, why_no_triton
from ..kernels.packed import step_between


def unpack(x: Tensor, dim: int) -> list[Tensor]:
    """Return the slices of `x` along `dim`, as `Tensor.unbind` does.

    Where Triton kernels run on `x`, in eager mode, gradients that the kernels wrote to one buffer of the layout of `x`
    are returned as that buffer. Others are stacked, which copies them: `unbind` always does.
    """
    if torch.jit.is_scripting():
        return list(x.unbind(dim))
    else:  # TorchScript compiles the first branch only
        return _slices(x, dim)


def _slices(x: Tensor, dim: int) -> Any:
    """A torch.fx.Proxy is returned as it is: the caller iterates over it."""
    return list(_Unpack.apply(x, dim)) if _has_own_gradient(x) else x.unbind(dim)


def _has_own_gradient(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    return x.requires_grad and torch.is_grad_enabled() and why_no_triton(x) is None and in_eager_mode((x,))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return x.unbind(dim)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        packed = None if torch.is_grad_enabled() else _buffer_of(grads, ctx.dim)
        return torch.stack(grads, ctx.dim) if packed is None else packed, None


def _buffer_of(slices: tuple[Tensor, ...], dim: int) -> Tensor | None:
    """Return the tensor that `slices` are, in their order along `dim`; None where memory does not hold it."""
    first, step = slices[0], step_between(slices)
    if step is None:
        return None
    dim %= first.ndim + 1
    shape, strides = list(first.shape), list(first.stride())
    shape.insert(dim, len(slices))
    strides.insert(dim, step)
    return first.as_strided(shape, strides)
