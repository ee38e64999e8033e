"""Dual cross-attention (DCAL): attention rollout of one row, and attention of the queries that it picks.

Paper      Zhu, Ke, Li, Liu, Tian, Shan 2022, arXiv:2205.02151 (Dual Cross-Attention Learning).
Status     no official code is public. The definitions are the paper's, as others quote them; they were compared with
           code that is not by the authors.
Open       whether the class token is always a local query, and what the shortcut of the other tokens is, is not said.
           Here it always is, and the output of the others is 0 in front of the shortcut.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attend import accumulator


def attention_probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax over keys of scale * q k^T: (B, heads, N, d), (B, heads, M, d) -> (B, heads, N, M), float32 at least."""
    wide = accumulator(q.dtype)
    return torch.matmul(q.to(wide) * scale, k.to(wide).mT).softmax(-1)


def rollout_row(layers: Iterable[Tensor], row: int = 0) -> Tensor:
    """Return one row of the product of all layers' attention, each averaged with the identity: R = S'_L ... S'_1.

    S' = (S + I) / 2, with S the mean over heads. Only vectors are multiplied by matrices, one layer at a time.

    Cost: N * N multiply-adds per layer, beside the means over heads.

    Args:
        layers: the probabilities of every layer, LAST to first, each (B, heads, N, N) with rows that sum to 1.
        row: of the product; 0 is the class token.

    Returns:
        (B, N): how much each token of the input takes part in that token of the output; sums to 1.

    Raises:
        ValueError: there is no layer.
    """
    found = None
    for probabilities in layers:
        mean = probabilities.mean(1)  # (B, N, N)
        if found is None:
            found = (torch.arange(mean.shape[2], device=mean.device) == row).to(mean.dtype).expand(mean.shape[0], -1)
        found = 0.5 * torch.matmul(found[:, None], mean)[:, 0] + 0.5 * found
    if found is None:
        raise ValueError("rollout_row: wanted the probabilities of at least one layer, got none")
    return found


def local_queries(importance: Tensor, share: float, prefix: int = 1) -> Tensor:
    """Pick the class token and the patches of the largest importance.

    Args:
        importance: (B, N), of all tokens; those before `prefix` are no patches.
        share: of the patches, above 0 and up to 1; at least one patch is picked.

    Returns:
        (B, 1 + max(1, int(share * patches))) int64: places of tokens, the class token (0), then the largest first.
    """
    patches = importance[:, prefix:]
    best = patches.topk(max(1, int(share * patches.shape[1])), dim=1).indices + prefix
    return torch.cat([torch.zeros_like(best[:, :1]), best], 1)


class GlobalLocalCrossAttention(nn.Module):
    """Attention of a few local queries to all tokens (GLCA); the output of every other token is 0.

    Args:
        dim: channels; heads must divide it.
        heads: number of heads.
        share: of the patches that are local queries, above 0 and up to 1.
        prefix: tokens before the patches.
        qkv_bias: give the projections of q, k and v a bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        share: float = 0.1,
        *,
        prefix: int = 1,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"GlobalLocalCrossAttention: heads must divide dim {dim}, got {heads}")
        if not 0 < share <= 1:
            raise ValueError(f"GlobalLocalCrossAttention: share must be above 0 and up to 1, got {share}")
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.share = share
        self.prefix = prefix
        self.scale = (dim // heads) ** -0.5
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, importance: Tensor) -> Tensor:  # (B, N, C), (B, N) -> (B, N, C)
        picked = local_queries(importance, self.share, self.prefix)[..., None].expand(-1, -1, x.shape[2])  # (B, R, C)
        q = self.q_proj(x.gather(1, picked)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, R, d)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
        return torch.zeros_like(x, dtype=out.dtype).scatter(1, picked, out)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, share={self.share}"


def pairwise_keys(k: Tensor, partner: Tensor) -> Tensor:
    """Put the keys (or values) of every image's partner behind its own (PWCA): (B, heads, N, d) -> (B, heads, 2 N, d).

    Args:
        partner: (B,) int64, the other image of each pair.
    """
    return torch.cat([k, k[partner]], 2)
