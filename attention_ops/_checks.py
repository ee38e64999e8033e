"""Checks and reasons that all ops share, so that one fault has one wording."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels._launch import LEAST_SCALE, MOST_HEAD_DIM, why_no_triton
from ._graph.sizes import differs, is_known

T = TypeVar("T", int, bool)
_NUMBERS = (int, torch.SymInt)  # bool is an int


def pair(op: str, name: str, value: T | Sequence[T]) -> list[T]:
    """Return an int or bool as [value, value], and a pair as a list."""
    if torch.jit.is_tracing() and isinstance(value, Sequence):  # the tracer's sizes are tensors
        value = [int(v) if isinstance(v, Tensor) else v for v in value]
    both = [value, value] if isinstance(value, _NUMBERS) else list(value) if isinstance(value, Sequence) else []
    if len(both) == 2 and isinstance(both[0], _NUMBERS) and isinstance(both[1], _NUMBERS):
        return both
    raise ValueError(f"{op}: {name} must be an int or a pair (rows, columns), got {value!r}")


def check_at_least(op: str, name: str, values: Sequence[int], least: int) -> None:
    """Raise ValueError where one of the values is below `least`."""
    for value in values:
        if is_known(value < least):
            raise ValueError(f"{op}: {name} must be at least {least}, got {tuple(values)}")


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, value_dim: bool = False) -> None:
    """Raise ValueError unless q, k, v are (B, H, W, heads, head_dim) of one shape, floating dtype and device.

    Args:
        value_dim: whether v may have another head_dim.
    """
    shape = q.shape
    if len(shape) != 5:
        raise ValueError(f"{op}: q must be (B, H, W, heads, head_dim), got shape {tuple(shape)}")
    if k.shape != shape:
        raise ValueError(f"{op}: k must have the shape of q {tuple(shape)}, got {tuple(k.shape)}")
    if value_dim:
        if v.dim() != 5 or v.shape[:4] != shape[:4]:
            raise ValueError(f"{op}: v must be {(*shape[:4], 'value_dim')} as q, got {tuple(v.shape)}")
    elif v.shape != shape:
        raise ValueError(f"{op}: v must have the shape of q {tuple(shape)}, got {tuple(v.shape)}")
    check_alike(op, q=q, k=k, v=v)
    for size in (*shape[1:], v.shape[4]):  # one by one: no guard between two symbols of a tracer
        if is_known(size < 1):
            raise ValueError(f"{op}: H, W, heads and head_dim must be at least 1, got shape {tuple(shape)}")


def check_tokens(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q is (B, Nq, heads, d), k (B, Nk, heads, d) and v (B, Nk, heads, dv), alike in dtype."""
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be (B, Nq, heads, head_dim), got shape {tuple(q.shape)}")
    (batch, _, heads, dim), wanted = q.shape, (q.shape[0], "Nk", *q.shape[2:])
    if k.dim() != 4 or differs((k.shape[0], *k.shape[2:]), (batch, heads, dim)):
        raise ValueError(f"{op}: k must be {wanted} as q, got {tuple(k.shape)}")
    if v.dim() != 4 or differs(v.shape[:3], k.shape[:3]):
        raise ValueError(f"{op}: v must be {(*k.shape[:3], 'value_dim')} as k, got {tuple(v.shape)}")
    check_alike(op, q=q, k=k, v=v)
    for size in (*q.shape[1:], k.shape[1], v.shape[3]):
        if is_known(size < 1):
            raise ValueError(
                f"{op}: tokens, heads and widths must be at least 1, got {tuple(q.shape)}, {tuple(v.shape)}"
            )


def check_alike(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors have the floating dtype and the device of the first."""
    first, x = next(iter(tensors.items()))
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: {', '.join(tensors)} must be floating point, got {dtype}")
    for name, t in tensors.items():
        if t.dtype != dtype:
            raise ValueError(f"{op}: {name} must have the dtype of {first} {dtype}, got {t.dtype}")
        if t.device != device:
            check_device(op, name, t, first, x)


def check_device(op: str, name: str, t: Tensor | None, first: str, x: Tensor) -> None:
    """Raise ValueError where `t` is given and on another device than `x`."""
    if t is not None and t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of {first} {x.device}, got {t.device}")


# Reasons why no kernel can run, for all ops

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_ELEMENTS = 2**31 - 1  # of one image: kernels count them in int32


def why_no_kernel(*tensors: Tensor) -> str | None:
    """Return the reason why no kernel can run on maps (B, ...), or None. Each op adds its own reasons."""
    x = tensors[0]
    if (reason := why_no_triton(x)) is not None:
        return reason
    if x.dtype not in _KERNEL_DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _KERNEL_DTYPES)
        return f"the kernels take {known}, got {x.dtype}"
    for t in tensors:
        span, shape, strides = 0, t.shape, t.stride()
        for axis in range(1, len(strides)):
            span += (shape[axis] - 1) * strides[axis]
        if span > _MOST_ELEMENTS:
            return f"one image spans more than {_MOST_ELEMENTS} elements in memory"
    return None


def why_no_attention_kernel(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return the reason why no attention kernel can run on q, k, v (B, H, W, heads, head_dim), or None."""
    if (widest := max(q.shape[-1], v.shape[-1])) > MOST_HEAD_DIM:
        return f"the kernels take a head_dim of at most {MOST_HEAD_DIM}, got {widest}"
    return why_no_kernel(q, k, v)


def why_no_local_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Return the reason why the kernels of kernels/local cannot run on these tensors, or None."""
    if scale < LEAST_SCALE:
        return f"the kernels need a scale of at least {LEAST_SCALE}, got {scale}"
    return why_no_attention_kernel(q, k, v)
