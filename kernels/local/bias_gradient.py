"""Gradient of local attention's biases (Triton): partial sums of logit gradients, then their sums by cell. No atomics.

Paper      as in bias.py.
Tensors    as in backward.py; table and dtable: (heads, cells); sums: (works, heads, steps, owners, walked) fp32.
Grid       works * heads * steps: one program sums the logit gradients of a step over its tiles (shares.py).
           Then heads * rows of the table * blocks of its columns: one program sums what its cells were read for.
Numerics   sums in fp32; every sum has a fixed order.
Memory     one fp32 tile a program; no logits reach HBM.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, power_of_2
from .bias import table_cells
from .intervals import hidden, in_elements, interval, load_tokens, map_offsets, own, walk, walk_offset
from .plan import SIZES, Pattern, Plan
from .shares import Shares

ENTRIES = 4096  # partial sums that a program reads at a time


@triton.jit
def tiles_of_slot(slot, slots, length, dilation, AXIS: tl.constexpr):
    """The tiles of a slot on one axis: first, past the last, their step; the first of its groups, how many; distance.

    Args:
        slot: a number or a vector. slots: the numbers of `Slots` of long groups, then of short ones.
        length: tokens of the axis.
    """
    short = (dilation - length % dilation) % dilation  # groups
    of_long = slots[0] + slots[1] + slots[3] - slots[2]
    is_short = slot >= of_long
    slot = tl.where(is_short, slot - of_long, slot)
    left = tl.where(is_short, slots[4], slots[0])
    middle = tl.where(is_short, slots[5], slots[1])
    right = tl.where(is_short, slots[6], slots[2])
    tile = tl.where(slot < left + middle, slot, slot + right - left - middle)
    past = tl.where((slot >= left) & (slot < left + middle), right, tile + 1)
    group, groups = tl.where(is_short, dilation - short, 0), tl.where(is_short, short, dilation - short)
    walked = tl.where(is_short, length // dilation, tl.cdiv(length, dilation))
    start = AXIS.first + tile // AXIS.split * AXIS.step + tile % AXIS.split * AXIS.tile
    begin, _ = interval(tl.maximum(start, 0), walked, AXIS)
    return tile, past, tl.maximum(middle, 1), group, groups, begin - start


@triton.jit(do_not_specialize=(*SIZES, "size", "images", "shares", "slots_y", "slots_x"))
def local_bias_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, grad_ptr, lse_ptr, delta_ptr, sums_ptr,
    q_strides, k_strides, v_strides, grad_strides,
    heads, dilation, size, images, shares, slots_y, slots_x, scale, factor,
    ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAD: tl.constexpr, PAD_V: tl.constexpr, DILATED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides, grad_strides = in_elements(v_strides, UNIT), in_elements(grad_strides, UNIT)
    M: tl.constexpr = ROWS.tile * COLS.tile
    N: tl.constexpr = ROWS.walk * COLS.walk
    STEPS: tl.constexpr = ROWS.walks * COLS.walks
    pid = tl.program_id(0)
    step, head, work = pid % STEPS, pid // STEPS % heads, pid // STEPS // heads
    step_y, step_x = step // COLS.walks, step % COLS.walks
    share, slot = work % shares, work // shares
    of_cols = slots_x[0] + slots_x[1] + slots_x[3] - slots_x[2] + slots_x[4] + slots_x[5] + slots_x[7] - slots_x[6]
    first_y, past_y, next_y, low_y, groups_y, apart_y = tiles_of_slot(
        slot // of_cols, slots_y, size[0], dilation[0], ROWS
    )
    first_x, past_x, next_x, low_x, groups_x, apart_x = tiles_of_slot(
        slot % of_cols, slots_x, size[1], dilation[1], COLS
    )
    turns = tl.cdiv(images - share, shares) * groups_y * groups_x
    turns *= tl.cdiv(past_y - first_y, next_y) * tl.cdiv(past_x - first_x, next_x)
    m, n = tl.arange(0, M), tl.arange(0, N)
    cell, known = table_cells(
        (m // COLS.tile - apart_y)[:, None], (m % COLS.tile - apart_x)[:, None],
        (walk_offset(step_y, ROWS) + n // COLS.walk)[None, :], (walk_offset(step_x, COLS) + n % COLS.walk)[None, :],
        ROWS, COLS,
    )  # fmt: skip
    bias = tl.load(table_ptr + head * CELLS + cell, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((M, N), tl.float32)
    image, tile_y, tile_x, group_y, group_x = share, first_y, first_x, low_y, low_x
    for _ in range(turns):
        y, valid_y, begin_y, _, keys_y, word_y, high_y = own(
            m // COLS.tile, tile_y, group_y, dilation[0], size[0], size[0], ROWS
        )
        x, valid_x, begin_x, _, keys_x, word_x, high_x = own(
            m % COLS.tile, tile_x, group_x, dilation[1], size[1], size[1], COLS
        )
        key_y, inside_y = walk(step_y, n // COLS.walk, begin_y, keys_y, ROWS)
        key_x, inside_x = walk(step_x, n % COLS.walk, begin_x, keys_x, COLS)
        valid, inside, of_image = valid_y & valid_x, inside_y & inside_x, image.to(tl.int64)
        q_offs = of_image * q_strides[0] + head * q_strides[3]
        q_offs += map_offsets(y, x, group_y, group_x, dilation, q_strides)
        k_offs = of_image * k_strides[0] + head * k_strides[3]
        k_offs += map_offsets(key_y, key_x, group_y, group_x, dilation, k_strides)
        v_offs = of_image * v_strides[0] + head * v_strides[3]
        v_offs += map_offsets(key_y, key_x, group_y, group_x, dilation, v_strides)
        grad_offs = of_image * grad_strides[0] + head * grad_strides[3]
        grad_offs += map_offsets(y, x, group_y, group_x, dilation, grad_strides)
        lse_offs = (of_image * heads + head) * (size[0] * size[1])
        lse_offs += (group_y + y * dilation[0]) * size[1] + group_x + x * dilation[1]
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
        # the next image, else tile, else group: counters, as divisions take more instructions
        image += shares
        wrap = image >= images
        image, tile_x = tl.where(wrap, share, image), tl.where(wrap, tile_x + next_x, tile_x)
        wrap = tile_x >= past_x
        tile_x, tile_y = tl.where(wrap, first_x, tile_x), tl.where(wrap, tile_y + next_y, tile_y)
        if DILATED:
            wrap = tile_y >= past_y
            tile_y, group_x = tl.where(wrap, first_y, tile_y), tl.where(wrap, group_x + 1, group_x)
            wrap = group_x >= low_x + groups_x
            group_x, group_y = tl.where(wrap, low_x, group_x), tl.where(wrap, group_y + 1, group_y)
    tl.store(sums_ptr + pid.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :], total)


@triton.jit
def place_in_tile(place, apart, AXIS: tl.constexpr):
    """An owner's place in its tile, from its distance to the first walked token, and whether it is one of the tile."""
    m = place + apart
    return m, (m >= 0) & (m < AXIS.tile)


@triton.jit(do_not_specialize=(*SIZES, "size", "works", "shares", "slots_y", "slots_x"))
def table_gradient_kernel(
    sums_ptr, dtable_ptr, heads, dilation, size, works, shares, slots_y, slots_x,
    ROWS: tl.constexpr, COLS: tl.constexpr, COLUMNS: tl.constexpr, SEVERAL_Y: tl.constexpr, SEVERAL_X: tl.constexpr,
    CLOSED: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Sum what the cells [row, column block] of a table were read for.

    Neighborhoods: a row is a row distance, and each owner of a tile reads a cell once at most. Windows: a row is a
    query of the window, and each of the SEVERAL windows in a tile reads a cell once.
    """
    M: tl.constexpr = ROWS.tile * COLS.tile
    N: tl.constexpr = ROWS.walk * COLS.walk
    H: tl.constexpr = ROWS.keys
    W: tl.constexpr = COLS.keys
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    head, row, columns = pid % heads, pid // heads // BLOCKS, pid // heads % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    c = columns[None, :]
    of_cols = slots_x[0] + slots_x[1] + slots_x[3] - slots_x[2] + slots_x[4] + slots_x[5] + slots_x[7] - slots_x[6]
    total = tl.zeros((ENTRIES, BLOCK), tl.float32)
    for first in range(0, works * (SEVERAL_Y * SEVERAL_X), ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        work, one = entry // (SEVERAL_Y * SEVERAL_X), entry % (SEVERAL_Y * SEVERAL_X)
        one_y, one_x = one // SEVERAL_X, one % SEVERAL_X
        if CLOSED:
            apart_y, apart_x = 0, 0
        else:
            slot = work // shares
            _, _, _, _, _, apart_y = tiles_of_slot(slot // of_cols, slots_y, size[0], dilation[0], ROWS)
            _, _, _, _, _, apart_x = tiles_of_slot(slot % of_cols, slots_x, size[1], dilation[1], COLS)
        if ROWS.kind == "block":
            m_y, mine_y = place_in_tile(one_y * H + row // W, apart_y, ROWS)
            m_x, mine_x = place_in_tile(one_x * W + row % W, apart_x, COLS)
            walked_y, walked_x = one_y[:, None] * H + c // W, one_x[:, None] * W + c % W
            mine = (mine_y & mine_x)[:, None]
        else:
            m_y, m_x = one_y, one_x
            walked_y, walked_x = (m_y - apart_y + row - (H - 1))[:, None], (m_x - apart_x)[:, None] + c - (W - 1)
            mine = (walked_y >= 0) & (walked_x >= 0)
        # an owner's tile may be longer than the map, on which the walk ends
        mine &= (walked_y < ROWS.walks * ROWS.walk) & (walked_x < COLS.walks * COLS.walk)
        step = walked_y // ROWS.walk * COLS.walks + walked_x // COLS.walk
        n = walked_y % ROWS.walk * COLS.walk + walked_x % COLS.walk
        tiles = ((work.to(tl.int64) * heads + head) * (ROWS.walks * COLS.walks))[:, None] + step
        mine &= (entry < works * (SEVERAL_Y * SEVERAL_X))[:, None] & (c < COLUMNS)
        total += tl.load(sums_ptr + (tiles * M + (m_y * COLS.tile + m_x)[:, None]) * N + n, mask=mine, other=0.0)
    if ROWS.kind == "block":
        rows = H * W
    else:
        rows = 2 * H - 1
    dtable_ptr += (head * rows + row).to(tl.int64) * COLUMNS + columns
    tl.store(dtable_ptr, tl.sum(total, 0).to(dtable_ptr.dtype.element_ty), mask=columns < COLUMNS)


def table_gradient(
    sums: Tensor, dtable: Tensor, pattern: Pattern, plan: Plan, size: tuple[int, int], shares: Shares | None
) -> None:
    """Write the gradient of a table, (heads, ...), contiguous: partial sums, added cell by cell.

    Args:
        sums: (works, heads, steps, owners, walked) fp32.
        size: of the map, (rows, columns).
        shares: which work summed what; None where all tiles begin with the first token that they walk over.
    """
    rows, cols = plan.rows, plan.cols
    if pattern.kind == "block":
        lines = columns = rows.keys * cols.keys
        several = [axis.step // axis.keys for axis in (rows, cols)]
    else:
        lines, columns, several = 2 * rows.keys - 1, 2 * cols.keys - 1, [rows.tile, cols.tile]
    block = min(power_of_2(columns), 128)
    entries = max(min(ENTRIES // block, power_of_2(len(sums) * several[0] * several[1])), 1)
    slots_y, slots_x = ((0,) * 8,) * 2 if shares is None else shares.numbers
    grid = (sums.shape[1] * lines * cdiv(columns, block),)
    table_gradient_kernel[grid](
        sums, dtable, sums.shape[1], pattern.dilation, size, len(sums), 1 if shares is None else shares.images,
        slots_y, slots_x, ROWS=rows, COLS=cols, COLUMNS=columns, SEVERAL_Y=several[0], SEVERAL_X=several[1],
        CLOSED=shares is None, BLOCK=block, ENTRIES=entries, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
