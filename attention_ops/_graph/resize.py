"""Resizing and pooling of maps as products with small matrices, for exporters and free sizes.

Few runtimes have adaptive pooling to a size that does not divide the map, and torch asks a free size whether it does. A
product with a matrix of weights is in all of them; the matrix is a constant where sizes are numbers.
"""

from typing import Any

import torch
from torch import Tensor

from .sizes import as_tensor, integers, sides


def resize_by_products(x: Tensor, height: int, width: int, cubic: bool = False) -> Tensor:
    """F.interpolate(x, (height, width), mode="bilinear" or "bicubic", align_corners=False) of (B, C, H, W)."""
    rows, cols = sides(x, 2)
    return _both(x, _resizing(rows, height, cubic), _resizing(cols, width, cubic))


def pool_by_products(x: Tensor, rows: int, cols: int) -> Tensor:
    """F.adaptive_avg_pool2d(x, (rows, cols)) of (B, C, H, W)."""
    height, width = sides(x, 2)
    return _both(x, _pooling(height, rows), _pooling(width, cols))


def _both(x: Tensor, of_rows: Any, of_cols: Any) -> Tensor:
    of_rows, of_cols = (as_tensor(weights, x.device).to(x.dtype) for weights in (of_rows, of_cols))
    return _times(_times(x, of_cols).transpose(2, 3), of_rows).transpose(2, 3)


def _times(x: Tensor, weights: Tensor) -> Tensor:
    """(..., K), (N, K) -> (..., N): F.linear without a bias asks whether a free size is 1."""
    return torch.mm(x.flatten(0, -2), weights.t()).unflatten(0, tuple(x.shape[:-1]))


def _pooling(length: int, cells: int) -> Any:
    """(cells, length): the weight of every place in the mean of a cell."""
    xp = integers(length, cells)
    cell, place = xp.arange(cells)[:, None], xp.arange(length)
    start, stop = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    return ((place >= start) & (place < stop)) / (stop - start)


def _resizing(length: int, wanted: int, cubic: bool) -> Any:
    """(wanted, length): the weight of every place in a new one."""
    xp = integers(length, wanted)
    source = (xp.arange(wanted) + 0.5) * (length / wanted) - 0.5
    source = source if cubic else source.clip(0, None)
    first = xp.floor(source)
    weights, place = 0.0, xp.arange(length)
    for tap in (-1, 0, 1, 2) if cubic else (0, 1):
        at = (first + tap).clip(0, length - 1)[:, None]
        weights = weights + (at == place) * _weight(xp.abs(source - first - tap), cubic)[:, None]
    return weights


def _weight(distance: Any, cubic: bool) -> Any:
    """The weight at a distance below 1 (bilinear), or below 2: Keys' cubic convolution with a = -0.75, torch's."""
    if not cubic:
        return 1 - distance
    near = ((1.25 * distance - 2.25) * distance) * distance + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    return near * (distance <= 1) + far * (distance > 1)
