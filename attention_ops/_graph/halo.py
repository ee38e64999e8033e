"""Halo attention for exporters and compilers: key tiles are gathered from the map with zeros around it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attend import of_one_layout
from .sizes import as_tensor, integers, pieces, sides
from .tiles import Axis, Cut, attend, attend_lse, by_head, cut_axis, map_results, to_map, tokens


def halo_attention_graph(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Any, scale: float
) -> Tensor:
    """Attend from every block of queries to the block and its halo, by differentiable operations."""
    tiles, cut = _tiles(q, k, v, rel_h, rel_w, blocks)
    return of_one_layout(to_map(attend(*tiles, scale).flatten(2, 3), cut, q.shape[3]))


def halo_attention_lse_graph(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Any, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by differentiable operations; also the log-sum-exp."""
    tiles, cut = _tiles(q, k, v, rel_h, rel_w, blocks)
    return map_results(attend_lse(*tiles, scale), cut, q.shape[3])


def _tiles(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Any
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Cut]:
    """Return tiles of queries, keys and values, (B, heads, pieces, tokens, d), their mask, and how queries are cut."""
    (block, halo, stride), (height, width) = blocks, sides(k)
    tiles = pieces(height, block[0]), pieces(width, block[1])
    axes = [_cut(length, tiles[i], block[i] // stride) for i, length in enumerate(sides(q))]
    cut = Cut(axes[0], axes[1], None)
    queries = by_head(q, tokens(axes[0].queries, axes[1].queries, axes[1].length))
    queries = queries.unflatten(2, (cut.pieces, cut.queries))  # (B, heads, pieces, T, d)
    windows = [_windows(tiles[i], block[i], halo[i]) for i in (0, 1)]
    of_keys = tokens(windows[0], windows[1], tiles[1] * block[1] + 2 * halo[1])
    shape = (cut.pieces, windows[0].shape[1] * windows[1].shape[1])
    below, right = tiles[0] * block[0] - height + halo[0], tiles[1] * block[1] - width + halo[1]
    around = (0, 0, 0, 0, halo[1], right, halo[0], below)
    keys, values = (by_head(F.pad(x, around), of_keys).unflatten(2, shape) for x in (k, v))
    mask = None
    if rel_h is not None and rel_w is not None:
        mask = _relative_logits(queries, rel_h, rel_w, block[0] // stride, block[1] // stride)
    return (queries, keys, values, mask), cut


def _cut(length: int, tiles: int, tile: int) -> Axis:
    """Cut queries; their keys are the windows."""
    return cut_axis(length, 1, tile, tiles, tile, 0)


def _windows(tiles: int, block: int, halo: int) -> Any:
    """(tiles, block + 2 * halo): positions on an axis of the map with zeros around it."""
    xp = integers(tiles)
    return xp.arange(tiles)[:, None] * block + xp.arange(block + 2 * halo)


def _relative_logits(q: Tensor, rel_h: Tensor, rel_w: Tensor, rows: int, cols: int) -> Tensor:
    """(B, heads, pieces, T, d) -> (B, heads, pieces, T, keys), of blocks of rows x cols queries."""
    q = q.unflatten(3, (rows, cols))  # (B, heads, pieces, qy, qx, d)
    by_y, by_x = by_place(rel_h.to(q.dtype), rows), by_place(rel_w.to(q.dtype), cols)
    by_row = torch.matmul(q, by_y.transpose(1, 2))  # (.., qy, qx, ky): one matrix per row of queries
    by_col = torch.matmul(q.transpose(3, 4), by_x.transpose(1, 2)).transpose(3, 4)  # (.., qy, qx, kx)
    return (by_row[..., :, None] + by_col[..., None, :]).flatten(5, 6).flatten(3, 4)


def by_place(table: Tensor, queries: int) -> Tensor:
    """(2 * window - 1, d) -> (queries, window, d): the cells that a query at each place of the block uses."""
    window, xp = (int(table.shape[0]) + 1) // 2, integers(queries)
    cells = xp.arange(window) - xp.arange(queries)[:, None] + window - 1
    return table.index_select(0, as_tensor(cells.reshape(-1), table.device)).unflatten(0, (queries, window))
