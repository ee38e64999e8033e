"""Masked attention of query tiles to key tiles: the torch bodies that all local patterns share.

Forward runs scaled_dot_product_attention over tiles; backward recomputes the logits of a tile instead of keeping them,
so that memory stays at O(one chunk of images) logits. Both walk the batch in chunks that stay in a CPU's cache. A chunk
whose result is not finite is computed again without the masked pairs: a NaN reaches those queries only that see it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import (
    EagerBody,
    accumulator,
    is_finite,
    logits_of_seen,
    of_one_layout,
    probabilities_of_seen,
    product_of_seen,
)
from .tile_plan import TileMask, TilePlan, additive_mask
from .tiling import cut_regions, gather_keys, join_regions, merge_queries, pieces, scatter_keys, split_queries

# Logits alive at once, per thread. On 2 threads of a Xeon (AVX-512), 56x56, 2 heads x 32, kernel 7: chunks of 1, 2 and
# 8 images of a batch of 8 took 14.0, 14.5 and 22.2 ms; larger chunks leave the second-level cache.
CHUNK_LOGITS = 1 << 19


class TiledAttention(EagerBody):
    """Attend from every query tile to its key tile, chunk by chunk. Tensors: q, k, v, bias.

    q, k, v: (B, H, W, heads, d); v of any width.
    bias: (heads, query tokens, key tokens), added to the scaled logits of every tile; or None.

    Args:
        plan: how maps are cut.
        mask: which query sees which key; None where every query sees all keys of its tile.
        scale: of the logits.
        additive: mask and bias in one, as `additive_mask` gives it, where the bias is constant.
    """

    keeps_output = True

    def __init__(self, plan: TilePlan, mask: TileMask | None, scale: float, additive: Tensor | None = None) -> None:
        self.plan, self.mask, self.scale, self.additive = plan, mask, scale, additive

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
        # detached: SDPA's fast kernel refuses a mask that requires a gradient, even where none is recorded
        mask = self.additive_mask(None if bias is None else bias.detach(), q.dtype)
        chunks = self._chunks(q)
        if len(chunks) == 1:
            return self._attend_checked(q, k, v, bias, mask).contiguous()
        out = q.new_empty(v.shape)
        for part in chunks:
            out[part] = self._attend_checked(q[part], k[part], v[part], bias, mask)
        return out

    def _attend_checked(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Any:
        out = self._attend(q, k, v, mask)
        if self.mask is not None and not is_finite(*(out if isinstance(out, tuple) else (out,))):
            return self._attend_exactly(q, k, v, bias, self.mask.seen)
        return out

    def backward(
        self, out: Any, grad: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return self._backward(out, grad, None, q, k, v, bias)

    def _backward(
        self, out: Tensor, grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mask = self.additive_mask(bias, q.dtype)
        grads = [t.new_empty(t.shape) for t in (q, k, v)]
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=accumulator(q.dtype))
        for part in self._chunks(q):
            few = q[part], k[part], v[part], out[part], grad[part], None if grad_lse is None else grad_lse[part]
            *parts, dlogits = self._gradients(*few, mask)
            if self.mask is not None and not is_finite(*parts):
                *parts, dlogits = self._gradients_exactly(*few, bias, self.mask.seen)
            for whole, value in zip(grads, parts, strict=True):
                whole[part] = value
            if grad_bias is not None:
                grad_bias += dlogits.unflatten(1, (grad_bias.shape[0], -1)).sum((0, 2))
        return *grads, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)

    def graph(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
        return of_one_layout(self._attend(q, k, v, self.additive_mask(bias, q.dtype)))

    def _chunks(self, q: Tensor) -> list[slice]:
        """Cut the batch so that one chunk's logits fit `CHUNK_LOGITS` a thread."""
        step = max(1, torch.get_num_threads() * CHUNK_LOGITS // max(q.shape[3] * self.plan.logits, 1))
        return [slice(start, start + step) for start in range(0, q.shape[0], step)]

    def additive_mask(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A float mask for SDPA, (1, n, T, K) without a bias and (1, heads * n, T, K) with one; None for neither."""
        if self.additive is not None:
            return self.additive
        wide, mask = accumulator(dtype), self.mask
        if bias is None:
            if mask is None:
                return None
            return (additive_mask(mask.shown, wide) if mask.additive is None else mask.additive)[None]
        bias = bias.to(wide)[:, None]  # (heads, 1, T, K)
        if mask is None:
            return bias.expand(-1, self.plan.per_map, -1, -1).flatten(0, 1)[None]
        return torch.where(mask.shown, bias, -torch.inf).flatten(0, 1)[None]

    def _to_tiles(self, x: Tensor, cut: Callable[..., Tensor], per: int) -> Tensor:
        """(B, H, W, heads, d) -> (., per, tokens, d): `per` is the tiles of one head, or of all heads."""
        (rows, cols, (dy, dx), *_), (height, width) = self.plan, x.shape[1:3]
        if (dy, dx) == (1, 1):
            tiles = cut(x.permute(0, 3, 1, 2, 4), rows, cols)
        else:
            x = F.pad(x, (0, 0, 0, 0, 0, pieces(width, dx) * dx - width, 0, pieces(height, dy) * dy - height))
            tiles = cut(cut_regions(x, [dy, dx]).permute(0, 5, 3, 4, 1, 2, 6), rows, cols)  # (B, heads, dy, dx, ...)
        return tiles.reshape(-1, per, *tiles.shape[-2:])

    def _from_tiles(self, tiles: Tensor, merge: Callable[..., Tensor], like: Tensor) -> Tensor:
        """Undo `_to_tiles`: back to the shape of `like`."""
        (rows, cols, (dy, dx), *_), (batch, height, width, heads, _) = self.plan, like.shape
        shape = (rows.tiles * cols.tiles, *tiles.shape[-2:])
        if (dy, dx) == (1, 1):
            return merge(tiles.reshape(batch, heads, *shape), rows, cols).permute(0, 2, 3, 1, 4)
        groups = merge(tiles.reshape(batch, heads, dy, dx, *shape), rows, cols)  # (B, heads, dy, dx, Y, X, d)
        return join_regions(groups.permute(0, 4, 5, 2, 3, 1, 6))[:, :height, :width]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        per = self.plan.per_map if mask is None else mask.shape[1]
        q_tiles = self._to_tiles(q, split_queries, per)
        k_tiles, v_tiles = self._to_tiles(k, gather_keys, per), self._to_tiles(v, gather_keys, per)
        out = F.scaled_dot_product_attention(q_tiles, k_tiles, v_tiles, attn_mask=mask, scale=self.scale)
        return self._from_tiles(out, merge_queries, like=q)

    def _gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        grad_lse: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dq, dk, dv and the gradient of the tiles' logits, for one chunk of images."""
        per, wide = self.plan.per_map if mask is None else mask.shape[1], accumulator(q.dtype)
        q_tiles, out_tiles, grad_tiles = (self._to_tiles(x, split_queries, per).to(wide) for x in (q, out, grad))
        k_tiles, v_tiles = (self._to_tiles(x, gather_keys, per).to(wide) for x in (k, v))
        q_tiles = q_tiles * self.scale
        logits = torch.matmul(q_tiles, k_tiles.mT)  # (., n, T, K)
        probs = (logits if mask is None else logits.add_(mask)).softmax(-1)
        dv = torch.matmul(probs.mT, grad_tiles)
        delta = self._delta(out_tiles, grad_tiles, grad_lse)
        dlogits = torch.matmul(grad_tiles, v_tiles.mT).sub_(delta).mul_(probs)
        dq = torch.matmul(dlogits, k_tiles).mul_(self.scale)
        dk = torch.matmul(dlogits.mT, q_tiles)
        return *self._to_maps(dq, dk, dv, q), dlogits

    def _attend_exactly(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seen: Tensor) -> Any:
        (seen, bias), wide = self._by_head(bias, seen, q), accumulator(q.dtype)
        q_tiles = self._to_tiles(q, split_queries, len(seen)).to(wide) * self.scale
        k_tiles, v_tiles = (self._to_tiles(x, gather_keys, len(seen)).to(wide) for x in (k, v))
        out = product_of_seen(probabilities_of_seen(q_tiles, k_tiles, seen, bias), seen, v_tiles)
        return self._from_tiles(out, merge_queries, like=q)

    def _gradients_exactly(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        grad_lse: Tensor | None,
        bias: Tensor | None,
        seen: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (seen, bias), wide = self._by_head(bias, seen, q), accumulator(q.dtype)
        q_tiles, out_tiles, grad_tiles = (self._to_tiles(x, split_queries, len(seen)).to(wide) for x in (q, out, grad))
        k_tiles, v_tiles = (self._to_tiles(x, gather_keys, len(seen)).to(wide) for x in (k, v))
        q_tiles = q_tiles * self.scale
        probs = probabilities_of_seen(q_tiles, k_tiles, seen, bias)
        delta = self._delta(out_tiles, grad_tiles, grad_lse)
        dlogits = torch.where(seen, probs * (torch.matmul(grad_tiles, v_tiles.mT) - delta), 0)
        dq = product_of_seen(dlogits, seen, k_tiles) * self.scale
        dk, dv = (product_of_seen(x.mT, seen.mT, y) for x, y in ((dlogits, q_tiles), (probs, grad_tiles)))
        return *self._to_maps(dq, dk, dv, q), dlogits

    def _delta(self, out_tiles: Tensor, grad_tiles: Tensor, grad_lse: Tensor | None) -> Tensor:
        """What is subtracted from every probability's gradient: (., tiles, queries, 1)."""
        delta = (out_tiles * grad_tiles).sum(-1, keepdim=True)
        if grad_lse is None:
            return delta
        return delta - self._to_tiles(grad_lse[..., None], split_queries, delta.shape[1])

    def _to_maps(self, dq: Tensor, dk: Tensor, dv: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dk, dv = (self._from_tiles(x, scatter_keys, like) for x in (dk, dv))
        return self._from_tiles(dq, merge_queries, like), dk, dv

    def _by_head(self, bias: Tensor | None, seen: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both for the tiles of one head after the other: (heads * n, T, K)."""
        wide = None if bias is None else bias.to(accumulator(q.dtype)).repeat_interleave(len(seen), 0)
        return seen.repeat(q.shape[3], 1, 1), wide


class TiledAttentionLse(TiledAttention):
    """`TiledAttention` that also returns the log-sum-exp of the logits of every query, (B, H, W, heads).

    SDPA returns none, so that the logits of a chunk are made here.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = self.additive_mask(bias, q.dtype)
        out, lse = q.new_empty(v.shape), q.new_empty(q.shape[:4], dtype=accumulator(q.dtype))
        for part in self._chunks(q):
            out[part], lse[part] = self._attend_checked(q[part], k[part], v[part], bias, mask)
        return out, lse

    def backward(
        self, out: Any, grad: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return self._backward(out[0], grad[0], grad[1], q, k, v, bias)

    def graph(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = self._attend(q, k, v, self.additive_mask(bias, q.dtype))
        return of_one_layout(out), of_one_layout(lse)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        per, wide = self.plan.per_map if mask is None else mask.shape[1], accumulator(q.dtype)
        q_tiles = self._to_tiles(q, split_queries, per).to(wide) * self.scale
        k_tiles, v_tiles = (self._to_tiles(x, gather_keys, per).to(wide) for x in (k, v))
        logits = torch.matmul(q_tiles, k_tiles.mT)
        logits = logits if mask is None else logits + mask
        return self._results(torch.matmul(logits.softmax(-1), v_tiles), logits, q)

    def _attend_exactly(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        (seen, bias), wide = self._by_head(bias, seen, q), accumulator(q.dtype)
        q_tiles = self._to_tiles(q, split_queries, len(seen)).to(wide) * self.scale
        k_tiles, v_tiles = (self._to_tiles(x, gather_keys, len(seen)).to(wide) for x in (k, v))
        logits = logits_of_seen(q_tiles, k_tiles, seen, bias)
        return self._results(product_of_seen(torch.where(seen, logits.softmax(-1), 0), seen, v_tiles), logits, q)

    def _results(self, out_tiles: Tensor, logits: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        out = self._from_tiles(out_tiles.to(q.dtype), merge_queries, like=q)
        lse = self._from_tiles(logits.logsumexp(-1, keepdim=True), merge_queries, like=q)
        return out, lse.squeeze(-1)
