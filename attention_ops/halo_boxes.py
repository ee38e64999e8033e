"""Forward of halo attention on CPUs, one box of tiles after the other.

A box is a few neighbouring tiles with all their heads, whose logits stay in a CPU's cache. Keys are copied out of a
padded map into the same few buffers for every box: fresh ones of the size of a map cost more in cleared pages than the
attention itself (3 x 64x64, 8 heads x 16, stride 2: 45 and 12 ms on 2 threads of a virtual Xeon).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import accumulator
from .scratch import Scratch
from .tiled_attention import CHUNK_LOGITS
from .tiling import AxisTiling, boxes, by_region

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
    (rows, cols), heads, wide = queries, q.shape[3], accumulator(q.dtype)
    dim = max(q.shape[-1], v.shape[-1])  # SDPA's fast body wants one; zeros add nothing
    budget = torch.get_num_threads() * CHUNK_LOGITS
    tokens, window = rows.tile * cols.tile, keys[0].keys * keys[1].keys
    out = q.new_empty(len(q), rows.tiles * rows.tile, cols.tiles * cols.tile, heads, v.shape[-1])
    overhang = (0, dim - q.shape[-1], 0, 0, 0, cols.tail, 0, rows.tail)
    q = F.pad(q, overhang) if any(overhang) else q
    q_tiles, out_tiles = (by_region(x, (rows.tile, cols.tile)).transpose(2, 3) for x in (q, out))
    relative = None if rel_h is None or rel_w is None else _relative(rel_h.to(wide), rel_w.to(wide), queries)
    scratch, maps = Scratch(q, wide), _empty_maps(q, dim, keys, budget)
    for start in range(0, len(q), len(maps[0])):
        images = slice(start, start + len(maps[0]))
        k_tiles, v_tiles = (_fill(m, x[images], keys) for m, x in zip(maps, (k, v), strict=True))
        for box in boxes(k_tiles.shape[:3], budget // (tokens * window * heads)):
            loaded = (scratch.load(n, x[box]) for n, x in (("q", q_tiles[images]), ("k", k_tiles), ("v", v_tiles)))
            few_q, few_k, few_v = (x.flatten(3, 4).flatten(0, 2) for x in loaded)  # (tiles, tokens, heads, dim)
            bias = None if relative is None else _bias(few_q, relative, scratch)
            few = (x.transpose(1, 2) for x in (few_q, few_k, few_v))
            attended = F.scaled_dot_product_attention(*few, attn_mask=bias, scale=scale).transpose(1, 2)
            place = out_tiles[images][box]
            place.copy_(attended[..., : v.shape[-1]].reshape(place.shape))
    return out[:, : rows.length, : cols.length].contiguous()


def _empty_maps(q: Tensor, dim: int, keys: Axes, budget: int) -> list[Tensor]:
    """Zeros for the keys and values of some images with what surrounds them: (images, rows, columns, heads, dim)."""
    rows, cols = (axis.before + axis.tiles * axis.tile + axis.after for axis in keys)
    images = max(1, min(len(q), budget // (rows * cols * q.shape[3] * dim)))
    return [q.new_zeros(images, rows, cols, q.shape[3], dim, dtype=accumulator(q.dtype)) for _ in "kv"]


def _fill(padded: Tensor, x: Tensor, axes: Axes) -> Tensor:
    """Copy a map into the middle of `padded`; see it as (B, tile rows, tile columns, rows, columns, heads, dim)."""
    (rows, cols), padded = axes, padded[: len(x)]
    padded[:, rows.before :, cols.before :][:, : x.shape[1], : x.shape[2], :, : x.shape[-1]].copy_(x)
    tiles = padded.unfold(1, rows.keys, rows.tile).unfold(2, cols.keys, cols.tile)
    return tiles.permute(0, 1, 2, 5, 6, 3, 4)


def by_place(table: Tensor, queries: int) -> Tensor:
    """(2 * window - 1, d) -> (queries, window, d): the cells that a query at each place of the block uses."""
    window = (table.shape[0] + 1) // 2
    place = torch.arange(window, device=table.device)
    query = torch.arange(queries, device=table.device)[:, None]
    return table[place - query + window - 1]


def _relative(rel_h: Tensor, rel_w: Tensor, queries: Axes) -> Tensor:
    """Return (query tokens, d, key tokens): what a query at each place of the block meets."""
    by_row, by_col = (by_place(t, axis.tile).mT for t, axis in zip((rel_h, rel_w), queries, strict=True))
    return (by_row[:, None, :, :, None] + by_col[None, :, :, None, :]).flatten(-2).flatten(0, 1)


def _bias(q: Tensor, relative: Tensor, scratch: Scratch) -> Tensor:
    """(n, T, heads, >= d) queries -> their relative logits, (n, heads, T, keys)."""
    tokens, dim, window = relative.shape
    by_token = q[..., :dim].transpose(0, 1)  # (T, n, heads, d)
    logits = scratch.take("bias", torch.Size((tokens, by_token.shape[1] * by_token.shape[2], window)))
    torch.bmm(by_token.reshape(tokens, -1, dim), relative, out=logits)
    return logits.unflatten(1, by_token.shape[1:3]).permute(1, 2, 0, 3)
