"""Forward of halo attention on CPUs, one box of tiles after the other.

A box is a few neighbouring tiles with all their heads, whose logits stay in a CPU's cache. Keys are copied out of a
padded map into the same few buffers for every box: fresh ones of the size of a map cost more in cleared pages than the
attention itself (3 x 64x64, 8 heads x 16, stride 2: 45 and 12 ms on 2 threads of a virtual Xeon).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiled_attention import CHUNK_LOGITS, accumulator
from .tiling import AxisTiling

Axes = tuple[AxisTiling, AxisTiling]  # rows, columns


def attend_by_boxes(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, queries: Axes, keys: Axes, scale: float
) -> Tensor:
    """Attend from every query tile to its key tile.

    Args:
        q: (B, Y, X, heads, head_dim); k, v: (B, H, W, heads, head_dim or value_dim), of any strides.
        rel_h, rel_w: (2 * window - 1, head_dim), both or none.
        queries, keys: as many tiles of either.
        scale: of q . k.

    Returns:
        (B, Y, X, heads, value_dim), contiguous.
    """
    out = q.new_empty(len(q), *(axis.tiles * axis.tile for axis in queries), q.shape[3], v.shape[-1])
    q_tiles, out_tiles = _query_tiles(_overhang(q, queries), queries), _query_tiles(out, queries)
    relative = None
    if rel_h is not None and rel_w is not None:
        relative = _by_place(*(t.to(accumulator(q.dtype)) for t in (rel_h, rel_w)), queries)
    room = _room(q, v, queries, keys, relative is not None)
    for start in range(0, len(q), len(room.k_map)):
        images = slice(start, start + len(room.k_map))
        k_tiles, v_tiles = (_fill(m, x[images], keys) for m, x in ((room.k_map, k), (room.v_map, v)))
        for box in _boxes(k_tiles.shape[:3], len(room.q)):
            of_images = q_tiles[images][box], k_tiles[box], v_tiles[box]
            few_q, few_k, few_v = (_copy(x, to) for x, to in zip(of_images, (room.q, room.k, room.v), strict=True))
            bias = None if relative is None else _bias(few_q, relative, room.bias)
            few = (x.transpose(1, 2) for x in (few_q, few_k, few_v))  # (tiles, heads, tokens, dim)
            attended = F.scaled_dot_product_attention(*few, attn_mask=bias, scale=scale).transpose(1, 2)
            place = out_tiles[images][box]
            place.copy_(attended[..., : v.shape[-1]].reshape(place.shape))
    return out[:, : queries[0].length, : queries[1].length].contiguous()


@dataclass(frozen=True)
class _Room:
    """What a call writes again and again."""

    k_map: Tensor  # (images, rows, columns, heads, dim), with zeros around the map
    v_map: Tensor
    q: Tensor  # (tiles of a box, tokens, heads, dim)
    k: Tensor
    v: Tensor
    bias: Tensor | None  # (tiles of a box, heads, tokens of queries, tokens of keys)


def _room(q: Tensor, v: Tensor, queries: Axes, keys: Axes, biased: bool) -> _Room:
    heads, dim = q.shape[3], max(q.shape[-1], v.shape[-1])  # SDPA's fast body wants one; zeros add nothing
    tokens, window = queries[0].tile * queries[1].tile, keys[0].keys * keys[1].keys
    budget = torch.get_num_threads() * CHUNK_LOGITS
    rows, cols = (axis.before + axis.tiles * axis.tile + axis.after for axis in keys)
    images = min(max(budget // (rows * cols * heads * dim), 1), max(len(q), 1))
    tiles = min(max(budget // (tokens * window * heads), 1), images * keys[0].tiles * keys[1].tiles)
    wide = {"dtype": accumulator(q.dtype), "device": q.device}
    return _Room(
        *(torch.zeros(images, rows, cols, heads, dim, **wide) for _ in "kv"),
        torch.zeros(tiles, tokens, heads, dim, **wide),
        *(torch.empty(tiles, window, heads, dim, **wide) for _ in "kv"),
        torch.empty(tiles, heads, tokens, window, **wide) if biased else None,
    )


def _boxes(counts: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cut a grid of so many tiles a dimension into boxes of at most `most` tiles, whole rows where these fit."""
    sizes: list[int] = []
    for count in reversed(counts):
        sizes.insert(0, min(count, max(most, 1)))
        most //= count
    for corner in product(*(range(0, count, size) for count, size in zip(counts, sizes, strict=True))):
        yield tuple(slice(start, start + size) for start, size in zip(corner, sizes, strict=True))


def _overhang(x: Tensor, axes: Axes) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, axes[1].tail, 0, axes[0].tail)) if axes[0].tail or axes[1].tail else x


def _query_tiles(x: Tensor, axes: Axes) -> Tensor:
    """See (B, Y, X, heads, d) as (B, tile rows, tile columns, rows, columns, heads, d)."""
    (rows, cols) = axes
    return x.unflatten(2, (cols.tiles, cols.tile)).unflatten(1, (rows.tiles, rows.tile)).transpose(2, 3)


def _fill(padded: Tensor, x: Tensor, axes: Axes) -> Tensor:
    """Copy a map into the middle of `padded`; see it as (B, tile rows, tile columns, rows, columns, heads, dim)."""
    (rows, cols), padded = axes, padded[: len(x)]
    padded[:, rows.before :, cols.before :][:, : x.shape[1], : x.shape[2], :, : x.shape[-1]].copy_(x)
    tiles = padded.unfold(1, rows.keys, rows.tile).unfold(2, cols.keys, cols.tile)
    return tiles.permute(0, 1, 2, 5, 6, 3, 4)


def _copy(tiles: Tensor, to: Tensor) -> Tensor:
    """Copy (.., rows, columns, heads, d) of so many tiles to the head of `to`: (tiles, tokens, heads, >= d)."""
    few = to[: tiles.shape[:3].numel()]
    few.view(*tiles.shape[:-1], -1)[..., : tiles.shape[-1]].copy_(tiles)
    return few


def _by_place(rel_h: Tensor, rel_w: Tensor, queries: Axes) -> Tensor:
    """Tables of (2 * window - 1, d) -> (query tokens, d, key tokens): what a query at each place of the block meets."""
    tables = []
    for table, axis in ((rel_h, queries[0]), (rel_w, queries[1])):
        window = (len(table) + 1) // 2
        starts = range(window - 1, window - 1 - axis.tile, -1)  # a step right in the block is a cell left
        tables.append(torch.stack([table[start : start + window].mT for start in starts]))  # (places, d, window)
    return (tables[0][:, None, :, :, None] + tables[1][None, :, :, None, :]).flatten(-2).flatten(0, 1)


def _bias(q: Tensor, by_place: Tensor, room: Tensor) -> Tensor:
    """Write the relative logits of (n, T, heads, >= d) queries into `room`; return them as (n, heads, T, keys)."""
    tokens, dim, window = by_place.shape
    by_token = q[..., :dim].transpose(0, 1)  # (T, n, heads, d)
    room = room.flatten()[: by_token.shape[:3].numel() * window].view(tokens, -1, window)
    torch.bmm(by_token.reshape(tokens, -1, dim), by_place, out=room)
    return room.unflatten(1, by_token.shape[1:3]).permute(1, 2, 0, 3)
