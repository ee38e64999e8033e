"""Local attention, backward (Triton): queries walk over keys for dq, keys over the queries that see them for dk, dv.

Paper      as in forward.py; probabilities are recomputed from lse as in Dao et al. 2022, arXiv:2205.14135.
Tensors    as in forward.py; grad: as out, any strides; grad_lse: as lse, or none; delta: (B, heads, H, W) fp32, what is
           subtracted from the gradients of probabilities: written by dq, read by dkv.
Grid       B * dilation groups * tiles * heads, heads fastest: one program owns one tile of one head. No atomics.
Numerics   logits as in forward.py; sums in fp32; probabilities and logit gradients are rounded to the dtype of q for
           products.
Memory     O(tile) on chip; no logits reach HBM.
"""

import triton
import triton.language as tl

from .bias import bias_of_step, bias_of_tile
from .intervals import (
    hidden,
    in_elements,
    load_tokens,
    locate,
    map_offsets,
    of_head,
    own,
    place_cells,
    store_tokens,
    walk,
)
from .plan import SIZES

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=SIZES)
def local_dq_kernel(
    q_ptr, k_ptr, v_ptr, rel_ptr, bias_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr,
    dq_ptr, drel_ptr, delta_ptr,
    q_strides, k_strides, v_strides, rel_strides, out_strides, grad_strides, dq_strides,
    heads, tiles, dilation, queries, keys, scale, factor,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAD: tl.constexpr, PAD_V: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    PLACES: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides, rel_strides = in_elements(v_strides, UNIT), in_elements(rel_strides, UNIT)
    out_strides, grad_strides = in_elements(out_strides, UNIT), in_elements(grad_strides, UNIT)
    dq_strides = in_elements(dq_strides, UNIT)
    M: tl.constexpr = ROWS.tile * COLS.tile
    N: tl.constexpr = ROWS.walk * COLS.walk
    image, head, tile_y, tile_x, group_y, group_x = locate(heads, tiles, dilation)
    m, n = tl.arange(0, M), tl.arange(0, N)
    y, valid_y, begin_y, visits_y, keys_y, word_y, high_y = own(
        m // COLS.tile, tile_y, group_y, dilation[0], queries[0], keys[0], ROWS
    )
    x, valid_x, begin_x, _, keys_x, word_x, high_x = own(
        m % COLS.tile, tile_x, group_x, dilation[1], queries[1], keys[1], COLS
    )
    valid = valid_y & valid_x
    q_ptr = of_head(q_ptr, q_strides, image, head)
    k_ptr = of_head(k_ptr, k_strides, image, head)
    v_ptr = of_head(v_ptr, v_strides, image, head)
    out_ptr = of_head(out_ptr, out_strides, image, head)
    grad_ptr = of_head(grad_ptr, grad_strides, image, head)
    lse_offs = (image * heads + head) * (queries[0] * queries[1])
    lse_offs += (group_y + y * dilation[0]) * queries[1] + group_x + x * dilation[1]
    q = load_tokens(q_ptr, map_offsets(y, x, group_y, group_x, dilation, q_strides), valid, DIM, PAD)  # [M, D]
    out = load_tokens(out_ptr, map_offsets(y, x, group_y, group_x, dilation, out_strides), valid, DIM_V, PAD_V)
    grad = load_tokens(grad_ptr, map_offsets(y, x, group_y, group_x, dilation, grad_strides), valid, DIM_V, PAD_V)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)  # [M]
    if HAS_GRAD_LSE:  # lse is in base 2
        delta -= tl.load(grad_lse_ptr + lse_offs, mask=valid, other=0.0) * LOG2_E
    tl.store(delta_ptr + lse_offs, delta, mask=valid)
    lse = tl.load(lse_ptr + lse_offs, mask=valid, other=0.0)
    if PLACES > 0:
        rel_offs = map_offsets(y, x, group_y, group_x, dilation, rel_strides)
        rel_offs += image * rel_strides[0] + head * rel_strides[3]
        rel = load_tokens(rel_ptr, rel_offs, valid, 2 * PLACES, 2 * PLACES)  # [M, 2 * PLACES]
        drel = tl.zeros((M, 2 * PLACES), tl.float32)
    if HAS_BIAS:
        bias_ptr = bias_of_tile(bias_ptr, head, tile_y, tile_x, begin_y, begin_x, ROWS, COLS)

    dq = tl.zeros((M, PAD), tl.float32)
    for step in range(visits_y * COLS.walks):
        step_y, step_x = step // COLS.walks, step % COLS.walks
        key_y, inside_y = walk(step_y, n // COLS.walk, begin_y, keys_y, ROWS)
        key_x, inside_x = walk(step_x, n % COLS.walk, begin_x, keys_x, COLS)
        inside = inside_y & inside_x
        k = load_tokens(k_ptr, map_offsets(key_y, key_x, group_y, group_x, dilation, k_strides), inside, DIM, PAD)
        v = load_tokens(v_ptr, map_offsets(key_y, key_x, group_y, group_x, dilation, v_strides), inside, DIM_V, PAD_V)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        if PLACES > 0:
            cells = place_cells(key_y - begin_y, key_x - begin_x, PLACES, q.dtype)  # [N, 2 * PLACES]
            logits = tl.dot(rel, tl.trans(cells), logits * scale, input_precision=PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + bias_of_step(step, step_y, step_x, ROWS, COLS))
            logits = logits * scale + bias.to(tl.float32)
        unseen = hidden(word_y, high_y, word_x, high_x, step_y, step_x, y, x, key_y, key_x, inside, ROWS, COLS)
        probs = tl.where(unseen, 0.0, tl.exp2(logits * factor - lse[:, None]))
        dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        dlogits = (probs * (dprobs - delta[:, None])).to(k.dtype)
        dq = tl.dot(dlogits, k, dq, input_precision=PRECISION)
        if PLACES > 0:
            drel = tl.dot(dlogits, cells, drel, input_precision=PRECISION)

    dq_ptr = of_head(dq_ptr, dq_strides, image, head)
    dq_offs = map_offsets(y, x, group_y, group_x, dilation, dq_strides)
    store_tokens(dq_ptr, dq_offs, valid, dq * scale, DIM, PAD)
    if PLACES > 0:
        store_tokens(drel_ptr, rel_offs, valid, drel, 2 * PLACES, 2 * PLACES)


@triton.jit(do_not_specialize=SIZES)
def local_dkv_kernel(
    q_ptr, k_ptr, v_ptr, rel_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, rel_strides, grad_strides, dk_strides, dv_strides,
    heads, tiles, dilation, queries, keys, scale, factor,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAD: tl.constexpr, PAD_V: tl.constexpr, HAS_BIAS: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides, rel_strides = in_elements(v_strides, UNIT), in_elements(rel_strides, UNIT)
    grad_strides, dk_strides = in_elements(grad_strides, UNIT), in_elements(dk_strides, UNIT)
    dv_strides = in_elements(dv_strides, UNIT)
    M: tl.constexpr = ROWS.tile * COLS.tile
    N: tl.constexpr = ROWS.walk * COLS.walk
    image, head, tile_y, tile_x, group_y, group_x = locate(heads, tiles, dilation)
    m, n = tl.arange(0, M), tl.arange(0, N)
    y, valid_y, begin_y, visits_y, queries_y, word_y, high_y = own(
        m // COLS.tile, tile_y, group_y, dilation[0], keys[0], queries[0], ROWS
    )
    x, valid_x, begin_x, _, queries_x, word_x, high_x = own(
        m % COLS.tile, tile_x, group_x, dilation[1], keys[1], queries[1], COLS
    )
    valid = valid_y & valid_x
    q_ptr = of_head(q_ptr, q_strides, image, head)
    k_ptr = of_head(k_ptr, k_strides, image, head)
    v_ptr = of_head(v_ptr, v_strides, image, head)
    grad_ptr = of_head(grad_ptr, grad_strides, image, head)
    lse_ptr += (image * heads + head) * (queries[0] * queries[1])
    delta_ptr += (image * heads + head) * (queries[0] * queries[1])
    k = load_tokens(k_ptr, map_offsets(y, x, group_y, group_x, dilation, k_strides), valid, DIM, PAD)  # [M, D]
    v = load_tokens(v_ptr, map_offsets(y, x, group_y, group_x, dilation, v_strides), valid, DIM_V, PAD_V)
    if PLACES > 0:
        rel_ptr = of_head(rel_ptr, rel_strides, image, head)
    if HAS_BIAS:
        bias_ptr = bias_of_tile(bias_ptr, head, tile_y, tile_x, begin_y, begin_x, ROWS, COLS)

    dk = tl.zeros((M, PAD), tl.float32)
    dv = tl.zeros((M, PAD_V), tl.float32)
    for step in range(visits_y * COLS.walks):
        step_y, step_x = step // COLS.walks, step % COLS.walks
        query_y, inside_y = walk(step_y, n // COLS.walk, begin_y, queries_y, ROWS)
        query_x, inside_x = walk(step_x, n % COLS.walk, begin_x, queries_x, COLS)
        inside = inside_y & inside_x
        q = load_tokens(q_ptr, map_offsets(query_y, query_x, group_y, group_x, dilation, q_strides), inside, DIM, PAD)
        grad_offs = map_offsets(query_y, query_x, group_y, group_x, dilation, grad_strides)
        grad = load_tokens(grad_ptr, grad_offs, inside, DIM_V, PAD_V)  # [N, DV]
        lse_offs = (group_y + query_y * dilation[0]) * queries[1] + group_x + query_x * dilation[1]
        lse = tl.load(lse_ptr + lse_offs, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + lse_offs, mask=inside, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [M, N]
        if PLACES > 0:  # a key's place in the window of the walked block
            top = (begin_y + step_y // ROWS.walk_split * ROWS.walk_step) // ROWS.queries * ROWS.keys - ROWS.reach
            left = (begin_x + step_x // COLS.walk_split * COLS.walk_step) // COLS.queries * COLS.keys - COLS.reach
            cells = place_cells(y - top, x - left, PLACES, k.dtype)  # [M, 2 * PLACES]
            rel_offs = map_offsets(query_y, query_x, group_y, group_x, dilation, rel_strides)
            rel = load_tokens(rel_ptr, rel_offs, inside, 2 * PLACES, 2 * PLACES)  # [N, 2 * PLACES]
            logits = tl.dot(cells, tl.trans(rel), logits * scale, input_precision=PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + bias_of_step(step, step_y, step_x, ROWS, COLS))
            logits = logits * scale + bias.to(tl.float32)
        unseen = hidden(word_y, high_y, word_x, high_x, step_y, step_x, y, x, query_y, query_x, inside, ROWS, COLS)
        probs = tl.where(unseen, 0.0, tl.exp2(logits * factor - lse[None, :]))
        dv = tl.dot(probs.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dprobs = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dlogits = (probs * (dprobs - delta[None, :])).to(q.dtype)
        dk = tl.dot(dlogits, q, dk, input_precision=PRECISION)

    dk_ptr = of_head(dk_ptr, dk_strides, image, head)
    dv_ptr = of_head(dv_ptr, dv_strides, image, head)
    store_tokens(dk_ptr, map_offsets(y, x, group_y, group_x, dilation, dk_strides), valid, dk * scale, DIM, PAD)
    store_tokens(dv_ptr, map_offsets(y, x, group_y, group_x, dilation, dv_strides), valid, dv, DIM_V, PAD_V)
