"""Biases of local attention (Triton): what a tile adds to its logits, laid out so that tiles read it row by row.

Paper      Hassani et al. 2023, arXiv:2204.07143 (relative bias); Liu et al. 2021, arXiv:2103.14030 (window bias).
Tensors    table: (heads, cells), any floating dtype; tiles: in the dtype of the table, fp32 for float64.
           neighborhood  (heads, SHIFTS, LINES, WX): element n of a line is the bias at column distance shift + n. All
                         tiles read one layout, wherever they lie: a tile's row m begins WX elements * its distance.
           windows       (heads, parts of a window, steps, owners, walked): a part is what one tile owns of a window.
Grid       blocks of BLOCK elements * heads: one program copies one block of one head.
Numerics   a copy.
Memory     about (2 * kernel + 20) ** 2 lines of WX elements a head (30 KB in fp32 at kernel 7), or two tables.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv
from .intervals import walk_offset
from .plan import Plan

BLOCK = 1024


@triton.jit
def table_cells(owner_y, owner_x, walked_y, walked_x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The cell of the table that pairs of an owner and a walked token use, and whether there is one.

    Args:
        owner_y, owner_x, walked_y, walked_x: tokens that broadcast against each other, counted on each axis from the
            first walked token of the owners' tile.
    """
    if ROWS.inverse:
        query_y, query_x, key_y, key_x = walked_y, walked_x, owner_y, owner_x
    else:
        query_y, query_x, key_y, key_x = owner_y, owner_x, walked_y, walked_x
    H: tl.constexpr = ROWS.keys
    W: tl.constexpr = COLS.keys
    if ROWS.kind == "block":
        known = (query_y // H == key_y // H) & (query_x // W == key_x // W)
        cell = (query_y % H * W + query_x % W) * (H * W) + key_y % H * W + key_x % W
    else:
        y, x = key_y - query_y + H - 1, key_x - query_x + W - 1
        known = (y >= 0) & (y < 2 * H - 1) & (x >= 0) & (x < 2 * W - 1)
        cell = y * (2 * W - 1) + x
    return cell, known


@triton.jit
def bias_tiles_kernel(
    table_ptr, tiles_ptr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(SIZE, BLOCK)
    head, i = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if ROWS.kind == "block":
        N: tl.constexpr = ROWS.walk * COLS.walk
        M: tl.constexpr = ROWS.tile * COLS.tile
        m, n, step, part = i // N % M, i % N, i // (M * N) % (ROWS.walks * COLS.walks), i // (M * N)
        part = part // (ROWS.walks * COLS.walks)
        owner_y = part // COLS.split * ROWS.tile + m // COLS.tile
        owner_x = part % COLS.split * COLS.tile + m % COLS.tile
        walked_y = walk_offset(step // COLS.walks, ROWS) + n // COLS.walk
        walked_x = walk_offset(step % COLS.walks, COLS) + n % COLS.walk
    else:
        owner_y, owner_x = ROWS.lead, COLS.lead
        walked_y = i // COLS.walk % ROWS.lines
        walked_x = i // COLS.walk // ROWS.lines + i % COLS.walk
    cell, known = table_cells(owner_y, owner_x, walked_y, walked_x, ROWS, COLS)
    bias = tl.load(table_ptr + head * CELLS + cell, mask=known & (i < SIZE), other=0.0)
    tl.store(tiles_ptr + head * SIZE + i, bias.to(tiles_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit
def bias_of_tile(bias_ptr, head, tile_y, tile_x, begin_y, begin_x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[M, N] pointers to the biases of an owner tile, but for what `bias_of_step` adds."""
    N: tl.constexpr = ROWS.walk * COLS.walk
    m, n = tl.arange(0, ROWS.tile * COLS.tile), tl.arange(0, N)
    if ROWS.kind == "block":
        SIZE: tl.constexpr = ROWS.walks * COLS.walks * ROWS.tile * COLS.tile * N  # of a part
        part = head * (ROWS.split * COLS.split) + tile_y % ROWS.split * COLS.split + tile_x % COLS.split
        bias_ptr += part.to(tl.int64) * SIZE
        rows = m * N
    else:
        bias_ptr += head.to(tl.int64) * (COLS.shifts * ROWS.lines * COLS.walk)
        shift, line = begin_x - tile_x * COLS.tile + COLS.keys - 1, begin_y - tile_y * ROWS.tile + ROWS.keys - 1
        # below 0 for a tile past a dilation group that is short: it uses no bias, but reads some
        rows = tl.maximum(shift * ROWS.lines + line, 0) * COLS.walk
        rows += ((COLS.tile - 1 - m % COLS.tile) * ROWS.lines + ROWS.tile - 1 - m // COLS.tile) * COLS.walk
    return bias_ptr + (rows[:, None] + n[None, :])


@triton.jit
def bias_of_step(step, step_y, step_x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What a step adds to the pointers of `bias_of_tile`."""
    if ROWS.kind == "block":
        offset = step * (ROWS.tile * COLS.tile * ROWS.walk * COLS.walk)
    else:
        offset = (walk_offset(step_x, COLS) * ROWS.lines + walk_offset(step_y, ROWS)) * COLS.walk
    return offset


def bias_size(plan: Plan) -> int:
    """Return how many numbers the tiles of one head hold."""
    rows, cols = plan.rows, plan.cols
    if rows.kind == "block":
        return rows.split * cols.split * plan.steps * plan.owners * plan.walked
    return cols.shifts * rows.lines * cols.walk


def bias_tiles(table: Tensor, plan: Plan) -> Tensor:
    """Lay out a table (heads, ...), contiguous, for the tiles of a plan: (heads, numbers)."""
    heads, size = table.shape[0], bias_size(plan)
    dtype = torch.float32 if table.dtype == torch.float64 else table.dtype
    tiles = table.new_empty(heads, size, dtype=dtype)
    bias_tiles_kernel[(cdiv(size, BLOCK) * heads,)](
        table, tiles, ROWS=plan.rows, COLS=plan.cols, CELLS=table.numel() // heads, SIZE=size, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return tiles
