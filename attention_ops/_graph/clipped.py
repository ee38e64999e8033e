"""Attention with a clipped softmax, a mask or gates for exporters and compilers: plain differentiable torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import compiles
from .._attend import accumulator, of_one_layout
from .._clip import clipped
from .tiles import product


def attend_clipped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    clip: Sequence[float] | None,
    scale: float,
) -> Tensor:
    """Attend from (..., T, d) to (..., K, d).

    Args:
        bias: added to the scaled logits, broadcasts to (..., T, K).
        seen: bool, broadcasts to (..., T, K); a row that sees nothing gives zeros.
        clip: (gamma, zeta) of a clipped softmax.
    """
    logits = product(q * scale, k, transposes=True)
    logits = logits if bias is None else logits + bias.to(accumulator(q.dtype))
    if seen is not None:
        logits = torch.where(shown(seen), logits, -torch.inf)
    probs = clipped(logits.softmax(-1), clip)
    if seen is not None:
        probs = torch.where(seen, probs, 0)
    return product(probs.to(v.dtype), v)


def shown(seen: Tensor) -> Tensor:
    """What a softmax may see: a row that sees nothing sees everything, since a row of nothing but -inf makes NaN."""
    return seen | ~seen.any(-1, keepdim=True)


def dense_attention_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    clip: Sequence[float] | None,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    """(B, N, heads, d) and (B, M, heads, d) -> (B, N, heads, d). Compilers get SDPA where nothing is clipped."""
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, d)
    if clip is None and mask is None and compiles():
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    else:
        out = attend_clipped(queries, keys, values, None, mask, clip, scale)
    out = out.transpose(1, 2)
    return of_one_layout(out if gate is None else out * gate[..., None])
