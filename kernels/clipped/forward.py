"""Attention with a clipped softmax, bit masks and gates, forward (Triton): in windows, or of all tokens.

Paper      Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929; the walk over keys: Dao et al., arXiv:2205.14135.
Tensors    q: (B, H, W, heads, DIM); k: (B, Hk, Wk, heads, DIM); v: the same with DIM_V; out: (B, H, W, heads, DIM_V);
           head_dim contiguous. gate: (B, H, W, heads), any strides. lse: (B, heads, H, W) fp32, base 2. bits: (B,
           heads, queries, words) int32, any strides but the last.
Grid       B * windows * tiles of a window's queries * heads, heads fastest: one program owns one tile of one head.
Numerics   logits, softmax and sums in fp32, probabilities rounded to v's dtype; exp2, so `scale_log2` carries log2(e).
Memory     O(tile) on chip; no logits reach HBM. A clipped softmax reads the keys twice: for lse, then for the sum.
"""

import triton
import triton.language as tl

from .tokens import FLOOR, clip, find, load, locate, pairs, store


@triton.jit
def clipped_forward_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, bits_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, gate_strides, bits_strides, out_strides,
    heads, windows, queries, keys, scale_log2, gamma, stretch,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CLIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BITS: tl.constexpr, HAS_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries[0] * queries[1], M)
    image, head, window_y, window_x, tile = locate(heads, windows, tiles)
    m = tile * M + tl.arange(0, M)
    q_offs, q_at, q_inside = find(m, window_y, window_x, queries, q_strides)
    q = load(q_ptr + image * q_strides[0] + head * q_strides[3], q_offs, q_inside, DIM, PAD)  # [M, D]
    k_ptr += image * k_strides[0] + head * k_strides[3]
    v_ptr += image * v_strides[0] + head * v_strides[3]
    bits_ptr += image * bits_strides[0] + head * bits_strides[1]

    top = tl.full((M,), FLOOR, tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, PAD_V), tl.float32)
    count = keys[0] * keys[1]
    for start in range(0, count, N):
        n = start + tl.arange(0, N)
        k_offs, _, k_inside = find(n, window_y, window_x, keys, k_strides)
        seen = pairs(q_inside, k_inside, m, n, bits_ptr, bits_strides[2], HAS_BITS)
        k = load(k_ptr, k_offs, k_inside, DIM, PAD)  # [N, D]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
        logits = tl.where(seen, logits, FLOOR)
        new_top = tl.maximum(top, tl.max(logits, 1))
        probs = tl.where(seen, tl.exp2(logits - new_top[:, None]), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(probs, 1)
        top = new_top
        if HAS_OUT and not CLIP:
            v_offs, _, _ = find(n, window_y, window_x, keys, v_strides)
            v = load(v_ptr, v_offs, k_inside, DIM_V, PAD_V)  # [N, DV]
            acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    blind = total == 0.0  # sees no key
    total = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("inf"), top + tl.log2(total))
    lse_ptr += (image * heads + head) * (queries[4] * queries[5])
    tl.store(lse_ptr + q_at, lse, mask=q_inside)

    if HAS_OUT:
        if CLIP:
            for start in range(0, count, N):
                n = start + tl.arange(0, N)
                k_offs, _, k_inside = find(n, window_y, window_x, keys, k_strides)
                v_offs, _, _ = find(n, window_y, window_x, keys, v_strides)
                seen = pairs(q_inside, k_inside, m, n, bits_ptr, bits_strides[2], HAS_BITS)
                k = load(k_ptr, k_offs, k_inside, DIM, PAD)
                v = load(v_ptr, v_offs, k_inside, DIM_V, PAD_V)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
                probs = clip(tl.exp2(logits - lse[:, None]), gamma, stretch, CLIP)
                probs = tl.where(seen, probs, 0.0)
                acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
        else:
            acc = acc / total[:, None]
        if HAS_GATE:
            gate_offs, _, _ = find(m, window_y, window_x, queries, gate_strides)
            gate_ptr += image * gate_strides[0] + head * gate_strides[3]
            acc = acc * tl.load(gate_ptr + gate_offs, mask=q_inside, other=0.0).to(tl.float32)[:, None]
        out_offs, _, _ = find(m, window_y, window_x, queries, out_strides)
        store(out_ptr + image * out_strides[0] + head * out_strides[3], out_offs, q_inside, acc, DIM_V, PAD_V)
