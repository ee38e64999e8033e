"""Keys that all queries of a map see, besides those around them: text tokens, and averages of cells of the map."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attend import EagerBody, accumulator, of_one_layout
from ._checks import check_alike, check_device
from ._graph.sizes import differs, is_known
from ._graph.tiles import product
from .merge import merge_attention
from .tiled_attention import CHUNK_LOGITS


class Extras(NamedTuple):
    """The weights of cells, and the keys and values of text, of an op on a map; each may be None."""

    cell_weight: Tensor | None
    text_k: Tensor | None
    text_v: Tensor | None

    @property
    def given(self) -> bool:
        return self.cell_weight is not None or self.text_k is not None

    def of_map(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values that all queries see, (B, T, heads, d) each, text first; None where there are none."""
        found = [] if self.text_k is None else [(self.text_k, self.text_v)]
        if self.cell_weight is not None:
            found.append((cell_means(k, self.cell_weight), cell_means(v, self.cell_weight)))
        if not found:
            return None
        keys, values = zip(*found, strict=True)
        return (keys[0], values[0]) if len(found) == 1 else (torch.cat(keys, 1), torch.cat(values, 1))

    def count(self, q: Tensor) -> int:
        """How many keys there are for a map like q."""
        text = 0 if self.text_k is None else self.text_k.shape[1]
        if self.cell_weight is None:
            return text
        rows, cols = self.cell_weight.shape
        return text + (q.shape[1] // rows) * (q.shape[2] // cols)


def check_extras(op: str, q: Tensor, v: Tensor, extras: Extras) -> None:
    """Raise ValueError unless the weights of cells fit the map, and the text its batch, heads and widths."""
    weight, text_k, text_v = extras
    if (text_k is None) != (text_v is None):
        raise ValueError(f"{op}: text_k and text_v must be given together, got one of them")
    if text_k is not None and text_v is not None:
        batch, heads, dim = q.shape[0], q.shape[3], q.shape[4]
        if text_k.dim() != 4 or differs((text_k.shape[0], *text_k.shape[2:]), (batch, heads, dim)):
            raise ValueError(f"{op}: text_k must be {(batch, 'T', heads, dim)} as q, got {tuple(text_k.shape)}")
        if differs(text_v.shape, (*text_k.shape[:3], v.shape[4])):
            raise ValueError(f"{op}: text_v must be {(*text_k.shape[:3], v.shape[4])}, got {tuple(text_v.shape)}")
        check_alike(op, q=q, text_k=text_k, text_v=text_v)
    if weight is not None:
        if weight.dim() != 2:
            raise ValueError(f"{op}: cell_weight must be (rows, columns), got shape {tuple(weight.shape)}")
        check_device(op, "cell_weight", weight, "q", q)
        rows, cols = weight.shape
        if is_known(q.shape[1] % rows != 0) or is_known(q.shape[2] % cols != 0):
            raise ValueError(f"{op}: cells of {rows} x {cols} must divide the map {tuple(q.shape[1:3])}")


def cell_means(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, heads, d) and (rows, cols) -> (B, H / rows * W / cols, heads, d): weighted sums of cells."""
    wide, (rows, cols) = accumulator(x.dtype), weight.shape
    cells = x.to(wide).unflatten(2, (x.shape[2] // cols, cols)).unflatten(1, (x.shape[1] // rows, rows))
    weighted = cells * weight.to(wide)[None, None, :, None, :, None, None]  # (B, Y, rows, X, cols, heads, d)
    return weighted.sum((2, 4)).flatten(1, 2).to(x.dtype)


def joined(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to both sets of keys, from the output and the log-sum-exp of each."""
    return merge_attention([near[0], far[0]], [near[1], far[1]])


def keys_attention_lse_graph(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from (B, H, W, heads, d) to (B, T, heads, d) by differentiable operations; also the log-sum-exp."""
    out, lse = _attend(q.flatten(1, 2), k, v, scale)
    return of_one_layout(out.unflatten(1, q.shape[1:3])), of_one_layout(lse.unflatten(1, q.shape[1:3]))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, N, heads, d), (B, T, heads, d) -> (B, N, heads, dv), (B, N, heads)."""
    wide = accumulator(q.dtype)
    queries, keys, values = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    logits = product(queries * scale, keys, transposes=True)  # (B, heads, N, T)
    out = product(logits.softmax(-1), values).transpose(1, 2).to(q.dtype)
    return out, logits.logsumexp(-1).transpose(1, 2)


class KeysAttentionLse(EagerBody):
    """Attend from every token of a map to the same keys, chunk by chunk; the backward pass computes a chunk again.

    Tensors: q (B, H, W, heads, d), k and v (B, T, heads, d). Returns the output, and the log-sum-exp of the logits.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        q, k, v = tensors
        tokens = q.flatten(1, 2)
        out = q.new_empty(*tokens.shape[:3], v.shape[-1])
        lse = q.new_empty(tokens.shape[:3], dtype=accumulator(q.dtype))
        for image, part in self._parts(tokens, k):
            out[image, part], lse[image, part] = _attend(tokens[image, part], k[image], v[image], self.scale)
        return out.unflatten(1, q.shape[1:3]), lse.unflatten(1, q.shape[1:3])

    def backward(self, out: Any, grad: Any, *tensors: Any) -> list[Tensor | None]:
        q, k, v = tensors
        tokens, wide = q.flatten(1, 2), accumulator(q.dtype)
        grads = [x.flatten(1, 2) for x in grad]
        dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (tokens, k, v))
        for image, part in self._parts(tokens, k):
            leaves = [x.detach().requires_grad_() for x in (tokens[image, part], k[image], v[image])]
            with torch.enable_grad():
                results = _attend(*leaves, self.scale)
            found = torch.autograd.grad(results, leaves, [g[image, part] for g in grads])
            for total, more in zip((dq[image, part], dk[image], dv[image]), found, strict=True):
                total += more
        return [x.to(q.dtype) for x in (dq.unflatten(1, q.shape[1:3]), dk, dv)]

    def graph(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        return keys_attention_lse_graph(*tensors, self.scale)

    def _parts(self, tokens: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
        """Images and tokens whose logits are alive at once."""
        most, (batch, length, heads, _) = torch.get_num_threads() * CHUNK_LOGITS, tokens.shape
        rows = max(1, min(length, most // max(heads * k.shape[1], 1)))
        images = max(1, most // max(heads * k.shape[1] * length, 1)) if rows == length else 1
        return [
            (slice(image, image + images), slice(first, first + rows))
            for image in range(0, batch, images)
            for first in range(0, length, rows)
        ]
