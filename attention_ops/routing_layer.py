"""Routing attention as layers: k-means centroids that follow the tokens, and the loss that draws tokens to them.

Papers and code: see routing.py. The authors count the tokens of a cluster over all heads by mistake, which changes the
length of centroids; here they are counted per head, and `counts_per_head=False` counts as the authors do.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ._repeats import Earlier
from .losses import Loss
from .mixers import register_mixer
from .routing import cluster_attention, cluster_members
from .tiling import smaller

VARIANTS = ("google", "lucidrains")
BETA = 1e-4  # of the commitment loss
EPS = 1e-5  # added to the counts of clusters


class ClusterRouting(nn.Module):
    """Routing attention on queries, keys and values of heads, with its centroids.

    In training, a forward pass moves the centroids to the means of their tokens (`decay`), and leaves
    `commitment.value`, a scalar to add to the loss.

    Args:
        heads, head_dim: of queries, keys and values.
        clusters: centroids of a head.
        window: tokens of a cluster; at most those of the sequence.
        key_window: keys of a cluster; as `window` where None.
        variant: "google" or "lucidrains".
        share_qk: keys are the queries.
        is_causal: a query sees no key of a later position.
        strided: see `cluster_members`; of "google" only.
        memory: learned keys and values of a cluster that its queries see; of "lucidrains" only.
        decay: of the moving averages.
        counts_per_head: count the tokens of clusters per head; False: as the authors' code.
    """

    means: Tensor
    ema_count: Tensor
    ema_means: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        clusters: int,
        window: int,
        key_window: int | None = None,
        variant: str = "google",
        share_qk: bool = False,
        is_causal: bool = False,
        strided: bool = False,
        memory: int = 0,
        decay: float = 0.999,
        counts_per_head: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"ClusterRouting: variant must be one of {list(VARIANTS)}, got {variant!r}")
        if min(clusters, window, key_window or 1) < 1:
            raise ValueError(f"ClusterRouting: clusters and windows must be at least 1, got {clusters}, {window}")
        if (memory and variant == "google") or (strided and variant != "google"):
            raise ValueError(
                f"ClusterRouting: the variant {variant!r} has neither memory nor strided windows of the other"
            )
        dd = {"device": device, "dtype": dtype}
        self.clusters, self.window, self.key_window = clusters, window, window if key_window is None else key_window
        self.google, self.share_qk, self.is_causal, self.strided = variant == "google", share_qk, is_causal, strided
        self.decay, self.counts_per_head = decay, counts_per_head
        means = torch.randn(heads, clusters, head_dim, **dd)
        means = F.layer_norm(means, (head_dim,)) if self.google else F.normalize(means, dim=-1)
        self.register_buffer("means", means)
        self.register_buffer("ema_count", torch.zeros(heads, clusters, **dd))
        self.register_buffer("ema_means", means.clone())
        self.memory_k = nn.Parameter(torch.randn(heads, clusters, memory, head_dim, **dd)) if memory else None
        self.memory_v = nn.Parameter(torch.randn(heads, clusters, memory, head_dim, **dd)) if memory else None
        self.commitment = Loss()
        self.earlier = Earlier()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, Nq, heads, d), (B, Nk, heads, d) twice -> (B, Nq, heads, d)."""
        means, moves = self.means, True
        if not torch.jit.is_scripting():
            means, moves = self.state()
        window, key_window = smaller(self.window, q.shape[1]), smaller(self.key_window, k.shape[1])
        width = [q.shape[3]]
        if self.google:
            q = F.layer_norm(q, width, eps=1e-6)
            k = q if self.share_qk else F.layer_norm(k, width, eps=1e-6)
            routed_q, routed_k = q, k
        else:
            routed_q = F.normalize(q, dim=-1)
            routed_k = routed_q if self.share_qk else F.normalize(k, dim=-1)
            k = routed_q if self.share_qk else k
        members = cluster_members(routed_q, means, window, strided=self.strided, ordered=self.google)
        key_members = members
        if not self.share_qk or self.key_window != self.window:
            key_members = cluster_members(
                routed_k, means, key_window, strided=self.strided, ordered=self.google
            )  # fmt: skip
        if self.google:
            padding = (v == 0).all(-1).transpose(1, 2)  # (B, heads, N)
            out = cluster_attention(
                q, k, v, members, key_members, key_mask=padding, is_causal=self.is_causal, scale=1.0
            )  # fmt: skip
        elif self.share_qk:
            out = cluster_attention(
                q, k, v, members, key_members, memory_k=self.memory_k, memory_v=self.memory_v,
                is_causal=self.is_causal, self_logit=-5e4, count_eps=1e-5,
            )  # fmt: skip
        else:
            out = cluster_attention(
                q, k, v, members, key_members, memory_k=self.memory_k, memory_v=self.memory_v,
                is_causal=self.is_causal, count_eps=1e-5,
            )  # fmt: skip
        if not torch.jit.is_scripting():
            self.follow(routed_q, routed_k, means, moves)
        return out

    @torch.jit.ignore
    def state(self) -> tuple[Tensor, bool]:
        """Return the centroids that this pass reads, and whether it may move them."""
        if not self.training:
            return self.means, False
        (means,), moves = self.earlier.read(self.means)
        return means, moves

    @torch.jit.ignore
    def follow(self, q: Tensor, k: Tensor, means: Tensor, moves: bool) -> None:
        """In training: set the commitment loss, then move the centroids to the tokens."""
        if not self.training:
            self.commitment.keep(None)
            return
        tokens = [q] if self.share_qk else [q, k]
        nearest = [_nearest(x, means) for x in tokens]
        self.commitment.keep(self._loss(tokens, nearest, means))
        if moves:
            with torch.no_grad():
                move = self._move_by_counts if self.google else self._move_by_bins
                move([x.detach() for x in tokens], nearest)

    def commitment_loss(self, q: Tensor, k: Tensor) -> Tensor:
        """Mean square distance of routed queries and keys from their nearest centroids, times 1e-4."""
        tokens = [q] if self.share_qk else [q, k]
        return self._loss(tokens, [_nearest(x, self.means) for x in tokens], self.means)

    def _loss(self, tokens: list[Tensor], nearest: list[Tensor], means: Tensor) -> Tensor:
        heads = torch.arange(means.shape[0], device=means.device)
        apart = [x - means[heads, near].to(x.dtype) for x, near in zip(tokens, nearest, strict=True)]
        if not self.google:
            return BETA * torch.cat(apart, 1).square().mean()
        losses = torch.stack([x.square().mean() for x in apart])
        return BETA * losses.sum() * (2 if self.share_qk else 1)

    def _sums(self, tokens: list[Tensor], nearest: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens of each cluster, and their sums: (heads, K), (heads, K, d), over all processes."""
        counts, sums = torch.zeros_like(self.ema_count), torch.zeros_like(self.means)
        for x, near in zip(tokens, nearest, strict=True):
            chosen = F.one_hot(near, self.clusters).to(sums.dtype)  # (B, N, heads, K)
            chosen = chosen * (x != 0).any(-1, keepdim=True)
            sums += torch.einsum("bnhk,bnhd->hkd", chosen, x.to(sums.dtype))
            by_head = chosen.transpose(1, 2)  # (B, heads, N, K)
            counts += by_head.sum((0, 2)) if self.counts_per_head else by_head.reshape(-1, *counts.shape).sum(0)
        if dist.is_available() and dist.is_initialized():
            for total in (counts, sums):
                dist.all_reduce(total)
        return counts, sums

    def _move_by_counts(self, tokens: list[Tensor], nearest: list[Tensor]) -> None:
        counts, sums = self._sums(tokens, nearest)
        self.ema_count.lerp_(counts, 1 - self.decay)
        self.ema_means.lerp_(sums, 1 - self.decay)
        total = self.ema_count.sum(-1, keepdim=True)
        smoothed = (self.ema_count + EPS) / (total + self.clusters * EPS) * total
        self.means.copy_(self.ema_means / smoothed[..., None])

    def _move_by_bins(self, tokens: list[Tensor], nearest: list[Tensor]) -> None:
        counts, sums = self._sums(tokens, nearest)
        means = F.normalize(sums / counts.clamp(min=1)[..., None], dim=-1)
        means = torch.where(counts[..., None] > 0, means, self.means)
        self.means.lerp_(means, 1 - self.decay)


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    """Return the centroid of highest product of every token: (B, N, heads, d), (heads, K, d) -> (B, N, heads)."""
    return torch.einsum("bnhd,hkd->bnhk", x.detach().to(means.dtype), means).argmax(-1)


@register_mixer("routing")
class RoutingAttention(nn.Module):
    """Multi-head routing attention with its projections, a token mixer (see mixers.py).

    Prefix tokens are routed like the others. Maps of any size.

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        map_size: (H, W), for the default of `window`.
        prefix_tokens: tokens ahead of the map.
        qkv_bias: give the qkv projection a bias.
        clusters: centroids of a head.
        window: tokens of a cluster; the tokens divided by the clusters, rounded up, where None.
        variant, share_qk, is_causal, strided, memory, decay, counts_per_head: of `ClusterRouting`.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        clusters: int = 8,
        window: int | None = None,
        variant: str = "google",
        share_qk: bool = False,
        is_causal: bool = False,
        strided: bool = False,
        memory: int = 0,
        decay: float = 0.999,
        counts_per_head: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.prefix_tokens = prefix_tokens
        tokens = prefix_tokens + map_size[0] * map_size[1]
        window = -(-tokens // max(clusters, 1)) if window is None else window
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.routing = ClusterRouting(
            num_heads,
            dim // num_heads,
            clusters=clusters,
            window=window,
            variant=variant,
            share_qk=share_qk,
            is_causal=is_causal,
            strided=strided,
            memory=memory,
            decay=decay,
            counts_per_head=counts_per_head,
            **dd,
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, N, C) -> (B, N, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        out = self.routing(q, k, v)
        return self.proj_drop(self.proj(out.flatten(2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, clusters={self.routing.clusters}, window={self.routing.window}"
