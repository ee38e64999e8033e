"""Neighborhood attention on tiles: the torch body for CPUs.

The map is cut into tiles of queries; one key tile covers the neighborhoods of all queries of a tile, a mask says which
key each query sees. Dilation groups become maps apart, so one plan serves every dilation.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._attend import accumulator
from .tile_plan import SMALL_MASK, TilePlan, cached_tile_mask, positions, tile_plan
from .tiled_attention import TiledAttention, TiledAttentionLse
from .tiling import AxisTiling


class Neighborhood(NamedTuple):
    """The window that follows a query, or a group of `stride` queries, clamped at the border; (rows, columns)."""

    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    is_causal: tuple[bool, bool]
    stride: tuple[int, int] = (1, 1)

    def reach(self, axis: int, length: int, tile: int) -> tuple[int, int]:
        kernel, causal = self.kernel_size[axis], self.is_causal[axis]
        if not isinstance(length, int):
            return kernel - 1, 0 if causal else kernel - 1
        return _tightest_reach(length, kernel, self.dilation[axis], causal, self.stride[axis], tile)

    def axis_table(self, axis: int, length: int, tiling: AxisTiling, device: torch.device) -> Tensor:
        """Bool: the keys of its tile that a query of each group sees; none past the end."""
        kernel, dilation = self.kernel_size[axis], self.dilation[axis]
        group = torch.arange(dilation, device=device)[:, None, None, None]
        query, key = positions(tiling, device)
        group_length = (length - group + dilation - 1) // dilation
        causal = self.is_causal[axis]
        start = first_key(query, group_length, kernel, causal, self.stride[axis])
        seen = (key >= start) & ((key <= query) if causal else (key < start + kernel))
        return seen & (query < group_length)

    def seen(self, rows: Tensor, cols: Tensor) -> Tensor:
        return rows & cols

    def sees_all(self, size: tuple[int, int]) -> bool:
        windows = zip(size, self.kernel_size, self.dilation, strict=True)
        return not any(self.is_causal) and all(length == kernel * dilation for length, kernel, dilation in windows)


def first_key(rank: Tensor, length: Tensor, kernel: int, causal: bool, stride: int) -> Tensor:
    """Return the rank of the first key that queries see, in dilation groups of `length` tokens."""
    leader = rank if stride == 1 else rank // stride * stride + (stride - 1 if causal else stride // 2)
    if causal:
        return (leader.minimum(length - 1) - kernel + 1).clamp(min=0)
    return (leader - kernel // 2).clamp(min=0).minimum(length - kernel)


@lru_cache(maxsize=256)
def axis_intervals(length: int, kernel: int, causal: bool, stride: int) -> tuple[tuple[int, int], ...]:
    """Return the ranks [first, last) that each query of one dilation group sees."""
    place = stride - 1 if causal else stride // 2
    leaders = [min(rank // stride * stride + place, length - 1) for rank in range(length)]
    if causal:
        return tuple((max(leader - kernel + 1, 0), rank + 1) for rank, leader in enumerate(leaders))
    starts = (min(max(leader - kernel // 2, 0), length - kernel) for leader in leaders)
    return tuple((start, start + kernel) for start in starts)


@lru_cache(maxsize=256)
def _tightest_reach(length: int, kernel: int, dilation: int, causal: bool, stride: int, tile: int) -> tuple[int, int]:
    """The fewest keys before and after any tile that cover the neighborhoods of its queries."""
    before = after = 0
    for group_length in {(length - g + dilation - 1) // dilation for g in (0, dilation - 1)}:
        for rank, (start, end) in enumerate(axis_intervals(group_length, kernel, causal, stride)):
            first = rank // tile * tile
            before = max(before, first - start)
            after = max(after, end - first - tile)
    return before, after


def neighborhood_attention_tiled(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float
) -> Tensor:
    """Tiles of queries against the one key tile that covers their neighborhoods; dilation groups are maps apart."""
    body, bias = _body_and_bias(q, rpb, neighborhood, scale)
    return body(q, k, v, bias)


def _body_and_bias(
    q: Tensor,
    rpb: Tensor | None,
    neighborhood: Neighborhood,
    scale: float,
    kind: type[TiledAttention] = TiledAttention,
) -> tuple[TiledAttention, Tensor | None]:
    size = (q.shape[1], q.shape[2])
    plan = tile_plan(neighborhood, size)
    mask = cached_tile_mask(neighborhood, size, plan, q.device, accumulator(q.dtype) if rpb is None else None)
    bias = None if rpb is None else _tile_bias(rpb, _cached_cells(neighborhood, size, plan, q.device))
    return kind(plan, mask, scale), bias


def tile_biases(q: Tensor, rpb: Tensor, neighborhood: Neighborhood, most: int) -> tuple[Tensor, Tensor] | None:
    """Return bias and mask of `neighborhood_attention_biased` for maps like q; None above `most` numbers."""
    plan = tile_plan(neighborhood, (q.shape[1], q.shape[2]))
    if q.shape[3] * plan.logits > most:
        return None
    body, bias = _body_and_bias(q, rpb, neighborhood, 1.0)
    additive = body.additive_mask(bias, q.dtype)
    return None if bias is None or additive is None else (bias, additive)


def neighborhood_attention_biased(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, additive: Tensor, neighborhood: Neighborhood, scale: float
) -> Tensor:
    """The tiled body for inference with a constant bias, which `tile_biases` laid out beforehand."""
    size = (q.shape[1], q.shape[2])
    plan = tile_plan(neighborhood, size)
    mask = cached_tile_mask(neighborhood, size, plan, q.device, None)
    return TiledAttention(plan, mask, scale, additive).forward(q, k, v, bias)


def neighborhood_attention_lse_tiled(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """The same tiles; also the log-sum-exp of the logits of every query."""
    body, bias = _body_and_bias(q, rpb, neighborhood, scale, TiledAttentionLse)
    return body(q, k, v, bias)


def _tile_bias(rpb: Tensor, cells: Tensor) -> Tensor:
    """(heads, query tokens, key tokens): the bias of every pair of a tile, the same for all tiles."""
    return rpb.flatten(1)[:, cells]


def _cells(neighborhood: Neighborhood, plan: TilePlan, device: torch.device) -> Tensor:
    """(query tokens, key tokens): the cell of the flattened table that a pair uses; arbitrary for masked pairs."""
    of_axis = []
    for tiling, kernel in zip(plan[:2], neighborhood.kernel_size, strict=True):
        query = torch.arange(tiling.tile, device=device)[:, None]
        key = torch.arange(tiling.keys, device=device) - tiling.before
        of_axis.append((key - query + kernel - 1).clamp(0, 2 * kernel - 2))
    rows, cols = of_axis
    cells = rows[:, None, :, None] * (2 * neighborhood.kernel_size[1] - 1) + cols[None, :, None, :]  # (qy, qx, ky, kx)
    return cells.flatten(2, 3).flatten(0, 1)


def _cached_cells(neighborhood: Neighborhood, size: tuple[int, int], plan: TilePlan, device: torch.device) -> Tensor:
    small = plan.rows.tile * plan.cols.tile * plan.rows.keys * plan.cols.keys <= SMALL_MASK
    return _small_cells(neighborhood, size, device) if small else _cells(neighborhood, plan, device)


@lru_cache(maxsize=32, typed=True)
def _small_cells(neighborhood: Neighborhood, size: tuple[int, int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made first during inference, it must serve training too
        return _cells(neighborhood, tile_plan(neighborhood, size), device)
