"""Routed attention, backward (Triton): queries walk their routes again, keys walk the lists of who sees them.

Paper      Zhu et al. 2023, arXiv:2303.08810, section 3.2.
Tensors    as in the forward pass; lse, delta: (B, heads, regions, tokens) fp32. delta = sum(out * grad_out) of a query.
Grid       dq: as the forward pass. dk, dv: B * heads * regions * key tiles, before it as many for pieces of long lists.
Numerics   fp32 inside, one rounding on store; no atomics, so a run gives the bits of the last one.
Memory     no logits in HBM; delta, and fp32 sums of at most regions / 4 regions for the pieces of long lists.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, eager_backward, on_device, power_of_2, refuse_second_derivative, without_autocast
from ..packed import empty_gradients, separate
from .inverse import InverseRoutes, invert_routes
from .invert import launch_inverse
from .plan import MOST_INVERTED, Regions, constants, region_tiles
from .tokens import load_region, routes_are_valid, store_region


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, out_strides, grad_strides, dq_strides,
    scale, scale_log2, heads, regions, topk,
    GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_COLS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOPK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS * COLS
    KEYS: tl.constexpr = KEY_ROWS * KEY_COLS
    tiles = tl.cdiv(QUERIES, BLOCK_M)
    region = tl.program_id(0) // tiles % regions
    head = tl.program_id(0) // (tiles * regions) % heads
    image = (tl.program_id(0) // (tiles * regions * heads)).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < QUERIES
    q = load_region(q_ptr, q_strides, image, head, region, m, inside, GRID_W, ROWS, COLS, D, BLOCK_D)  # [M, D]
    out = load_region(out_ptr, out_strides, image, head, region, m, inside, GRID_W, ROWS, COLS, DV, BLOCK_DV)
    grad = load_region(grad_ptr, grad_strides, image, head, region, m, inside, GRID_W, ROWS, COLS, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    rows = ((image * heads + head) * regions + region) * QUERIES + m
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=inside)
    routes_ptr += (image * regions + region) * topk
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if not routes_are_valid(routes_ptr, topk, regions, TOPK):
        acc += float("nan")
        store_region(dq_ptr, acc, dq_strides, image, head, region, m, inside, GRID_W, ROWS, COLS, D, BLOCK_D)
        return
    for start in range(0, topk * KEYS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < topk * KEYS
        route = tl.load(routes_ptr + n // KEYS, mask=seen, other=0).to(tl.int32)
        k = load_region(k_ptr, k_strides, image, head, route, n % KEYS, seen, GRID_W, KEY_ROWS, KEY_COLS, D, BLOCK_D)
        v = load_region(v_ptr, v_strides, image, head, route, n % KEYS, seen, GRID_W, KEY_ROWS, KEY_COLS, DV, BLOCK_DV)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
        # A key past the last route is a row of zeros: its share of dq is zero, whatever its probability, but not
        # if that overflows.
        probs = tl.where(seen[None, :], tl.exp2(logits - lse[:, None]), 0.0)
        dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # [M, N]
        dlogits = probs * (dprobs - delta[:, None])
        acc = tl.dot(dlogits.to(k.dtype), k, acc, input_precision=PRECISION)  # [M, D]
    store_region(dq_ptr, acc * scale, dq_strides, image, head, region, m, inside, GRID_W, ROWS, COLS, D, BLOCK_D)


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_sums_ptr, dv_sums_ptr,
    queries_ptr, starts_ptr, ends_ptr, extra_starts_ptr, owners_ptr,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
    scale, scale_log2, heads, regions, lists, piece,
    GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_COLS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS * COLS
    KEYS: tl.constexpr = KEY_ROWS * KEY_COLS
    tiles = tl.cdiv(KEYS, BLOCK_N)
    head = tl.program_id(0) // tiles % heads
    place = tl.program_id(0) // (tiles * heads)  # of a list, or of an extra piece among all
    owner = tl.load(owners_ptr + place) if EXTRA else place
    if owner >= lists:
        return
    begin, end = tl.load(starts_ptr + owner), tl.load(ends_ptr + owner)
    extras = tl.maximum(end - begin - 1, 0) // piece
    if EXTRA:
        begin += (place - tl.load(extra_starts_ptr + owner) + 1) * piece
    if SPLIT:
        end = tl.minimum(end, begin + piece)
    region, image = owner % regions, (owner // regions).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < KEYS
    k = load_region(k_ptr, k_strides, image, head, region, n, inside, GRID_W, KEY_ROWS, KEY_COLS, D, BLOCK_D)
    v = load_region(v_ptr, v_strides, image, head, region, n, inside, GRID_W, KEY_ROWS, KEY_COLS, DV, BLOCK_DV)
    lse_ptr += (image * heads + head) * regions * QUERIES
    delta_ptr += (image * heads + head) * regions * QUERIES
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, (end - begin) * QUERIES, BLOCK_M):  # a tile of queries may hold several small regions
        m = start + tl.arange(0, BLOCK_M)
        seen = m < (end - begin) * QUERIES
        query = tl.load(queries_ptr + begin + m // QUERIES, mask=seen, other=0)
        q = load_region(q_ptr, q_strides, image, head, query, m % QUERIES, seen, GRID_W, ROWS, COLS, D, BLOCK_D)
        grad = load_region(
            grad_ptr, grad_strides, image, head, query, m % QUERIES, seen, GRID_W, ROWS, COLS, DV, BLOCK_DV
        )
        lse = tl.load(lse_ptr + query * QUERIES + m % QUERIES, mask=seen, other=float("inf"))  # exp2(-inf): no share
        delta = tl.load(delta_ptr + query * QUERIES + m % QUERIES, mask=seen, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [N, M]
        probs = tl.exp2(logits - lse[None, :])
        dv = tl.dot(probs.to(grad.dtype), grad, dv, input_precision=PRECISION)  # [N, DV]
        dprobs = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # [N, M]
        dlogits = probs * (dprobs - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)  # [N, D]

    # The sums of extra pieces are maps too: one image an extra piece, its region the whole map.
    dk_sum_strides = (heads * KEYS * D, KEY_COLS * D, D, KEYS * D, 1)
    dv_sum_strides = (heads * KEYS * DV, KEY_COLS * DV, DV, KEYS * DV, 1)
    if EXTRA:
        at = place.to(tl.int64)
        store_region(dk_sums_ptr, dk, dk_sum_strides, at, head, 0, n, inside, 1, KEY_ROWS, KEY_COLS, D, BLOCK_D)
        store_region(dv_sums_ptr, dv, dv_sum_strides, at, head, 0, n, inside, 1, KEY_ROWS, KEY_COLS, DV, BLOCK_DV)
        return
    if SPLIT:
        first = tl.load(extra_starts_ptr + owner)
        for other in range(first, first + extras):
            at = tl.cast(other, tl.int64)
            dk += load_region(dk_sums_ptr, dk_sum_strides, at, head, 0, n, inside, 1, KEY_ROWS, KEY_COLS, D, BLOCK_D)
            dv += load_region(dv_sums_ptr, dv_sum_strides, at, head, 0, n, inside, 1, KEY_ROWS, KEY_COLS, DV, BLOCK_DV)
    store_region(dk_ptr, dk * scale, dk_strides, image, head, region, n, inside, GRID_W, KEY_ROWS, KEY_COLS, D, BLOCK_D)
    store_region(dv_ptr, dv, dv_strides, image, head, region, n, inside, GRID_W, KEY_ROWS, KEY_COLS, DV, BLOCK_DV)


@torch.library.custom_op("foveate::routed_attention_backward", mutates_args=())
@without_autocast
def routed_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grid: list[int],
    region: list[int],
    key_region: list[int],
    scale: float,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv: contiguous, or in one buffer as q, k and v are, where `packed` is allowed."""
    cut = Regions(tuple(grid), tuple(region), tuple(key_region))
    dq, dk, dv = empty_gradients(q, k, v, packed=packed)
    if not q.numel():
        return dq, dk, dv
    delta, routes = torch.empty_like(lse), routes.contiguous()
    with on_device(q):
        lists = (launch_inverse if cut.count <= MOST_INVERTED else invert_routes)(routes, cut.queries)
        sums = [x.new_empty(lists.extras, *_of_a_region(x, cut), dtype=torch.float32) for x in (k, v)]
        launch_queries(q, k, v, routes, out, lse, grad, delta, dq, cut, scale)
        for extra in (True, False) if lists.extras else (False,):
            launch_keys(q, k, v, lists, lse, grad, delta, dk, dv, sums, cut, scale, extra)
    return dq, dk, dv


@routed_attention_backward.register_fake
def _(q, k, v, routes, out, lse, grad, grid, region, key_region, scale, packed=False):
    return separate(q, k, v)


refuse_second_derivative(routed_attention_backward, "routed_attention")
call_backward = eager_backward(routed_attention_backward, packed=True)


def _of_a_region(x: Tensor, cut: Regions) -> tuple[int, int, int]:
    return x.shape[3], cut.keys, x.shape[4]  # heads, tokens, channels


def launch_queries(q, k, v, routes, out, lse, grad, delta, dq, cut: Regions, scale: float) -> None:
    batch, heads = q.shape[0], q.shape[3]
    block_m, block_n, warps = region_tiles(cut.queries, routes.shape[2] * cut.keys, q.itemsize)
    queries_kernel[(batch * heads * cut.count * cdiv(cut.queries, block_m),)](
        q, k, v, routes, out, grad, lse, delta, dq,
        q.stride(), k.stride(), v.stride(), out.stride(), grad.stride(), dq.stride(),
        scale, scale * math.log2(math.e), heads, cut.count, routes.shape[2],
        BLOCK_M=block_m, BLOCK_N=block_n, TOPK=power_of_2(routes.shape[2]), num_warps=warps, num_stages=3,
        **constants(q, v, cut),
    )  # fmt: skip


def launch_keys(
    q, k, v, lists: InverseRoutes, lse, grad, delta, dk, dv, sums: list[Tensor], cut: Regions, scale: float, extra: bool
) -> None:
    heads, count = q.shape[3], q.shape[0] * cut.count
    block_n, block_m, warps = region_tiles(cut.keys, lists.piece * cut.queries, q.itemsize)
    keys_kernel[((lists.extras if extra else count) * heads * cdiv(cut.keys, block_n),)](
        q, k, v, grad, lse, delta, dk, dv, *sums,
        lists.queries, lists.starts, lists.ends, lists.extra_starts, lists.extra_owners,
        q.stride(), k.stride(), v.stride(), grad.stride(), dk.stride(), dv.stride(),
        scale, scale * math.log2(math.e), heads, cut.count, count, lists.piece,
        BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=lists.extras > 0, EXTRA=extra,
        num_warps=warps, num_stages=2, **constants(q, v, cut),
    )  # fmt: skip
