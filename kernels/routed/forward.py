"""Routed attention, forward (Triton): a region of queries sees the tokens of the regions that it is routed to.

Paper      Zhu et al. 2023, arXiv:2303.08810, section 3.2; regions are indexed here, not gathered.
Tensors    q: (B, H, W, heads, D); k, v: (B, Hk, Wk, heads, D or DV); out: (B, H, W, heads, DV). q, k, v of any strides.
Grid       B * heads * regions * query tiles: one program owns up to 64 queries of one region of one head.
Numerics   logits, softmax and sums in fp32, one rounding on store; exp2, so `scale` carries log2(e).
Memory     O(tile) on chip; no logits and no copies of keys reach HBM. For the backward pass one fp32 a query and head.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, eager_forward, on_device, power_of_2
from .backward import call_backward
from .plan import Regions, constants, region_tiles
from .tokens import load_region, routes_are_valid, store_region


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, out_strides,
    scale_log2, heads, regions, topk,
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
    routes_ptr += (image * regions + region) * topk
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    lse_ptr += ((image * heads + head) * regions + region) * QUERIES
    if not routes_are_valid(routes_ptr, topk, regions, TOPK):
        out = tl.full((BLOCK_M, BLOCK_DV), float("nan"), tl.float32)
        store_region(out_ptr, out, out_strides, image, head, region, m, inside, GRID_W, ROWS, COLS, DV, BLOCK_DV)
        tl.store(lse_ptr + m, tl.full((BLOCK_M,), float("nan"), tl.float32), mask=inside)
        return
    for start in range(0, topk * KEYS, BLOCK_N):  # a tile of keys may hold several small regions
        n = start + tl.arange(0, BLOCK_N)
        seen = n < topk * KEYS
        route = tl.load(routes_ptr + n // KEYS, mask=seen, other=0).to(tl.int32)
        k = load_region(k_ptr, k_strides, image, head, route, n % KEYS, seen, GRID_W, KEY_ROWS, KEY_COLS, D, BLOCK_D)
        v = load_region(v_ptr, v_strides, image, head, route, n % KEYS, seen, GRID_W, KEY_ROWS, KEY_COLS, DV, BLOCK_DV)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))  # finite: every tile holds a key
        shrink = tl.exp2(top - new_top)
        probs = tl.exp2(logits - new_top[:, None])
        total = total * shrink + tl.sum(probs, 1)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)  # [M, DV]
        top = new_top
    out = acc / total[:, None]
    store_region(out_ptr, out, out_strides, image, head, region, m, inside, GRID_W, ROWS, COLS, DV, BLOCK_DV)
    tl.store(lse_ptr + m, top + tl.log2(total), mask=inside)


def launch_forward(q, k, v, routes, out, lse, cut: Regions, scale: float) -> None:
    block_m, block_n, warps = region_tiles(cut.queries, routes.shape[2] * cut.keys, q.itemsize)
    forward_kernel[(q.shape[0] * q.shape[3] * cut.count * cdiv(cut.queries, block_m),)](
        q, k, v, routes, out, lse,
        q.stride(), k.stride(), v.stride(), out.stride(),
        scale * math.log2(math.e), q.shape[3], cut.count, routes.shape[2],
        BLOCK_M=block_m, BLOCK_N=block_n, TOPK=power_of_2(routes.shape[2]), num_warps=warps, num_stages=3,
        **constants(q, v, cut),
    )  # fmt: skip


@torch.library.custom_op("foveate::routed_attention_forward", mutates_args=())
def routed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    grid: list[int],
    region: list[int],
    key_region: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out as contiguous (B, H, W, heads, DV), and lse as (B, heads, regions, tokens), fp32, base 2.

    Args:
        routes: (B, regions, topk) int64; where one is out of range, the results of its region are NaN.
        grid: regions in a column and in a row of the map; region, key_region: tokens.
    """
    cut = Regions(tuple(grid), tuple(region), tuple(key_region))
    out, lse = _empty_results(q, v, cut)
    if out.numel():
        with on_device(q):
            launch_forward(q, k, v, routes.contiguous(), out, lse, cut, scale)
    return out, lse


def _empty_results(q: Tensor, v: Tensor, cut: Regions) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, _ = q.shape
    out = q.new_empty(batch, height, width, heads, v.shape[-1])
    return out, q.new_empty(batch, heads, cut.count, cut.queries, dtype=torch.float32)


@routed_attention_forward.register_fake
def _(q, k, v, routes, grid, region, key_region, scale):
    return _empty_results(q, v, Regions(tuple(grid), tuple(region), tuple(key_region)))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.grid, ctx.region, ctx.key_region, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    cut = (ctx.grid, ctx.region, ctx.key_region)
    return *call_backward(*ctx.saved_tensors, grad, *cut, ctx.scale), None, None, None, None, None


routed_attention = eager_forward(routed_attention_forward, _save, _backward)
