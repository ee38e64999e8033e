"""Local attention, backward in one pass (Triton): all gradients of tokens that see nothing outside their tile.

Paper      as in forward.py. These patterns are windows of at most 64 tokens, and maps or dilation groups of one tile.
Tensors    as in backward.py; sums: (programs of a head, heads, M, N) fp32, the bias' gradient in parts to be summed.
Grid       heads * dilation groups * shares, heads fastest: a program walks over images (windows: and tiles).
Numerics   as in backward.py. The mask is a bias of -inf, made once a program. Every sum has a fixed order, no atomics.
Memory     reads q, k, v, out, grad once and writes dq, dk, dv once; logits, and the bias' gradient, stay on chip. Where
           q, k, v have the same strides, and so have out and grad, and dq, dk, dv have one of the two (ALIKE; PACKED:
           those of q), fewer offsets leave registers free.
"""

import math

import triton
import triton.language as tl

from .bias import table_cells
from .intervals import hidden, in_elements, load_tokens, map_offsets, of_head, own, store_tokens, walk
from .plan import SIZES

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def closed_bias(
    table_ptr, head, group_y, group_x, dilation, size,
    ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """[M, M]: bias * log2(e) of all tiles of a head and group, -inf where a query does not see a key."""
    M: tl.constexpr = ROWS.tile * COLS.tile
    m, n = tl.arange(0, M), tl.arange(0, M)
    cell, known = table_cells(
        (m // COLS.tile)[:, None], (m % COLS.tile)[:, None], (n // COLS.tile)[None, :], (n % COLS.tile)[None, :],
        ROWS, COLS,
    )  # fmt: skip
    if ROWS.kind == "block":
        unseen = ~known  # of another window
    else:
        y, _, begin_y, _, keys_y, word_y, high_y = own(m // COLS.tile, 0, group_y, dilation[0], size[0], size[0], ROWS)
        x, _, begin_x, _, keys_x, word_x, high_x = own(m % COLS.tile, 0, group_x, dilation[1], size[1], size[1], COLS)
        key_y, inside_y = walk(0, n // COLS.tile, begin_y, keys_y, ROWS)
        key_x, inside_x = walk(0, n % COLS.tile, begin_x, keys_x, COLS)
        unseen = hidden(word_y, high_y, word_x, high_x, 0, 0, y, x, key_y, key_x, inside_y & inside_x, ROWS, COLS)
    if CELLS > 0:
        bias = tl.load(table_ptr + head * CELLS + cell, mask=known, other=0.0).to(tl.float32) * LOG2_E
    else:
        bias = tl.zeros((M, M), tl.float32)
    return tl.where(unseen, float("-inf"), bias)


@triton.jit
def token_of_unit(m, unit, group, dilation, size, tiles, i: tl.constexpr, AXIS: tl.constexpr, OTHER: tl.constexpr):
    """One axis of the tokens [M] of a tile, and which of them it owns."""
    place = m // OTHER.tile if i == 0 else m % AXIS.tile
    if AXIS.kind == "block":  # a unit is a tile of an image
        tile = unit // tiles[1] % tiles[0] if i == 0 else unit % tiles[1]
        x = AXIS.first + tile * AXIS.step + place
        inside = (place < AXIS.step) & (x < size)
        if AXIS.first < 0:
            inside = inside & (x >= 0)
    else:
        x = place
        inside = place < (size - group + dilation - 1) // dilation
    return x, inside


@triton.jit(do_not_specialize=(*SIZES, "size", "units", "shares"))
def local_closed_forward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
    heads, tiles, dilation, size, units, shares, scale_log2,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr,
    PAD_V: tl.constexpr, CELLS: tl.constexpr, ALIKE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides, out_strides = in_elements(v_strides, UNIT), in_elements(out_strides, UNIT)
    M: tl.constexpr = ROWS.tile * COLS.tile
    head, pid = tl.program_id(0) % heads, tl.program_id(0) // heads
    group_x, pid = pid % dilation[1], pid // dilation[1]
    group_y, share = pid % dilation[0], pid // dilation[0]
    bias = closed_bias(table_ptr, head, group_y, group_x, dilation, size, ROWS, COLS, CELLS)
    m = tl.arange(0, M)
    for unit in range(share, units, shares):
        row, inside_y = token_of_unit(m, unit, group_y, dilation[0], size[0], tiles, 0, ROWS, COLS)
        col, inside_x = token_of_unit(m, unit, group_x, dilation[1], size[1], tiles, 1, COLS, ROWS)
        mine = inside_y & inside_x
        image = tl.cast(unit // (tiles[1] * tiles[0]) if ROWS.kind == "block" else unit, tl.int64)
        q_offs = map_offsets(row, col, group_y, group_x, dilation, q_strides)
        k_offs = q_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, k_strides)
        v_offs = q_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, v_strides)
        q = load_tokens(of_head(q_ptr, q_strides, image, head), q_offs, mine, DIM, PAD)  # [M, D]
        k = load_tokens(of_head(k_ptr, k_strides, image, head), k_offs, mine, DIM, PAD)
        v = load_tokens(of_head(v_ptr, v_strides, image, head), v_offs, mine, DIM_V, PAD_V)  # [M, DV]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias  # [M, M]
        if ROWS.shift > 0 or COLS.shift > 0:  # the map cuts off windows
            logits += tl.where(mine, 0.0, float("-inf"))[None, :]
        top = tl.max(logits, 1)  # finite: every query sees a key
        probs = tl.exp2(logits - top[:, None])
        total = tl.sum(probs, 1)
        out = tl.dot(probs.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        out_offs = map_offsets(row, col, group_y, group_x, dilation, out_strides)
        store_tokens(of_head(out_ptr, out_strides, image, head), out_offs, mine, out, DIM_V, PAD_V)
        lse_offs = (image * heads + head) * (size[0] * size[1])
        lse_offs += (group_y + row * dilation[0]) * size[1] + group_x + col * dilation[1]
        tl.store(lse_ptr + lse_offs, top + tl.log2(total), mask=mine)


@triton.jit(do_not_specialize=(*SIZES, "size", "units", "shares"))
def local_backward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, sums_ptr,
    q_strides, k_strides, v_strides, out_strides, grad_strides, dq_strides, dk_strides, dv_strides,
    heads, tiles, dilation, size, units, shares, scale, scale_log2,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr,
    PAD_V: tl.constexpr, CELLS: tl.constexpr, BIAS_GRAD: tl.constexpr, ALIKE: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides, out_strides = in_elements(v_strides, UNIT), in_elements(out_strides, UNIT)
    grad_strides, dq_strides = in_elements(grad_strides, UNIT), in_elements(dq_strides, UNIT)
    dk_strides, dv_strides = in_elements(dk_strides, UNIT), in_elements(dv_strides, UNIT)
    M: tl.constexpr = ROWS.tile * COLS.tile
    head, pid = tl.program_id(0) % heads, tl.program_id(0) // heads
    group_x, pid = pid % dilation[1], pid // dilation[1]
    group_y, share = pid % dilation[0], pid // dilation[0]
    bias = closed_bias(table_ptr, head, group_y, group_x, dilation, size, ROWS, COLS, CELLS)
    m = tl.arange(0, M)
    if BIAS_GRAD:
        dbias = tl.zeros((M, M), tl.float32)
    for unit in range(share, units, shares):
        row, inside_y = token_of_unit(m, unit, group_y, dilation[0], size[0], tiles, 0, ROWS, COLS)
        col, inside_x = token_of_unit(m, unit, group_x, dilation[1], size[1], tiles, 1, COLS, ROWS)
        mine = inside_y & inside_x
        image = tl.cast(unit // (tiles[1] * tiles[0]) if ROWS.kind == "block" else unit, tl.int64)
        q_offs = map_offsets(row, col, group_y, group_x, dilation, q_strides)
        k_offs = q_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, k_strides)
        v_offs = q_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, v_strides)
        out_offs = map_offsets(row, col, group_y, group_x, dilation, out_strides)
        grad_offs = out_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, grad_strides)
        q = load_tokens(of_head(q_ptr, q_strides, image, head), q_offs, mine, DIM, PAD)  # [M, D]
        k = load_tokens(of_head(k_ptr, k_strides, image, head), k_offs, mine, DIM, PAD)
        v = load_tokens(of_head(v_ptr, v_strides, image, head), v_offs, mine, DIM_V, PAD_V)  # [M, DV]
        out = load_tokens(of_head(out_ptr, out_strides, image, head), out_offs, mine, DIM_V, PAD_V)
        grad = load_tokens(of_head(grad_ptr, grad_strides, image, head), grad_offs, mine, DIM_V, PAD_V)
        lse_offs = (image * heads + head) * (size[0] * size[1])
        lse_offs += (group_y + row * dilation[0]) * size[1] + group_x + col * dilation[1]
        lse = tl.load(lse_ptr + lse_offs, mask=mine, other=float("inf"))  # exp2(-inf): no share where there is no query
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, M]
        logits = logits * scale_log2 + bias - lse[:, None]
        if ROWS.shift > 0 or COLS.shift > 0:
            logits += tl.where(mine, 0.0, float("-inf"))[None, :]
        probs = tl.exp2(logits)
        dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        dlogits = probs * (dprobs - delta[:, None])
        if BIAS_GRAD:
            dbias += dlogits
        rounded = dlogits.to(q.dtype)
        dv = tl.dot(tl.trans(probs.to(grad.dtype)), grad, input_precision=PRECISION)  # [M, DV]
        shared_offs = q_offs if PACKED else out_offs
        dv_offs = shared_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, dv_strides)
        store_tokens(of_head(dv_ptr, dv_strides, image, head), dv_offs, mine, dv, DIM_V, PAD_V)
        dk = tl.dot(tl.trans(rounded), q, input_precision=PRECISION)  # [M, D]
        dk_offs = shared_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, dk_strides)
        store_tokens(of_head(dk_ptr, dk_strides, image, head), dk_offs, mine, dk * scale, DIM, PAD)
        dq = tl.dot(rounded, k, input_precision=PRECISION)
        dq_offs = shared_offs if ALIKE else map_offsets(row, col, group_y, group_x, dilation, dq_strides)
        store_tokens(of_head(dq_ptr, dq_strides, image, head), dq_offs, mine, dq * scale, DIM, PAD)
    if BIAS_GRAD:
        cells = tl.program_id(0).to(tl.int64) * (M * M) + m[:, None] * M + m[None, :]
        tl.store(sums_ptr + cells, dbias)
