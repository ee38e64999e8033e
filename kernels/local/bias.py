"""Biases of local attention (Triton and host): as dense tiles, and their gradient without atomics.

Paper      Hassani et al. 2023, arXiv:2204.07143 (relative bias); Liu et al. 2021, arXiv:2103.14030 (window bias).
Tensors    table: (heads, cells); tiles: (heads, variants, steps, owners, walked), in the dtype of the table; the others
           as in backward.py. A tile's variant is where its first walked token lies; few differ, at the borders.
Grid       works * heads * steps: one program sums the logit gradients of one step over its share of images and tiles.
Numerics   sums in fp32; every sum has a fixed order.
Memory     one fp32 tile a program, and the tiles of the table: about 64 KB a head in fp32 at kernel 7.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .intervals import hidden, load_tokens, map_offsets, own, walk
from .plan import SIZES, Axis, Pattern, Plan

PROGRAMS = 1024  # of one launch: a few waves on a large GPU, and few enough partial sums (estimated)


@dataclass(frozen=True, eq=False)  # compared by identity, also by caches
class BiasLayout:
    """How one plan reads a table; tensors on the device of the maps."""

    variants_y: Tensor  # (groups * tiles,) int32: row variant of a tile, times the number of column variants
    variants_x: Tensor
    cells: Tensor  # (variants, steps, owners, walked): cell of the table, 0 where none
    sources: Tensor  # (cells, most): the positions in `cells` that read a cell, one past the end where fewer
    tiles: tuple[tuple[tuple[int, int, int, int], ...], ...]  # per variant: (tile_y, group_y, tile_x, group_x)


def _variants(axis: Axis, owners: int, walked: int, dilation: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Number the positions of tiles relative to what they walk; (start, first walked token) of one tile of each."""
    ids, known, places = [], {}, []
    for group, tile in product(range(dilation), range(axis.tiles(-(-owners // dilation)))):
        in_group, seen = ((n - group + dilation - 1) // dilation for n in (owners, walked))
        start, low, high = axis.owned(tile, in_group)
        begin = axis.walked(tile, in_group, seen)[0] if low < high else None
        key = None if begin is None else (begin - start, start % axis.step if axis.kind == "block" else 0)
        if key is not None and key not in known:
            known[key] = len(places)
            places.append((start, begin))
        ids.append(known.get(key, -1))
    return ids, places


def _axis_cells(axis: Axis, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(variants, steps, tile, walk) on one axis: the query, the key, and whether a table knows the pair."""
    start, begin = torch.tensor(places).T[:, :, None, None, None]
    offset = torch.tensor([axis.walk_offset(step) for step in range(axis.walks)])[:, None, None]
    owner = (start + torch.arange(axis.tile)[:, None]).expand(-1, axis.walks, -1, axis.walk)
    walked = (begin + offset + torch.arange(axis.walk)).expand(-1, -1, axis.tile, -1)
    query, key = (walked, owner) if axis.inverse else (owner, walked)
    if axis.kind == "block":
        return query % axis.keys, key % axis.keys, query // axis.keys == key // axis.keys
    return query, key, (key - query).abs() < axis.keys


@lru_cache(maxsize=64)
def bias_layout(
    pattern: Pattern, plan: Plan, queries: tuple[int, int], keys: tuple[int, int], device: torch.device
) -> BiasLayout:
    owners, walked = (keys, queries) if plan.rows.inverse else (queries, keys)
    axes, (rows, cols) = (plan.rows, plan.cols), pattern.keys
    (ids_y, places_y), (ids_x, places_x) = (
        _variants(axes[i], owners[i], walked[i], pattern.dilation[i]) for i in range(2)
    )
    (query_y, key_y, known_y), (query_x, key_x, known_x) = (
        _axis_cells(axis, places) for axis, places in zip(axes, (places_y, places_x), strict=True)
    )
    if pattern.kind == "block":
        of_y, of_x = query_y * cols * rows * cols + key_y * cols, query_x * rows * cols + key_x
        count = (rows * cols) ** 2
    else:
        of_y, of_x = (key_y - query_y + rows - 1) * (2 * cols - 1), key_x - query_x + cols - 1
        count = (2 * rows - 1) * (2 * cols - 1)

    def both(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # broadcast to (VY, VX, SY, SX, TY, TX, WY, WX)
        return y[:, None, :, None, :, None, :, None], x[None, :, None, :, None, :, None, :]

    y, x = both(of_y, of_x)
    known_y, known_x = both(known_y, known_x)
    cells = torch.where(known_y & known_x, y + x, -1).flatten(6).flatten(4, 5).flatten(2, 3).flatten(0, 1)
    here = [
        list(product(range(step), range(len(ids) // step)))
        for step, ids in zip(pattern.dilation, (ids_y, ids_x), strict=True)
    ]
    tiles = tuple(
        tuple(
            (ty, gy, tx, gx)
            for (gy, ty), vy in zip(here[0], ids_y, strict=True)
            for (gx, tx), vx in zip(here[1], ids_x, strict=True)
            if (vy, vx) == variant
        )
        for variant in product(range(len(places_y)), range(len(places_x)))
    )
    ids_y = [max(i, 0) * len(places_x) for i in ids_y]
    ids_x = [max(i, 0) for i in ids_x]
    return BiasLayout(
        torch.tensor(ids_y, dtype=torch.int32, device=device),
        torch.tensor(ids_x, dtype=torch.int32, device=device),
        cells.clamp(min=0).to(device),
        _sources(cells.flatten(), count).to(device),
        tiles,
    )


def _sources(cells: Tensor, count: int) -> Tensor:
    """(count, most): for every cell the positions that hold it, filled up with one position past the end."""
    order = torch.argsort(cells, stable=True)[int((cells < 0).sum()) :]
    held = torch.bincount(cells[order], minlength=count)
    rank = torch.arange(len(order)) - (held.cumsum(0) - held)[cells[order]]
    sources = torch.full((count, max(int(held.max()), 1)), len(cells))
    sources[cells[order], rank] = order
    return sources


def bias_tiles(table: Tensor, layout: BiasLayout) -> Tensor:
    """(heads, ...) -> (heads, variants, steps, owners, walked), not rounded: in the table's dtype, float64 in fp32."""
    raw = table.detach().flatten(1)
    raw = raw.float() if raw.dtype == torch.float64 else raw
    return raw.index_select(1, layout.cells.flatten()).view(-1, *layout.cells.shape)


@triton.jit(do_not_specialize=SIZES)
def local_bias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, tiles_ptr, works_ptr, sums_ptr,
    q_strides, k_strides, v_strides, grad_strides,
    heads, dilation, queries, keys, variants, scale, factor,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAD: tl.constexpr, PAD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = ROWS.tile * COLS.tile
    N: tl.constexpr = ROWS.walk * COLS.walk
    STEPS: tl.constexpr = ROWS.walks * COLS.walks
    pid = tl.program_id(0)
    step, head, work_ptr = pid % STEPS, pid // STEPS % heads, works_ptr + pid // STEPS // heads * 5
    step_y, step_x = step // COLS.walks, step % COLS.walks
    variant, tiles_ptr = tl.load(work_ptr), tiles_ptr + tl.load(work_ptr + 1) * 4
    count, begin, end = tl.load(work_ptr + 2), tl.load(work_ptr + 3), tl.load(work_ptr + 4)
    m, n = tl.arange(0, M), tl.arange(0, N)
    cell = m[:, None] * N + n[None, :]
    bias_ptr += ((head * variants + variant).to(tl.int64) * STEPS + step) * (M * N)
    bias = tl.load(bias_ptr + cell).to(tl.float32)
    total = tl.zeros((M, N), tl.float32)
    for unit in range(begin, end):
        image, tile_ptr = (unit // count).to(tl.int64), tiles_ptr + unit % count * 4
        group_y, group_x = tl.load(tile_ptr + 1), tl.load(tile_ptr + 3)
        y, valid_y, begin_y, _, keys_y, word_y, high_y = own(
            m // COLS.tile, tl.load(tile_ptr), group_y, dilation[0], queries[0], keys[0], ROWS
        )
        x, valid_x, begin_x, _, keys_x, word_x, high_x = own(
            m % COLS.tile, tl.load(tile_ptr + 2), group_x, dilation[1], queries[1], keys[1], COLS
        )
        key_y, inside_y = walk(step_y, n // COLS.walk, begin_y, keys_y, ROWS)
        key_x, inside_x = walk(step_x, n % COLS.walk, begin_x, keys_x, COLS)
        valid, inside = valid_y & valid_x, inside_y & inside_x
        q_offs = image * q_strides[0] + head * q_strides[3]
        q_offs += map_offsets(y, x, group_y, group_x, dilation, q_strides)
        k_offs = image * k_strides[0] + head * k_strides[3]
        k_offs += map_offsets(key_y, key_x, group_y, group_x, dilation, k_strides)
        v_offs = image * v_strides[0] + head * v_strides[3]
        v_offs += map_offsets(key_y, key_x, group_y, group_x, dilation, v_strides)
        grad_offs = image * grad_strides[0] + head * grad_strides[3]
        grad_offs += map_offsets(y, x, group_y, group_x, dilation, grad_strides)
        lse_offs = (image * heads + head) * (queries[0] * queries[1])
        lse_offs += (group_y + y * dilation[0]) * queries[1] + group_x + x * dilation[1]
        q, k = load_tokens(q_ptr, q_offs, valid, DIM, PAD), load_tokens(k_ptr, k_offs, inside, DIM, PAD)
        grad = load_tokens(grad_ptr, grad_offs, valid, DIM_V, PAD_V)
        v = load_tokens(v_ptr, v_offs, inside, DIM_V, PAD_V)
        lse = tl.load(lse_ptr + lse_offs, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + lse_offs, mask=valid, other=0.0)
        unseen = (
            hidden(word_y, high_y, word_x, high_x, step_y, step_x, y, x, key_y, key_x, inside, ROWS, COLS)
            | ~valid[:, None]
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        probs = tl.where(unseen, 0.0, tl.exp2(logits * factor - lse[:, None]))
        total += probs * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    tl.store(sums_ptr + pid.to(tl.int64) * (M * N) + cell, total)


def share_out(tiles: list[int], images: int, programs: int) -> list[tuple[int, int, int, int, int]]:
    """Cut the (image, tile) pairs of every variant into works of about equal length, about `programs` of them at most.

    Returns:
        (variant, its first tile in the list of all, its tiles, first pair, past the last pair) per work.
    """
    most = max(-(-images * sum(tiles) // max(programs, 1)), 1)
    works, first = [], 0
    for variant, count in enumerate(tiles):
        pairs = count * images
        works += [(variant, first, count, begin, min(begin + most, pairs)) for begin in range(0, pairs, most)]
        first += count
    return works


@lru_cache(maxsize=64)
def works_of(layout: BiasLayout, images: int, programs: int) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
    """The works of `share_out`, and on the device of the layout: the tiles of all variants, and the works."""
    works = share_out([len(t) for t in layout.tiles], images, programs)
    tiles = [tile for variant in layout.tiles for tile in variant]
    return works, *(torch.tensor(x, dtype=torch.int32, device=layout.cells.device) for x in (tiles, works))


def table_gradient(sums: Tensor, works: list[tuple[int, int, int, int, int]], layout: BiasLayout) -> Tensor:
    """(works, heads, steps, owners, walked) -> (heads, cells) in fp32: partial sums, gathered cell by cell."""
    variants = [work[0] for work in works]
    ends = [variants.index(v) for v in range(layout.cells.shape[0])] + [len(works)]
    return cells_gradient(torch.stack([sums[a:b].sum(0) for a, b in pairwise(ends)], 1), layout)


def cells_gradient(tiles: Tensor, layout: BiasLayout) -> Tensor:
    """(heads, variants, steps, owners, walked) -> (heads, cells): the sum of what every cell was read for."""
    flat = torch.nn.functional.pad(tiles.flatten(1), (0, 1))
    return flat[:, layout.sources].sum(-1)
