"""Attention with a clipped softmax, bit masks and gates, backward (Triton): dq and the gate, then dk and dv.

Paper      as in forward.py. The clipped sum is no softmax: delta is not out . grad, and is summed over the keys first.
Tensors    as in forward.py; grad: (B, H, W, heads, DIM_V); delta: as lse; dgate: (B, heads, H, W) fp32.
Grid       as in forward.py; dkv owns tiles of keys. No atomics.
Numerics   logits as in forward.py; sums in fp32; probabilities and logit gradients are rounded to the dtype of q for
           products.
Memory     O(tile) on chip; no logits reach HBM.
"""

import triton
import triton.language as tl

from .tokens import clip, clip_grad, find, load, locate, pairs, store


@triton.jit
def clipped_dq_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, bits_ptr, grad_ptr, lse_ptr, dq_ptr, dgate_ptr, delta_ptr,
    q_strides, k_strides, v_strides, gate_strides, bits_strides, grad_strides, dq_strides,
    heads, windows, queries, keys, scale, scale_log2, gamma, stretch,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CLIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries[0] * queries[1], M)
    image, head, window_y, window_x, tile = locate(heads, windows, tiles)
    m = tile * M + tl.arange(0, M)
    q_offs, q_at, q_inside = find(m, window_y, window_x, queries, q_strides)
    grad_offs, _, _ = find(m, window_y, window_x, queries, grad_strides)
    q = load(q_ptr + image * q_strides[0] + head * q_strides[3], q_offs, q_inside, DIM, PAD)  # [M, D]
    grad = load(grad_ptr + image * grad_strides[0] + head * grad_strides[3], grad_offs, q_inside, DIM_V, PAD_V)
    k_ptr += image * k_strides[0] + head * k_strides[3]
    v_ptr += image * v_strides[0] + head * v_strides[3]
    bits_ptr += image * bits_strides[0] + head * bits_strides[1]
    of_map = (image * heads + head) * (queries[4] * queries[5])
    lse = tl.load(lse_ptr + of_map + q_at, mask=q_inside, other=float("inf"))
    gate = tl.full((M,), 1.0, tl.float32)
    if HAS_GATE:
        gate_offs, _, _ = find(m, window_y, window_x, queries, gate_strides)
        gate_ptr += image * gate_strides[0] + head * gate_strides[3]
        gate = tl.load(gate_ptr + gate_offs, mask=q_inside, other=0.0).to(tl.float32)

    delta = tl.zeros((M,), tl.float32)
    dgate = tl.zeros((M,), tl.float32)
    count = keys[0] * keys[1]
    for start in range(0, count, N):
        n = start + tl.arange(0, N)
        k_offs, _, k_inside = find(n, window_y, window_x, keys, k_strides)
        v_offs, _, _ = find(n, window_y, window_x, keys, v_strides)
        seen = pairs(q_inside, k_inside, m, n, bits_ptr, bits_strides[2], HAS_BITS)
        k = load(k_ptr, k_offs, k_inside, DIM, PAD)
        v = load(v_ptr, v_offs, k_inside, DIM_V, PAD_V)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
        probs = tl.where(seen, tl.exp2(logits - lse[:, None]), 0.0)
        dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if HAS_GATE:
            dgate += tl.sum(tl.where(seen, clip(probs, gamma, stretch, CLIP), 0.0) * dprobs, 1)
        delta += tl.sum(probs * clip_grad(probs, dprobs, gamma, stretch, CLIP), 1)
    delta *= gate
    tl.store(delta_ptr + of_map + q_at, delta, mask=q_inside)
    if HAS_GATE:
        tl.store(dgate_ptr + of_map + q_at, dgate, mask=q_inside)

    dq = tl.zeros((M, PAD), tl.float32)
    for start in range(0, count, N):
        n = start + tl.arange(0, N)
        k_offs, _, k_inside = find(n, window_y, window_x, keys, k_strides)
        v_offs, _, _ = find(n, window_y, window_x, keys, v_strides)
        seen = pairs(q_inside, k_inside, m, n, bits_ptr, bits_strides[2], HAS_BITS)
        k = load(k_ptr, k_offs, k_inside, DIM, PAD)
        v = load(v_ptr, v_offs, k_inside, DIM_V, PAD_V)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        probs = tl.where(seen, tl.exp2(logits - lse[:, None]), 0.0)
        dprobs = clip_grad(probs, tl.dot(grad, tl.trans(v), input_precision=PRECISION), gamma, stretch, CLIP)
        dlogits = probs * (dprobs * gate[:, None] - delta[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_offs, _, _ = find(m, window_y, window_x, queries, dq_strides)
    store(dq_ptr + image * dq_strides[0] + head * dq_strides[3], dq_offs, q_inside, dq * scale, DIM, PAD)


@triton.jit
def clipped_dkv_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, bits_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, gate_strides, bits_strides, grad_strides, dk_strides, dv_strides,
    heads, windows, queries, keys, scale, scale_log2, gamma, stretch,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CLIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BITS: tl.constexpr, WANTS_DK: tl.constexpr,
    WANTS_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys[0] * keys[1], N)
    image, head, window_y, window_x, tile = locate(heads, windows, tiles)
    n = tile * N + tl.arange(0, N)
    k_offs, _, k_inside = find(n, window_y, window_x, keys, k_strides)
    v_offs, _, _ = find(n, window_y, window_x, keys, v_strides)
    k = load(k_ptr + image * k_strides[0] + head * k_strides[3], k_offs, k_inside, DIM, PAD)  # [N, D]
    v = load(v_ptr + image * v_strides[0] + head * v_strides[3], v_offs, k_inside, DIM_V, PAD_V)  # [N, DV]
    q_ptr += image * q_strides[0] + head * q_strides[3]
    grad_ptr += image * grad_strides[0] + head * grad_strides[3]
    gate_ptr += image * gate_strides[0] + head * gate_strides[3]
    bits_ptr += image * bits_strides[0] + head * bits_strides[1]
    of_map = (image * heads + head) * (queries[4] * queries[5])
    lse_ptr += of_map
    delta_ptr += of_map

    dk = tl.zeros((N, PAD), tl.float32)
    dv = tl.zeros((N, PAD_V), tl.float32)
    for start in range(0, queries[0] * queries[1], M):
        m = start + tl.arange(0, M)
        q_offs, q_at, q_inside = find(m, window_y, window_x, queries, q_strides)
        grad_offs, _, _ = find(m, window_y, window_x, queries, grad_strides)
        q = load(q_ptr, q_offs, q_inside, DIM, PAD)  # [M, D]
        grad = load(grad_ptr, grad_offs, q_inside, DIM_V, PAD_V)  # [M, DV]
        lse = tl.load(lse_ptr + q_at, mask=q_inside, other=float("inf"))
        gate = tl.full((M,), 1.0, tl.float32)
        if HAS_GATE:
            gate_offs, _, _ = find(m, window_y, window_x, queries, gate_strides)
            gate = tl.load(gate_ptr + gate_offs, mask=q_inside, other=0.0).to(tl.float32)
        seen = pairs(q_inside, k_inside, m, n, bits_ptr, bits_strides[2], HAS_BITS)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
        probs = tl.where(seen, tl.exp2(logits - lse[:, None]), 0.0)
        if WANTS_DV:
            kept = tl.where(seen, clip(probs, gamma, stretch, CLIP) * gate[:, None], 0.0)
            dv = tl.dot(tl.trans(kept.to(grad.dtype)), grad, dv, input_precision=PRECISION)
        if WANTS_DK:
            delta = tl.load(delta_ptr + q_at, mask=q_inside, other=0.0)
            dprobs = clip_grad(probs, tl.dot(grad, tl.trans(v), input_precision=PRECISION), gamma, stretch, CLIP)
            dlogits = probs * (dprobs * gate[:, None] - delta[:, None])
            dk = tl.dot(tl.trans(dlogits.to(q.dtype)), q, dk, input_precision=PRECISION)

    if WANTS_DK:
        dk_offs, _, _ = find(n, window_y, window_x, keys, dk_strides)
        store(dk_ptr + image * dk_strides[0] + head * dk_strides[3], dk_offs, k_inside, dk * scale, DIM, PAD)
    if WANTS_DV:
        dv_offs, _, _ = find(n, window_y, window_x, keys, dv_strides)
        store(dv_ptr + image * dv_strides[0] + head * dv_strides[3], dv_offs, k_inside, dv, DIM_V, PAD_V)
