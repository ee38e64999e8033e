"""Local attention, forward (Triton): a tile of queries walks over the tiles of keys that any of its queries sees.

Paper      Hassani et al. 2023, arXiv:2204.07143; Hassani and Shi 2022, arXiv:2209.15001; Liu et al. 2021,
           arXiv:2103.14030; Vaswani et al. 2021, arXiv:2103.12731; Liu et al. 2024, arXiv:2412.16112.
Tensors    q: (B, H, W, heads, DIM); k: (B, Hk, Wk, heads, DIM); v: the same with DIM_V; out: (B, H, W, heads, DIM_V).
           Any strides but a head_dim's, which is 1. lse: (B, heads, H, W) fp32, base 2. bias tiles: kernels/local/bias.
Grid       B * dilation groups * query tiles * heads, heads fastest: one program owns one tile of queries of one head.
Numerics   logits, softmax and sums in fp32, probabilities rounded to v's dtype; exp2 of `factor` * logits. With a
           bias or relative logits, logits are scaled before the sum, and factor is log2(e), else it carries the scale.
Memory     O(tile) on chip; no logits and no gathered keys reach HBM. For the backward pass one fp32 a query and head.
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

FLOOR = tl.constexpr(-1.0e30)  # finite, not -inf: a query may see no key of a whole tile, and inf - inf is NaN


@triton.jit(do_not_specialize=SIZES)
def local_forward_kernel(
    q_ptr, k_ptr, v_ptr, rel_ptr, bias_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, rel_strides, out_strides,
    heads, tiles, dilation, queries, keys, scale, factor,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    PAD: tl.constexpr, PAD_V: tl.constexpr, HAS_BIAS: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides, rel_strides = in_elements(v_strides, UNIT), in_elements(rel_strides, UNIT)
    out_strides = in_elements(out_strides, UNIT)
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
    q = load_tokens(q_ptr, map_offsets(y, x, group_y, group_x, dilation, q_strides), valid, DIM, PAD)  # [M, D]
    if PLACES > 0:
        rel_ptr = of_head(rel_ptr, rel_strides, image, head)
        rel_offs = map_offsets(y, x, group_y, group_x, dilation, rel_strides)
        rel = load_tokens(rel_ptr, rel_offs, valid, 2 * PLACES, 2 * PLACES)  # [M, 2 * PLACES]
    if HAS_BIAS:
        bias_ptr = bias_of_tile(bias_ptr, head, tile_y, tile_x, begin_y, begin_x, ROWS, COLS)

    top = tl.full((M,), FLOOR, tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, PAD_V), tl.float32)
    for step in range(visits_y * COLS.walks):
        step_y, step_x = step // COLS.walks, step % COLS.walks
        key_y, inside_y = walk(step_y, n // COLS.walk, begin_y, keys_y, ROWS)
        key_x, inside_x = walk(step_x, n % COLS.walk, begin_x, keys_x, COLS)
        inside = inside_y & inside_x
        k = load_tokens(k_ptr, map_offsets(key_y, key_x, group_y, group_x, dilation, k_strides), inside, DIM, PAD)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        if PLACES > 0:
            cells = place_cells(key_y - begin_y, key_x - begin_x, PLACES, q.dtype)  # [N, 2 * PLACES]
            logits = tl.dot(rel, tl.trans(cells), logits * scale, input_precision=PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + bias_of_step(step, step_y, step_x, ROWS, COLS))
            logits = logits * scale + bias.to(tl.float32)
        unseen = hidden(word_y, high_y, word_x, high_x, step_y, step_x, y, x, key_y, key_x, inside, ROWS, COLS)
        logits = tl.where(unseen, FLOOR, logits)
        new_top = tl.maximum(top, tl.max(logits, 1))
        probs = tl.exp2(logits * factor - (new_top * factor)[:, None])
        shrink = tl.exp2((top - new_top) * factor)
        total = total * shrink + tl.sum(probs, 1)
        top = new_top
        v = load_tokens(v_ptr, map_offsets(key_y, key_x, group_y, group_x, dilation, v_strides), inside, DIM_V, PAD_V)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    out_ptr = of_head(out_ptr, out_strides, image, head)
    out_offs = map_offsets(y, x, group_y, group_x, dilation, out_strides)
    store_tokens(out_ptr, out_offs, valid, acc / total[:, None], DIM_V, PAD_V)
    lse_offs = (group_y + y * dilation[0]) * queries[1] + group_x + x * dilation[1]
    lse_ptr += (image * heads + head) * (queries[0] * queries[1])
    tl.store(lse_ptr + lse_offs, top * factor + tl.log2(total), mask=valid)
