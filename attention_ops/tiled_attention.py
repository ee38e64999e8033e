"""Masked attention of query tiles to key tiles: the torch bodies that every local pattern shares.

Forward runs scaled_dot_product_attention over tiles; backward recomputes the logits of a tile instead of keeping them,
so that memory stays at O(one chunk of images) logits. Both walk the batch in chunks that stay in a CPU's cache. A chunk
whose result is not finite is computed again without the masked pairs: a NaN reaches those queries only that see it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import EagerBody, accumulator, is_finite, probabilities_of_seen, product_of_seen
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
# What copying a key costs, in logits (head_dim 32, float32, 2 threads of a Xeon with AVX-512: 4x4, 4x7,
# 7x7, 14x14 tiles and the whole 56x56 map took 13.8, 14.0, 18.3, 23.3 and 139 ms at batch 8, 2 heads, kernel 7).
KEY_COPY_COST = 45


def cheapest_tiles(rows: Iterable[AxisTiling], cols: Iterable[AxisTiling]) -> tuple[AxisTiling, AxisTiling]:
    """Choose the pair of tilings of least estimated work."""

    def work(pair: tuple[AxisTiling, AxisTiling]) -> tuple[int, int, int]:
        (rows, cols) = pair
        queries, keys = rows.tile * cols.tile, rows.keys * cols.keys
        return rows.tiles * cols.tiles * keys * (queries + KEY_COPY_COST), rows.tile, cols.tile

    return min(product(rows, cols), key=work)


class TileMask(NamedTuple):
    """Which key of its tile a query sees, (groups * tiles, query tokens, key tokens) bool."""

    seen: Tensor  # queries past the end of a map see nothing, all others one key at least
    shown: Tensor  # the same for SDPA, where they see all keys: a row of nothing but -inf would make NaN

    @staticmethod
    def of(seen: Tensor) -> "TileMask":
        return TileMask(seen, seen | ~seen.any(-1, keepdim=True))


class TiledAttention(EagerBody):
    """Attend from every query tile to its key tile, chunk by chunk. Tensors: q, k, v, bias.

    q, k, v: (B, heads, gy, gx, Y, X, d); the gy * gx groups are maps apart (dilation; 1 and 1 without).
    bias: (heads, query tokens, key tokens), added to the scaled logits of every tile; or None.

    The output has the shape of q and lies in memory as (B, Y, gy, X, gx, heads, d).

    Args:
        mask: which query sees which key.
        plan: how maps are cut, and the scale.
    """

    keeps_output = True

    def __init__(self, mask: TileMask, plan: TilePlan) -> None:
        (self.seen, self.shown), self.plan = mask, plan

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mask = _additive(self.shown, bias, q.dtype)
        out = _empty_map(q)
        for part in self._chunks(q):
            few = q[part], k[part], v[part]
            out[part] = _attend(*few, mask, self.plan)
            if not is_finite(out[part]):
                out[part] = self._attend_exactly(*few, bias)
        return out

    def backward(
        self, out: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mask = _additive(self.shown, bias, q.dtype)
        grads = [_empty_map(q), _empty_map(k), _empty_map(v)]
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=mask.dtype)
        for part in self._chunks(q):
            few = q[part], k[part], v[part], out[part], grad[part]
            *parts, dlogits = _gradients(*few, mask, self.plan)
            if not is_finite(*parts):
                *parts, dlogits = self._gradients_exactly(*few, bias)
            for whole, value in zip(grads, parts, strict=True):
                whole[part] = value
            if grad_bias is not None:
                grad_bias += dlogits.unflatten(1, (grad_bias.shape[0], -1)).sum((0, 2))
        return *grads, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)

    def graph(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return _attend(q, k, v, _additive(self.shown, bias, q.dtype), self.plan)

    def _chunks(self, q: Tensor) -> Iterator[slice]:
        """Cut the batch so that one chunk's logits fit `CHUNK_LOGITS` a thread."""
        per_image = q.shape[1] * self.seen.numel()
        step = max(1, torch.get_num_threads() * CHUNK_LOGITS // max(per_image, 1))
        for start in range(0, q.shape[0], step):
            yield slice(start, start + step)

    def _seen_and_bias(self, bias: Tensor | None, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Both for tiles of one head after the other: (heads * n, T, K)."""
        tiles = self.seen.shape[0]
        wide = None if bias is None else bias.to(accumulator(dtype)).repeat_interleave(tiles, 0)
        return self.seen.repeat(heads, 1, 1), wide

    def _attend_exactly(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        seen, bias = self._seen_and_bias(bias, q.shape[1], q.dtype)
        wide = accumulator(q.dtype)
        q_tiles = _to_tiles(q, split_queries, seen[None], self.plan).to(wide) * self.plan.scale
        k_tiles, v_tiles = (_to_tiles(x, gather_keys, seen[None], self.plan).to(wide) for x in (k, v))
        out = product_of_seen(probabilities_of_seen(q_tiles, k_tiles, seen, bias), seen, v_tiles)
        return _from_tiles(out, merge_queries, self.plan, like=q)

    def _gradients_exactly(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (seen, bias), wide, plan = self._seen_and_bias(bias, q.shape[1], q.dtype), accumulator(q.dtype), self.plan
        q_tiles, out_tiles, grad_tiles = (
            _to_tiles(x, split_queries, seen[None], plan).to(wide) for x in (q, out, grad)
        )
        k_tiles, v_tiles = (_to_tiles(x, gather_keys, seen[None], plan).to(wide) for x in (k, v))
        q_tiles = q_tiles * plan.scale
        probs = probabilities_of_seen(q_tiles, k_tiles, seen, bias)
        delta = (out_tiles * grad_tiles).sum(-1, keepdim=True)
        dlogits = torch.where(seen, probs * (torch.matmul(grad_tiles, v_tiles.mT) - delta), 0)
        dq = product_of_seen(dlogits, seen, k_tiles) * plan.scale
        dk, dv = (product_of_seen(x.mT, seen.mT, y) for x, y in ((dlogits, q_tiles), (probs, grad_tiles)))
        return (
            _from_tiles(dq, merge_queries, plan, like=q),
            _from_tiles(dk, scatter_keys, plan, like=k),
            _from_tiles(dv, scatter_keys, plan, like=v),
            dlogits,
        )


def to_maps(*maps: Tensor) -> list[Tensor]:
    """(B, H, W, heads, d) -> (B, heads, 1, 1, H, W, d), views: maps without dilation groups."""
    return [x.permute(0, 3, 1, 2, 4)[:, :, None, None] for x in maps]


def from_maps(out: Tensor) -> Tensor:
    """(B, heads, 1, 1, H, W, d) -> (B, H, W, heads, d): the inverse of `to_maps`."""
    return out[:, :, 0, 0].permute(0, 2, 3, 1, 4)


def _additive(shown: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One float mask for SDPA: (1, n, T, K) without a bias, (1, heads * n, T, K) with one."""
    if bias is None:
        return torch.zeros((), dtype=accumulator(dtype), device=shown.device).where(shown, -torch.inf)[None]
    return torch.where(shown, bias.to(accumulator(dtype))[:, None], -torch.inf).flatten(0, 1)[None]


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


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, plan: TilePlan) -> Tensor:
    q_tiles = _to_tiles(q, split_queries, mask, plan)
    k_tiles, v_tiles = (_to_tiles(x, gather_keys, mask, plan) for x in (k, v))
    out = F.scaled_dot_product_attention(q_tiles, k_tiles, v_tiles, attn_mask=mask, scale=plan.scale)
    return _from_tiles(out, merge_queries, plan, like=q)


def _gradients(
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
