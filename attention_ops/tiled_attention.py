"""Masked attention of query tiles to key tiles: the torch body that every local pattern shares.

Forward runs scaled_dot_product_attention over tiles; backward computes the tile's logits again instead of keeping them,
so that memory stays at O(one chunk of images) logits. Both walk the batch in chunks that stay in a CPU's cache.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autocast import no_autocast
from .tiling import AxisTiling, gather_keys, merge_queries, scatter_keys, split_queries

# Logits alive at once, per thread. On 2 threads of a Xeon (AVX-512), 56x56, 2 heads x 32, kernel 7: chunks of 1, 2 and
# 8 images of a batch of 8 took 14.0, 14.5 and 22.2 ms; larger chunks leave the second-level cache.
CHUNK_LOGITS = 1 << 19


@dataclass(frozen=True)
class TilePlan:
    """How one attention is cut: a tiling an axis, and the scale of the logits."""

    rows: AxisTiling
    cols: AxisTiling
    scale: float


TILES = (4, 7, 8)  # queries an axis, besides the whole axis
# A key costs as much to copy as 45 logits to compute (head_dim 32, float32, 2 threads of a Xeon with AVX-512: 4x4, 4x7,
# 7x7, 14x14 tiles and the whole 56x56 map took 13.8, 14.0, 18.3, 23.3 and 139 ms at batch 8, 2 heads, kernel 7).
LOGITS_PER_KEY = 45


def cheapest_tiles(rows: Iterable[AxisTiling], cols: Iterable[AxisTiling]) -> tuple[AxisTiling, AxisTiling]:
    """Choose the pair of tilings of least estimated work."""

    def work(pair: tuple[AxisTiling, AxisTiling]) -> tuple[int, int, int]:
        (rows, cols) = pair
        queries, keys = rows.tile * cols.tile, rows.keys * cols.keys
        return rows.tiles * cols.tiles * keys * (queries + LOGITS_PER_KEY), rows.tile, cols.tile

    return min(product(rows, cols), key=work)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, plan: TilePlan) -> Tensor:
    """Attend from every query tile to its key tile.

    Args:
        q, k, v: (B, heads, gy, gx, Y, X, d); the gy * gx groups are maps apart (dilation; 1 and 1 without).
        mask: (groups * tiles, query tokens, key tokens) bool, True where a query sees a key. No row may be empty.
        bias: (heads, query tokens, key tokens), added to the scaled logits of every tile; or None.

    Returns:
        The shape of q, in memory as (B, Y, gy, X, gx, heads, d).
    """
    if type(q) is not Tensor:  # a compiler or exporter is tracing: give it plain differentiable ops
        return _forward(q, k, v, _additive(mask, bias, q.dtype), plan)
    return _TiledAttention.apply(q, k, v, mask, bias, plan)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which logits, masks and sums are kept."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _additive(mask: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One float mask for SDPA: (1, n, T, K) without a bias, (1, heads * n, T, K) with one."""
    if bias is None:
        return torch.zeros((), dtype=accumulator(dtype), device=mask.device).where(mask, -torch.inf)[None]
    return torch.where(mask, bias.to(accumulator(dtype))[:, None], -torch.inf).flatten(0, 1)[None]


def _to_tiles(x: Tensor, cut: Callable[..., Tensor], mask: Tensor, plan: TilePlan) -> Tensor:
    """(B, heads, gy, gx, Y, X, d) -> (B, heads * n, T, d), or (B * heads, n, T, d) where the mask knows no heads."""
    tiles = cut(x, plan.rows, plan.cols)
    return tiles.reshape(-1, mask.shape[1], *tiles.shape[-2:])


def _from_tiles(tiles: Tensor, merge: Callable[..., Tensor], plan: TilePlan, like: Tensor) -> Tensor:
    """Undo `_to_tiles`: back to the shape of `like`."""
    per_map = plan.rows.tiles * plan.cols.tiles
    return merge(tiles.reshape(*like.shape[:4], per_map, *tiles.shape[-2:]), plan.rows, plan.cols)


def _empty_map(like: Tensor) -> Tensor:
    """Uninitialised, in the shape of `like`, laid out so that the caller's (B, H, W, heads, d) is contiguous."""
    batch, heads, gy, gx, rows, cols, dim = like.shape
    return like.new_empty(batch, rows, gy, cols, gx, heads, dim).permute(0, 5, 2, 4, 1, 3, 6)


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, plan: TilePlan) -> Tensor:
    q_tiles = _to_tiles(q, split_queries, mask, plan)
    k_tiles, v_tiles = (_to_tiles(x, gather_keys, mask, plan) for x in (k, v))
    out = F.scaled_dot_product_attention(q_tiles, k_tiles, v_tiles, attn_mask=mask, scale=plan.scale)
    return _from_tiles(out, merge_queries, plan, like=q)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad_out: Tensor, mask: Tensor, plan: TilePlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and the gradient of the tiles' logits, for one chunk of images."""
    wide = mask.dtype
    q_tiles, out_tiles, grad_tiles = (_to_tiles(x, split_queries, mask, plan).to(wide) for x in (q, out, grad_out))
    k_tiles, v_tiles = (_to_tiles(x, gather_keys, mask, plan).to(wide) for x in (k, v))
    q_tiles = q_tiles * plan.scale
    probs = torch.matmul(q_tiles, k_tiles.mT).add_(mask).softmax(-1)  # (., n, T, K)
    dv = torch.matmul(probs.mT, grad_tiles)
    delta = (out_tiles * grad_tiles).sum(-1, keepdim=True)
    dlogits = torch.matmul(grad_tiles, v_tiles.mT).sub_(delta).mul_(probs)
    dq = torch.matmul(dlogits, k_tiles).mul_(plan.scale)
    dk = torch.matmul(dlogits.mT, q_tiles)
    return (
        _from_tiles(dq, merge_queries, plan, like=q),
        _from_tiles(dk, scatter_keys, plan, like=k),
        _from_tiles(dv, scatter_keys, plan, like=v),
        dlogits,
    )


def _chunks(q: Tensor, mask: Tensor) -> Iterator[slice]:
    """Cut the batch so that one chunk's logits fit `CHUNK_LOGITS` a thread."""
    per_image = q.shape[1] * mask.numel()
    step = max(1, torch.get_num_threads() * CHUNK_LOGITS // max(per_image, 1))
    for start in range(0, q.shape[0], step):
        yield slice(start, start + step)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, bias, plan):
        additive = _additive(mask, bias, q.dtype)
        out = _empty_map(q)
        for part in _chunks(q, mask):
            out[part] = _forward(q[part], k[part], v[part], additive, plan)
        ctx.save_for_backward(q, k, v, mask, bias, out)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, mask, bias, out = ctx.saved_tensors
        additive = _additive(mask, bias, q.dtype)
        grads = [_empty_map(q), _empty_map(k), _empty_map(v)]
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=additive.dtype)
        for part in _chunks(q, mask):
            with no_autocast(q):
                *parts, dlogits = _backward(q[part], k[part], v[part], out[part], grad_out[part], additive, ctx.plan)
            for grad, value in zip(grads, parts, strict=True):
                grad[part] = value
            if bias is not None:
                grad_bias += dlogits.unflatten(1, (bias.shape[0], -1)).sum((0, 2))
        return *grads, None, None if bias is None else grad_bias.to(bias.dtype), None
