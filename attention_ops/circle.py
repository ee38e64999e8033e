"""Circular attention: every token sees the tokens closer than a radius.

Paper      Liu et al. 2024, arXiv:2412.16112 (CLEAR), the mask of image queries on image keys.
Semantics  a query sees the keys at dy * dy + dx * dx < radius * radius; at the border fewer, nothing is clamped.
We differ  text tokens and the optional down-sampled keys of the paper's model are not part of this op.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ._attend import accumulator
from ._op import Impl, check_at_least, check_qkv, declare, run, why_no_local_kernel
from .tiled_attention import (
    TILES,
    TiledAttention,
    TileMask,
    TilePlan,
    cheapest_tiles,
    from_maps,
    to_maps,
)
from .tiling import AxisTiling

OP = "circle_attention"


def circle_attention(
    q: Tensor, k: Tensor, v: Tensor, radius: int, *, scale: float | None = None, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """Attend from every token to the tokens at a distance below `radius`.

    Cost: about 3.14 * H * W * radius ** 2 * head_dim multiply-adds per head, twice; the tiled and the fused body
    compute up to 2.5 times as many in exchange for dense products. The fused body has no double backward.

    Args:
        q, k, v: (B, H, W, heads, head_dim), one shape, dtype and device; strided views are fine.
        radius: in tokens, at least 1 (a token sees itself only).
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, head_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or radius is below 1.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, locals())


def _check(q: Tensor, k: Tensor, v: Tensor, radius: int) -> None:
    check_qkv(OP, q, k, v)
    check_at_least(OP, "radius", (radius,), 1)


def circle_attention_reference(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float) -> Tensor:
    """The definition: gather the keys of every query's circle, 3.14 * radius ** 2 copies of k and v. float32 inside."""
    wide = accumulator(q.dtype)
    away = torch.arange(1 - radius, radius, device=q.device)
    dy, dx = (t.flatten() for t in torch.meshgrid(away, away, indexing="ij"))
    near = dy * dy + dx * dx < radius * radius
    row = torch.arange(q.shape[1], device=q.device)[:, None, None] + dy[near]  # (H, 1, keys)
    col = torch.arange(q.shape[2], device=q.device)[:, None] + dx[near]  # (W, keys)
    outside = (row < 0) | (row >= q.shape[1]) | (col < 0) | (col >= q.shape[2])  # (H, W, keys)
    index = row.clamp(0, q.shape[1] - 1), col.clamp(0, q.shape[2] - 1)
    k, v = (t.to(wide)[:, index[0], index[1]].masked_fill(outside[..., None, None], 0) for t in (k, v))
    logits = torch.einsum("bhwnd,bhwknd->bnhwk", q.to(wide) * scale, k)
    probs = logits.masked_fill(outside, -torch.inf).softmax(-1)
    return torch.einsum("bnhwk,bhwknd->bhwnd", probs, v).to(q.dtype)


def circle_attention_tiled(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float) -> Tensor:
    """Tiles of queries against the one key tile that covers their circles."""
    rows, cols = _cheapest_tiles((q.shape[1], q.shape[2]), radius)
    mask = TileMask.of(tile_mask(radius, *(_cached_distances(radius, axis, q.device) for axis in (rows, cols))))
    return from_maps(TiledAttention(mask, TilePlan(rows, cols, scale))(*to_maps(q, k, v), None))


def circle_attention_graph(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float) -> Tensor:
    """The same by differentiable operations, whose tables become part of a traced graph."""
    rows, cols = plan_tiles((q.shape[1], q.shape[2]), radius)
    seen = tile_mask(radius, *(axis_distances(radius, axis, q.device) for axis in (rows, cols)))
    attend = TiledAttention(TileMask.of(seen), TilePlan(rows, cols, scale)).graph
    return from_maps(attend(*to_maps(q, k, v), None))


def _fused(q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float) -> Tensor:
    from ..kernels.local.launch import Pattern, local_attention  # here, so that CPU users need no Triton

    pattern = Pattern("circle", (radius, radius), (radius - 1, radius - 1))
    return local_attention(q, k, v, pattern, scale=scale)


def _macs(q: Tensor, radius: int) -> int:
    rows, cols = (torch.arange(length) for length in q.shape[1:3])
    apart_y, apart_x = ((x[:, None] - x).square().flatten().bincount() for x in (rows, cols))  # pairs by distance ** 2
    near = torch.arange(len(apart_y))[:, None] + torch.arange(len(apart_x)) < radius * radius
    pairs = int((apart_y[:, None] * apart_x * near).sum())
    return 2 * q.shape[0] * q.shape[3] * q.shape[4] * pairs


declare(
    circle_attention,
    check=_check,
    reference=circle_attention_reference,
    tiled=circle_attention_tiled,
    graph=circle_attention_graph,
    fused=_fused,
    why_not_fused=why_no_local_kernel,
    macs=_macs,
)


def plan_tiles(size: tuple[int, int], radius: int) -> tuple[AxisTiling, AxisTiling]:
    """Choose the tiles of least estimated work; a traced size that is a symbol gets a tiling right for every length."""
    if all(isinstance(length, int) for length in size):
        return _cheapest_tiles(size, radius)
    return tuple(AxisTiling(length, TILES[-1], radius - 1, radius - 1) for length in size)


@lru_cache(maxsize=256)
def _cheapest_tiles(size: tuple[int, int], radius: int) -> tuple[AxisTiling, AxisTiling]:
    return cheapest_tiles(
        *(
            [AxisTiling(length, length), *(AxisTiling(length, t, radius - 1, radius - 1) for t in TILES if t < length)]
            for length in size
        )
    )


def tile_mask(radius: int, rows: Tensor, cols: Tensor) -> Tensor:
    """Join the distances of two axes: (tiles, query tokens, key tokens) bool, True where a query sees a key."""
    apart = rows[:, None, :, None, :, None] + cols[None, :, None, :, None, :]  # (ty, tx, qy, qx, ky, kx)
    return (apart < radius * radius).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def axis_distances(radius: int, axis: AxisTiling, device: torch.device) -> Tensor:
    """(tiles, query tile, key tile) squared distances; radius ** 2 where the query or the key is outside the map."""
    first = torch.arange(axis.tiles, device=device)[:, None, None] * axis.tile
    query = first + torch.arange(axis.tile, device=device)[:, None]
    key = first - axis.before + torch.arange(axis.keys, device=device)
    outside = (key < 0) | (key >= axis.length) | (query >= axis.length)
    return (key - query).square().masked_fill(outside, radius * radius)


@lru_cache(maxsize=256)
def _cached_distances(*key) -> Tensor:
    with torch.inference_mode(False):  # a table first made during inference must serve training too
        return axis_distances(*key)
