"""Gradients of q, k and v where these are slices of one tensor, as a projection gives them: slices of one too."""

from itertools import pairwise

import torch
from torch import Tensor


def step_between(slices: tuple[Tensor, ...]) -> int | None:
    """Return how many elements of one storage lie between every slice and the next; None where that is no number."""
    first = slices[0]
    place, like = first.untyped_storage().data_ptr(), (first.shape, first.stride(), first.dtype)
    if any(x.untyped_storage().data_ptr() != place or (x.shape, x.stride(), x.dtype) != like for x in slices[1:]):
        return None
    offsets = [x.storage_offset() for x in slices]
    steps = {after - before for before, after in pairwise(offsets)}
    step = steps.pop() if len(steps) == 1 else 0
    return step if step > 0 else None


def separate(*maps: Tensor) -> tuple[Tensor, ...]:
    """Return uninitialized contiguous tensors of the shapes of `maps`."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps)


def together(*maps: Tensor) -> tuple[Tensor, ...] | None:
    """Return uninitialized slices of one buffer, as `maps` are of theirs, in any order; None where they fill none.

    Their last dimension is contiguous. The dispatcher does not allow an op to return tensors that share memory.
    """
    order = sorted(range(len(maps)), key=lambda i: maps[i].storage_offset())
    step = step_between(tuple(maps[i] for i in order))
    shape, strides = (len(maps), *maps[0].shape), (step or 0, *maps[0].stride())
    if strides[-1] != 1 or not _is_dense(shape, strides):
        return None
    buffer = torch.empty_strided(shape, strides, dtype=maps[0].dtype, device=maps[0].device)
    return tuple(buffer[order.index(i)] for i in range(len(maps)))


def empty_gradients(*maps: Tensor, packed: bool) -> tuple[Tensor, ...]:
    """Return uninitialized gradients of `maps`: in one buffer where `packed` allows it and they fill one."""
    return (together(*maps) if packed else None) or separate(*maps)


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Say whether each element has a place of its own, and no place is left over."""
    length = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != length:
            return False
        length *= size
    return True
