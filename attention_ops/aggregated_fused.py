"""Aggregated attention on a GPU: the 3 x 3 keys and the pooled keys by their own kernels, joined by log-sum-exp."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.keys import keys_attention_lse
from ..kernels.local.launch import local_attention_lse
from ..kernels.local.plan import Pattern
from ..kernels.mixture import local_mixture
from ._attend import accumulator
from ._graph.aggregated import gated, log_keys_seen
from .aggregated_parts import Local, Pooled
from .merge import merge_attention

THREE_BY_THREE = Pattern("circle", (2, 2), (1, 1))  # closer than 2: the 8 tokens around a token, those on the map


def aggregated_attention_fused(
    q: Tensor, pooled: Pooled, local: Local, embedding: Tensor, temperature: Tensor, gates: Tensor | None
) -> Tensor:
    """All heads of all tokens; the gates multiply the result."""
    wide, dtype = accumulator(q.dtype), q.dtype
    u = F.normalize(q.to(wide), dim=-1)
    seen = log_keys_seen((q.shape[1], q.shape[2]), local.kernel, pooled.k.shape[1], q.device, wide)
    scaled = ((u + embedding.to(wide)) * temperature.to(wide)[:, None] * seen[:, :, None, None]).to(dtype)
    bias = (pooled.table, pooled.rows, pooled.cols)
    out, lse = keys_attention_lse(scaled, _normalised(pooled.k), pooled.v, scale=1.0, bias=bias)
    if local.given:
        near, near_lse = local_attention_lse(
            scaled, _normalised(local.k), local.v, THREE_BY_THREE, bias=local.bias, scale=1.0
        )  # fmt: skip
        weights = torch.einsum("bhwnd,ndk->bhwnk", u, local.tokens.to(wide)) + local.token_bias.to(wide)
        out = merge_attention([near, out], [near_lse, lse])[0] + local_mixture(weights.to(dtype), local.v, local.kernel)
    return gated(out, gates)


def _normalised(k: Tensor) -> Tensor:
    return F.normalize(k.to(accumulator(k.dtype)), dim=-1).to(k.dtype)
