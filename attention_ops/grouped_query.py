"""Attention in which several query heads share a key head; who shares which may depend on the keys.

Papers     Ainslie et al. 2023, arXiv:2305.13245 (GQA); Khan et al. 2024, arXiv:2408.08454 (key-driven, dynamic and
           perturbed grouping, for ViTs).
Official   https://github.com/yjzhang0505/key-driven-gqa (MIT).
Semantics  groups are runs of query heads; a key head may serve none. Keys with a large norm serve more query heads.
We differ  by default every image is grouped by its own keys; the authors sum the norms over the batch, so that the
           result of an image depends on the others (`per_batch=True`). Equal norms, norms that are not finite and a
           single key head give equal groups; the authors' loop does not end there. Groups that do not add up to the
           number of query heads are repaired at the largest or smallest group; for two of the rules the authors draw
           a random group.
Tiled      key heads are copied to the query heads that they serve, then SDPA. No number is read by the host.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ._attend import accumulator, of_one_layout, sdpa
from ._checks import check_alike, check_device
from ._graph.sizes import differs, image_numbers, is_known
from ._graph.tiles import attend
from ._op import Impl, declare, run
from ._repeats import Earlier

OP = "grouped_query_attention"
Allocation = Literal["uniform", "key_norm", "ema", "difference", "noise"]
ALLOCATIONS = ("uniform", "key_norm", "ema", "difference", "noise")


def grouped_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_heads: Tensor,
    *,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every token to all tokens, each query head with the key head that is named for it.

    Cost: N * N * (head_dim + value_dim) multiply-adds per query head.

    Args:
        q: (B, N, heads, head_dim); strided views are fine.
        k, v: (B, M, kv_heads, head_dim) and (B, M, kv_heads, value_dim), q's dtype and device.
        key_heads: (B or 1, heads) int64: the key head of every query head, 0 to kv_heads - 1.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "tiled" or "reference"; there is no kernel of ours: "fused" is refused.

    Returns:
        (B, N, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        IndexError: key_heads is out of range, on a CPU.
        NotImplementedError: `impl="fused"`.
    """
    return run(OP, q, k, v, key_heads, scale, impl)


def _check(q: Tensor, k: Tensor, v: Tensor, key_heads: Tensor) -> None:
    if q.dim() != 4 or any(is_known(size < 1) for size in q.shape[1:]):
        raise ValueError(f"{OP}: q must be (B, N, heads, head_dim), none of the last three 0, got {tuple(q.shape)}")
    if k.dim() != 4 or differs((k.shape[0], k.shape[3]), (q.shape[0], q.shape[3])) or is_known(k.shape[1] < 1):
        raise ValueError(f"{OP}: k must be (B, M, kv_heads, head_dim) as q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != 4 or differs(v.shape[:3], k.shape[:3]):
        raise ValueError(f"{OP}: v must be (B, M, kv_heads, value_dim) as k {tuple(k.shape)}, got {tuple(v.shape)}")
    check_alike(OP, q=q, k=k, v=v)
    if key_heads.dim() != 2 or key_heads.dtype != torch.int64 or differs(key_heads.shape[1:], q.shape[2:3]):
        found = f"{tuple(key_heads.shape)} {key_heads.dtype}"
        raise ValueError(f"{OP}: key_heads must be (B or 1, heads = {q.shape[2]}) int64, got {found}")
    check_device(OP, "key_heads", key_heads, "q", q)


def of_query_heads(x: Tensor, key_heads: Tensor) -> Tensor:
    """Copy the key head of every query head: (B, M, kv_heads, d), (B or 1, heads) -> (B, heads, M, d)."""
    image = image_numbers(x)[:, None]
    return x.transpose(1, 2)[image, key_heads]


def grouped_query_attention_reference(q: Tensor, k: Tensor, v: Tensor, key_heads: Tensor, scale: float) -> Tensor:
    """The definition, float32 inside at least."""
    wide = accumulator(q.dtype)
    keys, values = (of_query_heads(x.to(wide), key_heads) for x in (k, v))
    logits = torch.einsum("bnhd,bhmd->bhnm", q.to(wide) * scale, keys)
    return torch.einsum("bhnm,bhmd->bnhd", logits.softmax(-1), values).to(q.dtype)


def grouped_query_attention_tiled(q: Tensor, k: Tensor, v: Tensor, key_heads: Tensor, scale: float) -> Tensor:
    """SDPA on copies of the key heads."""
    keys, values = (of_query_heads(x, key_heads) for x in (k, v))
    return sdpa(q.transpose(1, 2), keys, values, scale).transpose(1, 2)


def grouped_query_attention_graph(q: Tensor, k: Tensor, v: Tensor, key_heads: Tensor, scale: float) -> Tensor:
    """The same by differentiable operations."""
    queries, keys, values = q.transpose(1, 2), of_query_heads(k, key_heads), of_query_heads(v, key_heads)
    return of_one_layout(attend(queries, keys, values, None, scale).transpose(1, 2))


def _why_not_fused() -> str:
    return "torch's scaled_dot_product_attention has a kernel for it; there is no Triton kernel"


def _macs(q: Tensor, k: Tensor, v: Tensor) -> int:
    return q[..., 0].numel() * k.shape[1] * (q.shape[3] + v.shape[3])


declare(
    grouped_query_attention,
    check=_check,
    reference=grouped_query_attention_reference,
    tiled=grouped_query_attention_tiled,
    graph=grouped_query_attention_graph,
    why_not_fused=_why_not_fused,
    macs=_macs,
)


# Which query heads a key head serves


def group_sizes(weights: Tensor, heads: int) -> Tensor:
    """Share out query heads in proportion to weights: round, then repair the sum, one head at a time.

    While the sum is above `heads`, the largest group loses one; while it is below, the smallest gets one; the first of
    equals. Rounding is off by at most half a head for each group, so that kv_heads // 2 steps suffice.

    Args:
        weights: (..., kv_heads), not negative. Rows that sum to 0, or are not finite, count as equal weights.

    Returns:
        (..., kv_heads) whole numbers as floats, at least 0, with the sum `heads`.
    """
    groups = weights.shape[-1]
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total.isfinite() & (total > 0), weights, torch.ones_like(weights))
    sizes = (weights / weights.sum(-1, keepdim=True) * heads).round()
    place = torch.arange(groups, device=weights.device)
    for _ in range(groups // 2 + 1):
        left = heads - sizes.sum(-1, keepdim=True)
        largest = (place == sizes.argmax(-1, keepdim=True)).to(sizes.dtype)
        smallest = (place == sizes.argmin(-1, keepdim=True)).to(sizes.dtype)
        sizes = sizes - (left < 0).to(sizes.dtype) * largest + (left > 0).to(sizes.dtype) * smallest
    return sizes


def key_norm_sizes(norms: Tensor, heads: int) -> Tensor:
    """Group sizes of the key-driven rule: norms (..., kv_heads), scaled to 0 to 1 between smallest and largest."""
    low, high = norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
    return group_sizes((norms - low) / (high - low), heads)


def dynamic_sizes(norms: Tensor, cache: Tensor, heads: int, by_difference: bool) -> Tensor:
    """Group sizes of the dynamic rules: by the change of the norms since the cache, or by a moving average."""
    weights = (cache - norms).abs() if by_difference else 0.9 * norms + 0.1 * cache
    return group_sizes(weights, heads)


def key_heads_of(sizes: Tensor, heads: int) -> Tensor:
    """Group sizes (..., kv_heads) with the sum `heads` -> the key head of every query head, (..., heads) int64."""
    ends = sizes.cumsum(-1)[..., None, :]  # (..., 1, kv_heads)
    place = torch.arange(heads, device=sizes.device)[:, None]
    return (place >= ends).sum(-1)


def key_norms(k: Tensor, per_batch: bool) -> Tensor:
    """Frobenius norm of every key head, over tokens and channels: (B, N, kv_heads, d) -> (B or 1, kv_heads)."""
    norms = k.detach().to(accumulator(k.dtype)).square().sum((1, 3)).sqrt()
    return norms.sum(0, keepdim=True) if per_batch else norms


class DynamicGroups(nn.Module):
    """Key heads serve query heads by the norms of the keys and a cache of earlier norms.

    In training the cache becomes (cache + norms) / window at every window-th call. With `per_batch` the group sizes
    stay between these calls, and every call in eval mode overwrites the cache, as in the authors' code. Otherwise every
    image is grouped by its own norms, the norms that enter the cache are means over the batch, and calls in eval mode
    change nothing.
    """

    cache: Tensor
    sizes: Tensor
    step: Tensor

    def __init__(
        self, heads: int, kv_heads: int, by_difference: bool, per_batch: bool, window: int, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.by_difference = by_difference
        self.per_batch = per_batch
        self.window = window
        self.register_buffer("cache", torch.zeros(kv_heads, device=device, dtype=dtype))
        self.register_buffer("sizes", torch.zeros(kv_heads, device=device, dtype=dtype))
        self.register_buffer("step", torch.zeros((), device=device, dtype=torch.int64))
        self.earlier = Earlier()

    def forward(self, k: Tensor) -> Tensor:  # (B, N, kv_heads, d) -> (B or 1, heads)
        norms = key_norms(k, self.per_batch)
        cache, held, step, moves = self.cache, self.sizes, self.step, True
        if not torch.jit.is_scripting():
            cache, held, step, moves = self.state()
        sizes = dynamic_sizes(norms, cache.to(norms.dtype), self.heads, self.by_difference)
        due = step % self.window == 0
        if self.training and self.per_batch:
            sizes = torch.where(due, sizes, held.to(sizes.dtype))
        if moves:
            self.move(norms, sizes, due)
        return key_heads_of(sizes, self.heads)

    @torch.jit.ignore
    def state(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Return the state that this pass reads, and whether it may change it."""
        now = (self.cache, self.sizes, self.step)
        if not (self.training or self.per_batch):
            return (*now, True)
        (cache, sizes, step), moves = self.earlier.read(*now)
        return cache, sizes, step, moves

    def move(self, norms: Tensor, sizes: Tensor, due: Tensor) -> None:
        """Change the running state: norms and sizes (B or 1, kv_heads); whether the cache is due, a scalar."""
        if self.training:
            if self.per_batch:
                self.sizes.copy_(sizes[0])
            self.cache.copy_(torch.where(due, (self.cache + norms.mean(0)) / self.window, self.cache))
            self.step.add_(1)
        elif self.per_batch:
            self.cache.copy_(norms[0])


class GroupNoise(nn.Module):
    """Subtract noise from the outputs of the heads, in training and in eval mode.

    The output of a head over all tokens, flattened, is a row. The noise of a group is uniform, 0 where the number of
    the column is that of the head in the group, standardized per row, then scaled to the mean and the deviation of the
    row of each image. All images have the same noise.
    """

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads

    def forward(self, x: Tensor) -> Tensor:  # (B, N, heads, d)
        rows = x.transpose(1, 2).flatten(2)  # (B, heads, N * d)
        group, length = rows.shape[1] // self.kv_heads, rows.shape[2]
        on_diagonal = torch.eye(group, length, device=x.device, dtype=torch.bool)
        drawn = [torch.rand(group, length, device=x.device, dtype=x.dtype) for _ in range(self.kv_heads)]
        noise = torch.cat([draw.masked_fill(on_diagonal, 0) for draw in drawn])  # (heads, N * d)
        noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
        rows = rows - (noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True))
        return rows.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Multi-head self-attention with fewer key heads than query heads, on tokens (B, N, C).

    Args:
        dim: channels; heads must divide it.
        heads: query heads; kv_heads: key heads, at most as many.
        allocation: which query heads share a key head. "uniform": runs of heads / kv_heads. "key_norm": in proportion
            to the norms of the keys (key-driven). "ema", "difference": also by earlier norms (dynamic). "noise":
            uniform, with noise subtracted from the outputs of the heads (perturbed).
        per_batch: group all images of a batch alike, by the sum of their norms; for the three rules that see norms.
        window: calls in training between two updates of the dynamic rules' cache.
        qkv_bias: give the projections of q, k and v a bias.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: the sizes do not fit, the allocation is unknown, or per_batch has no effect with it.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        allocation: Allocation = "uniform",
        per_batch: bool = False,
        window: int = 10,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_groups(dim, heads, kv_heads, allocation, per_batch, window)
        dd = {"device": device, "dtype": dtype}
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.scale = self.head_dim**-0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias, **dd)
        self.by_norms, self.per_batch = allocation == "key_norm", per_batch
        self.groups: DynamicGroups | None = None
        if allocation in ("ema", "difference"):
            self.groups = DynamicGroups(heads, kv_heads, allocation == "difference", per_batch, window, **dd)
        self.noise = GroupNoise(kv_heads) if allocation == "noise" else nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C)
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))  # (B, N, heads, head_dim)
        k = self.k(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))
        out = grouped_query_attention(q, k, v, self.key_heads(k), scale=self.scale)
        return self.proj_drop(self.proj(self.noise(out).flatten(2)))

    def key_heads(self, k: Tensor) -> Tensor:
        """Return the key head of every query head: (B, N, kv_heads, head_dim) -> (B or 1, heads) int64."""
        if self.groups is not None:
            return self.groups(k)
        if self.by_norms:
            return key_heads_of(key_norm_sizes(key_norms(k, self.per_batch), self.heads), self.heads)
        return (torch.arange(self.heads, device=k.device) // (self.heads // self.kv_heads))[None]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}"


def check_groups(dim: int, heads: int, kv_heads: int, allocation: str, per_batch: bool, window: int) -> None:
    """Refuse sizes and rules that do not fit together, with a ValueError."""
    name = "GroupedQueryAttention"
    if allocation not in ALLOCATIONS:
        raise ValueError(f"{name}: allocation must be one of {ALLOCATIONS}, got {allocation!r}")
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: num_heads must divide dim {dim}, got {heads}")
    if not 1 <= kv_heads <= heads:
        raise ValueError(f"{name}: kv_heads must be 1 to num_heads = {heads}, got {kv_heads}")
    if allocation in ("uniform", "noise") and heads % kv_heads:
        raise ValueError(
            f"{name}: kv_heads must divide num_heads = {heads} with allocation {allocation!r}, got {kv_heads}"
        )
    if per_batch and allocation in ("uniform", "noise"):
        raise ValueError(f"{name}: per_batch has no effect with allocation {allocation!r}, whose groups see no keys")
    if window < 1:
        raise ValueError(f"{name}: window must be at least 1, got {window}")


def pooled_heads(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Mean over each run of heads / kv_heads heads of a projection's rows: (heads * d, ...) -> (kv_heads * d, ...)."""
    return weight.unflatten(0, (kv_heads, heads // kv_heads, -1)).mean(1).flatten(0, 1)
