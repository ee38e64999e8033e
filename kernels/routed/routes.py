"""Bi-level routes (Triton): the regions whose mean keys agree most with the mean query of a region.

Paper      Zhu et al. 2023, arXiv:2303.08810 (BiFormer), section 3.2, equations 3 and 4.
Tensors    q, k: (B, H, W, C) of any strides; means: (2, B, regions, C) fp32, of q and of k; routes: (B, regions, topk).
Grid       means: B * regions * tiles of channels. Routes: B * tiles of query regions, all key regions at once.
Numerics   means and scores in fp32; equal scores in the order of the regions, NaN before all others, as torch.topk.
Memory     reads q and k once; writes and reads the means, 1 / (tokens of a region) of that. No scores reach HBM.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LEAST_DOT, cdiv, on_device, padded, power_of_2

_TOKENS = 16  # of a tile that is summed
_LOWEST = -(2**63)  # below the key of every score


@triton.jit
def _mean(
    ptr, strides, image, top, left, c, height, width, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[channels]: over the tokens of a region that exist; it may overhang the lower and the right edge of the map."""
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, ROWS * COLS, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        row, col = top + token // COLS, left + token % COLS
        exists = (token < ROWS * COLS) & (row < height) & (col < width)
        at = (row * strides[1] + col * strides[2])[:, None] + (c * strides[3])[None, :]
        x = tl.load(ptr + image * strides[0] + at, mask=exists[:, None] & (c < channels)[None, :], other=0.0)
        total += x.to(tl.float32)
    count = (tl.minimum(height - top, ROWS) * tl.minimum(width - left, COLS)).to(tl.float32)
    return tl.div_rn(tl.sum(total, 0), tl.zeros((BLOCK_C,), tl.float32) + count)


@triton.jit
def region_means_kernel(
    q_ptr, k_ptr, means_ptr, q_strides, k_strides, batch, height, width, channels,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    REGIONS: tl.constexpr = GRID_H * GRID_W
    tiles = tl.cdiv(channels, BLOCK_C)
    region, image = tl.program_id(0) // tiles % REGIONS, (tl.program_id(0) // (tiles * REGIONS)).to(tl.int64)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    top, left = region // GRID_W * ROWS, region % GRID_W * COLS
    q = _mean(q_ptr, q_strides, image, top, left, c, height, width, channels, ROWS, COLS, BLOCK_T, BLOCK_C)
    k = _mean(k_ptr, k_strides, image, top, left, c, height, width, channels, ROWS, COLS, BLOCK_T, BLOCK_C)
    tl.store(means_ptr + (image * REGIONS + region) * channels + c, q, mask=c < channels)
    tl.store(means_ptr + ((batch + image) * REGIONS + region) * channels + c, k, mask=c < channels)


@triton.jit
def routes_kernel(
    means_ptr, routes_ptr, batch, channels, topk,
    REGIONS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(REGIONS, BLOCK_Q)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    query = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_R)
    queries_ptr = means_ptr + image * REGIONS * channels
    keys_ptr = means_ptr + (batch + image) * REGIONS * channels
    scores = tl.zeros((BLOCK_Q, BLOCK_R), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask_q, mask_k = (query < REGIONS)[:, None] & (c < channels)[None, :], (key < REGIONS)[:, None]
        q = tl.load(queries_ptr + query[:, None] * channels + c[None, :], mask=mask_q, other=0.0)  # [Q, C]
        k = tl.load(keys_ptr + key[:, None] * channels + c[None, :], mask=mask_k & (c < channels)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")  # [Q, R]
    # A score and its region as one integer, greater for greater scores and, among equal ones, for earlier regions
    scores = tl.where(scores == scores, scores + 0.0, float("nan"))  # one zero and one NaN
    bits = scores.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    ranks = order * BLOCK_R + (BLOCK_R - 1 - key)[None, :]
    ranks = tl.where((key < REGIONS)[None, :], ranks, LOWEST)
    routes_ptr += image * REGIONS * topk + query * topk
    for place in range(topk):
        best = tl.max(ranks, 1)
        ranks = tl.where(ranks == best[:, None], LOWEST, ranks)
        region = BLOCK_R - 1 - (best & (BLOCK_R - 1))
        tl.store(routes_ptr + place, region, mask=query < REGIONS)


def launch_routes(q: Tensor, k: Tensor, grid: tuple[int, int], region: tuple[int, int], topk: int) -> Tensor:
    """Routes of (B, H, W, C) maps, (B, regions, topk) int64, best first."""
    batch, height, width, channels = q.shape
    regions = grid[0] * grid[1]
    block_c = min(power_of_2(channels), 128)
    means = q.new_empty(2, batch, regions, channels, dtype=torch.float32)
    region_means_kernel[(batch * regions * cdiv(channels, block_c),)](
        q, k, means, q.stride(), k.stride(), batch, height, width, channels,
        GRID_H=grid[0], GRID_W=grid[1], ROWS=region[0], COLS=region[1],
        BLOCK_T=min(power_of_2(region[0] * region[1]), _TOKENS), BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    routes = q.new_empty(batch, regions, topk, dtype=torch.int64)
    block_r = padded(regions)
    routes_kernel[(batch * cdiv(regions, LEAST_DOT),)](
        means, routes, batch, channels, topk,
        REGIONS=regions, BLOCK_R=block_r, BLOCK_Q=LEAST_DOT, BLOCK_C=min(padded(channels), 32 if block_r > 64 else 64),
        LOWEST=_LOWEST, num_warps=4,
    )  # fmt: skip
    return routes


@torch.library.custom_op("foveate::bi_level_routes_forward", mutates_args=())
def bi_level_routes_forward(q: Tensor, k: Tensor, region: list[int], topk: int) -> Tensor:
    """Routes of (B, H, W, C) maps; regions of `region` tokens may overhang the map, at most `MOST_REGIONS` of them."""
    grid = _grid(q, region)
    if not q.numel():
        return _empty_routes(q, grid, topk)
    with on_device(q):
        return launch_routes(q, k, grid, (region[0], region[1]), topk)


@bi_level_routes_forward.register_fake
def _(q, k, region, topk):
    return _empty_routes(q, _grid(q, region), topk)


def _grid(q: Tensor, region: list[int]) -> tuple[int, int]:
    return -(-q.shape[1] // region[0]), -(-q.shape[2] // region[1])


def _empty_routes(q: Tensor, grid: tuple[int, int], topk: int) -> Tensor:
    return q.new_empty(q.shape[0], grid[0] * grid[1], topk, dtype=torch.int64)
