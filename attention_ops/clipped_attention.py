"""Attention in eager torch whose probabilities are clipped or masked: logits are made again in the backward pass.

SDPA has no clipped softmax. Forward and backward walk over images, and over rows of queries where one image has too
many logits, so that memory stays at O(one chunk) logits. A chunk whose result is not finite is computed again without
the masked pairs.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import EagerBody, accumulator, is_finite, of_one_layout, product_of_seen
from ._clip import clipped
from ._graph.clipped import attend_clipped, shown
from .tiled_attention import CHUNK_LOGITS


class Chunk(NamedTuple):
    """Some images, and some of the queries of each piece."""

    images: slice
    rows: slice


class ClippedAttention(EagerBody):
    """Attend from the queries of a piece to its keys. Tensors: q, k, v, bias.

    q: (B, heads, pieces, T, d); k, v: (B, heads, pieces, K, d).
    bias: (heads, T, K), added to the scaled logits of every piece; or None.

    Args:
        seen: bool that broadcasts to (B, heads, pieces, T, K); None: all.
        clip: (gamma, zeta) of a clipped softmax; None: a plain one.
        scale: of the logits.
    """

    def __init__(self, seen: Tensor | None, clip: Sequence[float] | None, scale: float) -> None:
        self.seen, self.clip, self.scale = seen, clip, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        for chunk in self._chunks(q, k):
            seen, probs = self._probabilities(q, k, bias, chunk)
            kept, values = clipped(probs, self.clip), self._keys(v, chunk)
            result = torch.matmul(kept, values)
            if seen is not None and not is_finite(result):
                result = product_of_seen(torch.where(seen, kept, 0), seen, values)
            out[chunk.images, :, :, chunk.rows] = result.to(out.dtype)
        return out

    def backward(
        self, out: Tensor | None, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        wide = accumulator(q.dtype)
        dq = q.new_empty(q.shape)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        dbias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=bias.device)
        for chunk in self._chunks(q, k):
            images, rows = chunk
            few = grad[images, :, :, rows].to(wide), self._queries(q, chunk), self._keys(k, chunk), self._keys(v, chunk)
            seen, probs = self._probabilities(q, k, bias, chunk)
            of_q, of_k, of_v, dlogits = self._gradients(probs, None, *few)
            if seen is not None and not is_finite(of_q, of_k, of_v):
                of_q, of_k, of_v, dlogits = self._gradients(probs, seen, *few)
            dq[images, :, :, rows] = (of_q * self.scale).to(q.dtype)
            dk[images] += of_k
            dv[images] += of_v
            if dbias is not None:
                dbias[:, rows] += dlogits.sum((0, 2))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None if dbias is None or bias is None else dbias.to(bias.dtype)

    def graph(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias[:, None]
        return of_one_layout(attend_clipped(q, k, v, bias, self.seen, self.clip, self.scale))

    def _chunks(self, q: Tensor, k: Tensor) -> Iterator[Chunk]:
        """Cut the batch so that a chunk's logits fit `CHUNK_LOGITS` a thread; rows only where one image is more."""
        batch, heads, pieces, rows, _ = q.shape
        of_row = max(heads * pieces * k.shape[3], 1)
        most = torch.get_num_threads() * CHUNK_LOGITS
        step, length = max(most // max(of_row * rows, 1), 1), max(min(most // of_row, rows), 1)
        for image in range(0, batch, step):
            for row in range(0, rows, length):
                yield Chunk(slice(image, image + step), slice(row, row + length))

    def _queries(self, q: Tensor, chunk: Chunk) -> Tensor:
        return q[chunk.images, :, :, chunk.rows].to(accumulator(q.dtype)) * self.scale

    def _keys(self, x: Tensor, chunk: Chunk) -> Tensor:
        return x[chunk.images].to(accumulator(x.dtype))

    def _probabilities(self, q: Tensor, k: Tensor, bias: Tensor | None, chunk: Chunk) -> tuple[Tensor | None, Tensor]:
        """Return what is seen and the plain softmax of a chunk, 0 where nothing is seen: (b, heads, pieces, t, K)."""
        logits = torch.matmul(self._queries(q, chunk), self._keys(k, chunk).mT)
        if bias is not None:
            logits += bias[:, None, chunk.rows].to(logits.dtype)
        if self.seen is None:
            return None, logits.softmax(-1)
        seen = self.seen[chunk.images] if self.seen.shape[0] > 1 else self.seen
        seen = seen[..., chunk.rows, :]
        return seen, torch.where(seen, logits.masked_fill_(~shown(seen), -torch.inf).softmax(-1), 0)

    def _gradients(
        self, probs: Tensor, seen: Tensor | None, grad: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of the scaled queries, of keys, of values and of the logits, for one chunk.

        Args:
            seen: where given, products leave out the pairs that are not seen: 0 times what is not finite is NaN.
        """

        def multiply(weights: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
            weights = weights.mT if transposed else weights
            if seen is None:
                return torch.matmul(weights, x)
            return product_of_seen(weights, (seen.mT if transposed else seen).expand(weights.shape), x)

        kept = clipped(probs, self.clip)
        dprobs = torch.matmul(grad, v.mT)
        if self.clip is not None:
            gamma, zeta = self.clip
            stretched = probs * (zeta - gamma) + gamma
            dprobs = torch.where((stretched >= 0) & (stretched <= 1), dprobs * (zeta - gamma), 0)
        if seen is not None:
            kept, dprobs = (torch.where(seen, x, 0) for x in (kept, dprobs))
        delta = (probs * dprobs).sum(-1, keepdim=True)
        dlogits = probs * (dprobs - delta)
        dlogits = dlogits if seen is None else torch.where(seen, dlogits, 0)
        return multiply(dlogits, k), multiply(dlogits, q, True), multiply(kept, grad, True), dlogits


class MaskedAttention(ClippedAttention):
    """The same with a mask and without clipping, for one piece and no bias: the forward pass is SDPA's."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        assert self.seen is not None
        seen = self.seen[:, :, 0]
        queries, keys, values = (x[:, :, 0] for x in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=shown(seen), scale=self.scale)
        out = torch.where(seen.any(-1, keepdim=True), out, 0)
        return out[:, :, None] if is_finite(out) else super().forward(q, k, v, bias)
