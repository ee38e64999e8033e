"""Attention inside clusters of tokens: every centroid takes the tokens that are most like it.

Paper      Roy et al. 2020, arXiv:2003.05997 (Routing Transformer).
Official   google-research, routing_transformer (TensorFlow, Apache-2.0); `variant="lucidrains"` of the layer is the
           widely used PyTorch code of another author.
Semantics  each centroid of a head takes the `window` tokens of highest product, queries and keys apart; tokens attend
           inside their clusters; a token in several clusters gets the mean, one in none gets 0.
Kernel     none: the clusters are batches of plain attention, gathered and scattered by torch.
"""

import torch
from torch import Tensor

from ._attend import accumulator
from ._checks import check_device, check_tokens
from ._graph.sizes import differs, is_known
from ._graph.tiles import product
from ._op import Impl, declare, run

OP = "cluster_attention"
HIDDEN = -1e9  # logit of a key that a query does not see: finite, for queries that see none


def cluster_members(x: Tensor, means: Tensor, window: int, strided: bool = False, ordered: bool = True) -> Tensor:
    """Return the tokens of each cluster, without gradient.

    Cost: N * clusters * head_dim multiply-adds per head.

    Args:
        x: (B, N, heads, head_dim), queries or keys.
        means: (heads, clusters, head_dim), the centroids.
        window: tokens of a cluster, 1 to N.
        strided: take every (N // window)-th token of the ascending order of distances in place of the nearest ones.
        ordered: sort the tokens of a cluster by position; else they lie in the order of their products.

    Returns:
        (B, heads, clusters, window) int64.

    Raises:
        ValueError: shapes disagree, or window is not 1 to N.
    """
    if not torch.jit.is_scripting():
        _check_members(x, means, window)
    x = x.detach()
    x = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    likeness = torch.matmul(means.detach().to(x.dtype), x.permute(0, 2, 3, 1))  # (B, heads, clusters, N)
    if strided:
        step = x.shape[1] // window
        members = likeness.argsort(dim=-1, descending=True)[..., ::step].narrow(-1, 0, window)
    else:
        members = likeness.topk(window, dim=-1)[1]
    return members.sort(dim=-1)[0] if ordered else members


def _check_members(x: Tensor, means: Tensor, window: int) -> None:
    if x.dim() != 4 or means.dim() != 3 or differs(means.shape[::2], x.shape[2:]):
        raise ValueError(
            f"cluster_members: x must be (B, N, heads, d) and means (heads, clusters, d), got {tuple(x.shape)} and "
            f"{tuple(means.shape)}"
        )
    if is_known(window < 1) or is_known(window > x.shape[1]):
        raise ValueError(f"cluster_members: window must be 1 to {x.shape[1]} tokens, got {window}")


def cluster_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_members: Tensor,
    k_members: Tensor,
    *,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    self_logit: float | None = None,
    count_eps: float = 1e-2,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend inside clusters of tokens, and average over the clusters of a token.

    Cost: clusters * window * key_window * head_dim multiply-adds per head, twice.

    Args:
        q: (B, Nq, heads, head_dim).
        k: (B, Nk, heads, head_dim); v: (B, Nk, heads, value_dim).
        q_members: (B, heads, clusters, window) int64, the queries of each cluster; see `cluster_members`.
        k_members: (B, heads, clusters, key_window) int64, its keys.
        memory_k, memory_v: (heads, clusters, M, head_dim or value_dim), keys that a cluster's queries see, or None.
        key_mask: (B, heads, Nk) bool, True for keys that nobody sees; None: all are seen.
        is_causal: a query sees no key of a later position.
        self_logit: the logit of a token's own key, in place of q . k; None: as any other.
        count_eps: added to the number of clusters of a token before the sum over clusters is divided by it.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "tiled" or "reference"; there is no kernel: "fused" is refused.

    Returns:
        (B, Nq, heads, value_dim), dtype of q (under autocast: the autocast dtype). Queries that see no key get 0.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        NotImplementedError: `impl="fused"`.
    """
    return run(
        OP, q, k, v, q_members, k_members, memory_k, memory_v, key_mask, is_causal, self_logit, count_eps, scale, impl
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_members: Tensor, k_members: Tensor, memory_k: Tensor | None,
    memory_v: Tensor | None, key_mask: Tensor | None,
) -> None:  # fmt: skip
    check_tokens(OP, q, k, v)
    for name, members in (("q_members", q_members), ("k_members", k_members)):
        if members.dim() != 4 or differs(members.shape[:2], (q.shape[0], q.shape[2])):
            wanted = (q.shape[0], q.shape[2], "clusters", "window")
            raise ValueError(f"{OP}: {name} must be {wanted}, got {tuple(members.shape)}")
        check_device(OP, name, members, "q", q)
    clusters = q_members.shape[2]
    if differs((k_members.shape[2],), (clusters,)):
        raise ValueError(f"{OP}: k_members must have the {clusters} clusters of q_members, got {k_members.shape[2]}")
    if (memory_k is None) != (memory_v is None):
        raise ValueError(f"{OP}: memory_k and memory_v must be given together, got one of them")
    if memory_k is not None and memory_v is not None:
        of_head = (q.shape[2], clusters, memory_k.shape[2])
        for name, memory, width in (("memory_k", memory_k, q.shape[3]), ("memory_v", memory_v, v.shape[3])):
            if differs(memory.shape, (*of_head, width)):
                raise ValueError(f"{OP}: {name} must be {(*of_head, width)}, got {tuple(memory.shape)}")
            check_device(OP, name, memory, "q", q)
    if key_mask is not None and differs(key_mask.shape, (q.shape[0], q.shape[2], k.shape[1])):
        wanted = (q.shape[0], q.shape[2], k.shape[1])
        raise ValueError(f"{OP}: key_mask must be {wanted}, got {tuple(key_mask.shape)}")


def cluster_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_members: Tensor, k_members: Tensor, memory_k: Tensor | None,
    memory_v: Tensor | None, key_mask: Tensor | None, is_causal: bool, self_logit: float | None, count_eps: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """The definition: all tokens to all tokens, once for each cluster, masked to its members. float32 inside."""
    wide = accumulator(q.dtype)
    queries, keys, values = (x.to(wide).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    of_q, of_k = (_is_member(*pair) for pair in ((q_members, q.shape[1]), (k_members, k.shape[1])))
    logits = (torch.matmul(queries, keys.mT) * scale)[:, :, None]  # (B, heads, 1, Nq, Nk)
    place, key_place = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    if self_logit is not None:
        logits = torch.where(place[:, None] == key_place, self_logit, logits)
    seen = of_q[..., None] & of_k[..., None, :]
    seen = seen if key_mask is None else seen & ~key_mask[:, :, None, None]
    seen = seen & (place[:, None] >= key_place) if is_causal else seen
    logits, values = logits.masked_fill(~seen, -torch.inf), values[:, :, None].expand(-1, -1, seen.shape[2], -1, -1)
    if memory_k is not None and memory_v is not None:
        of_memory = torch.einsum("bhnd,hkmd->bhknm", queries, memory_k.to(wide)) * scale
        logits = torch.cat([of_memory, logits], -1)
        values = torch.cat([memory_v.to(wide).expand(q.shape[0], -1, -1, -1, -1), values], -2)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    probs = torch.where(blind, 0.0, logits.masked_fill(blind, 0).softmax(-1))
    out = (torch.matmul(probs, values) * of_q[..., None]).sum(2)  # (B, heads, Nq, dv)
    counts = of_q.sum(2, dtype=wide)[..., None]
    return (out / (counts + count_eps)).transpose(1, 2).to(q.dtype)


def _is_member(members: Tensor, tokens: int) -> Tensor:
    """(B, heads, clusters, tokens) bool."""
    of_none = torch.zeros(*members.shape[:3], tokens, device=members.device)
    return of_none.scatter(-1, members, torch.ones_like(members, dtype=of_none.dtype)) > 0


def cluster_attention_tiled(
    q: Tensor, k: Tensor, v: Tensor, q_members: Tensor, k_members: Tensor, memory_k: Tensor | None,
    memory_v: Tensor | None, key_mask: Tensor | None, is_causal: bool, self_logit: float | None, count_eps: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """Gather the tokens of each cluster, attend in batches of clusters, scatter the results back."""
    wide, (batch, tokens, heads, _) = accumulator(q.dtype), q.shape
    queries = _gather(q.to(wide), q_members) * scale  # (B, heads, clusters, window, d)
    keys, values = _gather(k.to(wide), k_members), _gather(v.to(wide), k_members)
    logits = product(queries, keys, transposes=True)
    place, key_place = q_members[..., None], k_members[..., None, :]
    if self_logit is not None:
        logits = torch.where(place == key_place, self_logit, logits)
    hidden = None
    if key_mask is not None:
        flat = k_members.flatten(2)
        hidden = key_mask.gather(2, flat).unflatten(2, k_members.shape[2:])[..., None, :].expand_as(logits)
    if is_causal:
        later = place < key_place
        hidden = later if hidden is None else hidden | later
    logits = logits if hidden is None else logits.masked_fill(hidden, HIDDEN)
    blind = None if hidden is None else hidden.all(-1, keepdim=True)
    if memory_k is not None and memory_v is not None:
        memories = [t.to(wide).expand(batch, -1, -1, -1, -1) for t in (memory_k, memory_v)]
        logits = torch.cat([product(queries, memories[0], transposes=True), logits], -1)
        values = torch.cat([memories[1], values], -2)
        blind = None
    out = product(logits.softmax(-1), values)  # (B, heads, clusters, window, dv)
    out = out if blind is None else torch.where(blind, 0.0, out)
    index = q_members.flatten(2)[..., None]
    total = out.new_zeros(batch, heads, tokens, v.shape[3])
    total = total.scatter_add(2, index.expand(-1, -1, -1, v.shape[3]), out.flatten(2, 3))
    counts = torch.zeros(batch, heads, tokens, 1, dtype=wide, device=q.device)
    counts = counts.scatter_add(2, index, torch.ones_like(index, dtype=wide))
    return (total / (counts + count_eps)).transpose(1, 2).to(q.dtype)


def _gather(x: Tensor, members: Tensor) -> Tensor:
    """(B, N, heads, d), (B, heads, clusters, window) -> (B, heads, clusters, window, d)."""
    index = members.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.transpose(1, 2).gather(2, index).unflatten(2, members.shape[2:])


def _why_not_fused() -> str:
    return "clusters are gathered into batches of plain attention, which libraries do well; there is no Triton kernel"


def _macs(q: Tensor, v: Tensor, q_members: Tensor, k_members: Tensor, memory_k: Tensor | None) -> int:
    keys = k_members.shape[3] + (0 if memory_k is None else memory_k.shape[2])
    return q_members.numel() * keys * (q.shape[3] + v.shape[3])


declare(
    cluster_attention,
    check=_check,
    reference=cluster_attention_reference,
    tiled=cluster_attention_tiled,
    why_not_fused=_why_not_fused,
    cast=("q", "k", "v", "memory_k", "memory_v"),
    macs=_macs,
)
