"""Neighborhood and circular attention for exporters and compilers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import assume
from ..neighborhood_cpu import Neighborhood
from ..tile_plan import LocalPattern, tile_plan
from .sizes import as_tensor, covering, integers, known, pieces, sides, smaller
from .tiles import Axis, Cut, attend_tiles, cut_axis, join_tables

FREE_TILE = 8  # queries of a tile on an axis of any length


def cut_map(pattern: LocalPattern, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Cut both axes as the tiled body does; an axis of any length gets tiles that are right for every length."""
    if known(*size):
        plan = tile_plan(pattern, size)
        tilings = [(t.tile, t.tiles, t.keys, t.before, False) for t in (plan.rows, plan.cols)]
    else:
        tilings = [_free_tiling(pattern, axis, size[axis]) for axis in (0, 1)]
    rows, cols = (cut_axis(size[axis], pattern.dilation[axis], *tilings[axis]) for axis in (0, 1))
    return rows, cols


def _free_tiling(pattern: LocalPattern, axis: int, length: int) -> tuple[int, int, int, int, bool]:
    tiles, (before, after) = pieces(covering(length, pattern.dilation[axis]), FREE_TILE), pattern.reach(axis, length, 1)
    if not isinstance(pattern, Neighborhood) or pattern.is_causal[axis] or pattern.stride[axis] > 1:
        return FREE_TILE, tiles, before + FREE_TILE + after, before, False
    kernel = pattern.kernel_size[axis]  # the windows of neighbors overlap in all but one key, also at the border
    return FREE_TILE, tiles, FREE_TILE + kernel - 1, kernel // 2, True


# Neighborhoods


def neighborhood_attention_graph(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float
) -> Tensor:
    """Attend by differentiable operations; the mask becomes part of a traced graph."""
    return _neighborhood(q, k, v, rpb, neighborhood, scale, False)


def neighborhood_attention_lse_graph(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by differentiable operations; also the log-sum-exp."""
    return _neighborhood(q, k, v, rpb, neighborhood, scale, True)


def _neighborhood(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float, returns_lse: bool
) -> Any:
    axes = cut_map(neighborhood, sides(q))
    kinds = zip(axes, neighborhood.kernel_size, neighborhood.stride, neighborhood.is_causal, strict=True)
    seen = [_seen(*kind) for kind in kinds]
    for axis, kernel, dilation in zip(axes, neighborhood.kernel_size, neighborhood.dilation, strict=True):
        assume(axis.length >= kernel * dilation)
    hides = not known(*sides(q)) or not all(t.all() for t in seen)
    joined = _both(seen, q.device) if hides else None
    bias = None if rpb is None else tile_bias(rpb, axes, neighborhood.kernel_size)
    return attend_tiles(q, k, v, Cut(*axes, joined), bias, scale, returns_lse)


def neighborhood_attention_up_to(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, kernel_size: Sequence[int], scale: float
) -> Tensor:
    """Attend to neighborhoods that shrink to the map where it is smaller, for maps of any size: one tile is the map."""
    size = sides(q)
    rows, cols = (cut_axis(length, 1, length, 1, length, 0) for length in size)
    least = [smaller(kernel, length) for kernel, length in zip(kernel_size, size, strict=True)]
    seen = [_seen(axis, kernel, 1, False) for axis, kernel in zip((rows, cols), least, strict=True)]
    joined = _both(seen, q.device)
    bias = tile_bias(rpb, (rows, cols), kernel_size)
    return attend_tiles(q, k, v, Cut(rows, cols, joined), bias, scale)


def _both(seen: list[Any], device: torch.device) -> Tensor:
    """(pieces of both axes, query tokens, key tokens) bool: seen on both axes."""
    rows, cols = (as_tensor(table, device) for table in seen)
    return join_tables(rows, cols, torch.logical_and)


def _seen(axis: Axis, kernel: int, stride: int, causal: bool) -> Any:
    """(pieces, query tile, key tile) bool."""
    xp, key, query = integers(axis.length), axis.key_ranks[..., None, :], axis.query_ranks[..., None]
    length = axis.group_lengths[..., None]
    leader = query if stride == 1 else query // stride * stride + (stride - 1 if causal else stride // 2)
    if causal:
        start = (xp.minimum(leader, length - 1) - kernel + 1).clip(0, None)
        seen = (key >= start) & (key <= query)
    else:
        start = xp.minimum((leader - kernel // 2).clip(0, None), length - kernel)
        seen = (key >= start) & (key < start + kernel)
    return seen.reshape(axis.pieces, query.shape[2], key.shape[3])


def tile_bias(rpb: Tensor, axes: tuple[Axis, Axis], kernel_size: Sequence[int]) -> Tensor:
    """(heads, pieces or 1, query tokens, key tokens): the bias of every pair of a tile.

    On maps of known size key tiles lie alike around their query tiles: all have the same bias.
    """
    of_axis = []
    for axis, kernel in zip(axes, kernel_size, strict=True):
        apart = axis.key_ranks[..., None, :] - axis.query_ranks[..., None]  # (groups, tiles, query tile, key tile)
        apart = apart[:1, :1] if known(axis.length) else apart
        cells = (apart + kernel - 1).clip(0, 2 * kernel - 2)
        of_axis.append(cells.reshape(cells.shape[0] * cells.shape[1], *cells.shape[2:]))
    columns = 2 * kernel_size[1] - 1
    cells = join_tables(of_axis[0], of_axis[1], lambda row, col: row * columns + col)
    return rpb.flatten(1).index_select(1, as_tensor(cells.reshape(-1), rpb.device)).unflatten(1, tuple(cells.shape))


# Circles


def circle_attention_graph(q: Tensor, k: Tensor, v: Tensor, circle: LocalPattern, scale: float) -> Tensor:
    """Attend by differentiable operations; the mask becomes part of a traced graph."""
    return _circle(q, k, v, circle, scale, False)


def circle_attention_lse_graph(
    q: Tensor, k: Tensor, v: Tensor, circle: LocalPattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by differentiable operations; also the log-sum-exp."""
    return _circle(q, k, v, circle, scale, True)


def _circle(q: Tensor, k: Tensor, v: Tensor, circle: LocalPattern, scale: float, returns_lse: bool) -> Any:
    size = sides(q)
    axes = cut_map(circle, size)
    squares = [as_tensor(_squares(axis, circle), q.device) for axis in axes]
    radius = circle.reach(0, size[0], 1)[0] + 1

    def is_near(rows: Tensor, cols: Tensor) -> Tensor:
        return rows + cols < radius**2

    seen = None if known(*size) and circle.sees_all(size) else join_tables(squares[0], squares[1], is_near)
    return attend_tiles(q, k, v, Cut(*axes, seen), None, scale, returns_lse)


def _squares(axis: Axis, circle: LocalPattern) -> Any:
    """(pieces, query tile, key tile): squares of distances; of a key outside the map one that no circle reaches."""
    xp, key, query = integers(axis.length), axis.key_ranks[..., None, :], axis.query_ranks[..., None]
    far = (circle.reach(0, axis.length, 1)[0] + 1) ** 2
    outside = (key < 0) | (key >= axis.length)
    squares = xp.where(outside, far, (key - query) ** 2)
    return squares.reshape(axis.pieces, query.shape[2], key.shape[3])
