"""Arithmetic on the sizes of maps, which are numbers, or symbols where an exporter leaves them free.

A comparison of a symbol in an `if` ties the exported graph to the example's size. Nothing here compares a symbol, but
asks what is known of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..._torch import takes_sizes_of_one


def sides(x: Tensor, first: int = 1) -> tuple[int, int]:
    """Return the height and width of a map whose rows are dimension `first`: numbers under torch.jit.trace too."""
    height, width = x.shape[first], x.shape[first + 1]
    return (int(height), int(width)) if torch.jit.is_tracing() else (height, width)


def known(*lengths: int) -> bool:
    """Say whether all lengths are numbers."""
    return all(isinstance(length, int) for length in lengths)


def is_surely(condition: Any) -> bool:
    """Say whether a condition holds for every size that the symbols in it may have."""
    return statically_known_true(condition) if isinstance(condition, torch.SymBool) else bool(condition)


def covering(length: int, size: int) -> int:
    """Return how many pieces of `size` cover `length`."""
    count = length // size
    return count if is_surely(count * size == length) else (length + size - 1) // size


def pieces(length: int, size: int) -> int:
    """Return how many pieces of `size` to cut, where more than cover `length` do no harm.

    Unless torch is told not to, it ties a count that may be 1, or a padding that may be 0, to one of the two cases. A
    free length then gets at least two pieces, and some overhang.
    """
    return covering(length, size) if known(length) or takes_sizes_of_one() else length // size + 2


def to_multiple(length: int, size: int) -> int:
    """Return the smallest multiple of `size` that is not below `length`."""
    return covering(length, size) * size


def is_known(condition: Any) -> bool:
    """Say whether a condition on numbers holds; False for one on symbols, which has no answer yet."""
    return not isinstance(condition, torch.SymBool) and bool(condition)


def differs(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Say whether two shapes are known to differ."""
    return len(shape) != len(wanted) or any(is_known(a != b) for a, b in zip(shape, wanted, strict=True))


def pad_map(x: Tensor, height: int, width: int, channels: int = 1) -> Tensor:
    """Add zeros below and right of a map until it has this size, which may be its own.

    Args:
        channels: dimensions behind the map's columns.
    """
    own = sides(x, x.dim() - channels - 2)
    if is_surely(height == own[0]) and is_surely(width == own[1]):
        return x
    return F.pad(x, [*[0, 0] * channels, 0, width - own[1], 0, height - own[0]])


def pad_to_multiples(x: Tensor, rows: int, cols: int, channels: int = 1) -> Tensor:
    """Add zeros below and right of a map until its sides are multiples of `rows` and `cols`."""
    height, width = sides(x, x.dim() - channels - 2)
    return pad_map(x, to_multiple(height, rows), to_multiple(width, cols), channels)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Return the upper left part of a map (B, Y, X, ...), which it has."""
    size = sides(x)
    if is_surely(height == size[0]) and is_surely(width == size[1]):
        return x
    if known(height, width, *size):
        return x[:, :height, :width]
    rows, cols = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    index = (rows[:, None] * size[1] + cols).reshape(-1)  # a slice would ask which of two symbols is larger
    return x.flatten(1, 2).index_select(1, index).unflatten(1, (height, width))


def cover_map(x: Tensor, rows: int, cols: int) -> Tensor:
    """Add zeros below and right of (..., Y, X, d) until windows of `rows` x `cols` cover it; maybe more than do."""
    height, width = sides(x, x.dim() - 3)
    return pad_map(x, pieces(height, rows) * rows, pieces(width, cols) * cols)


def pad_to_least(x: Tensor, height: int, width: int) -> Tensor:
    """Add zeros below and right of (..., Y, X, d) until its sides are no shorter than these."""
    own = sides(x, x.dim() - 3)
    return pad_map(x, larger(own[0], height), larger(own[1], width))


def larger(a: int, b: int) -> int:
    """Return the larger of two sizes."""
    if known(a, b):
        return max(a, b)
    return torch.sym_max(a, b)  # type: ignore[return-value]  # a symbol passes for a number here


def smaller(a: int, b: int) -> int:
    """Return the smaller of two sizes."""
    if known(a, b):
        return min(a, b)
    return torch.sym_min(a, b)  # type: ignore[return-value]


def image_numbers(x: Tensor) -> Tensor:
    """Return (B,) int64: 0, 1, ... for the images of a batch. ExecuTorch makes an arange of free length a constant."""
    return x.new_ones((x.shape[0],), dtype=torch.int64).cumsum(0) - 1


def integers(*lengths: int) -> Any:
    """Return the library for arithmetic on positions: NumPy where all lengths are numbers, else torch.

    NumPy's results do not depend on what traces torch: they become constants of a graph (see `as_tensor`).
    """
    return np if known(*lengths) else torch


def as_tensor(values: Any, device: torch.device) -> Tensor:
    """Return an array as a constant of the graph; a tensor is moved to the device."""
    return (values if isinstance(values, Tensor) else torch.tensor(values)).to(device)
