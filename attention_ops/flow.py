"""Flow-Attention: attention of linear cost, by conservation of what flows from keys into queries.

Paper      Wu et al. 2022, arXiv:2202.06258 (Flowformer). Every query receives, and every key sends, an amount of 1.
Semantics  those of the authors' code (https://github.com/thuml/Flowformer, MIT): the competition is clamped to -1..1,
           which leaves about 50 % of the keys with one weight and without gradient; epsilons lie where theirs lie.
Forms      "vision"  of the image model: each of the four sums has an epsilon outside too
           "core"    of the general code, also for keys of another sequence (cross attention)
           "causal"  query i sees keys up to i: sums become cumulative sums
Kernel     none: the work is products of matrices with a head_dim on one side, which libraries do well.
"""

import torch
from torch import Tensor, nn

from ._attend import accumulator
from ._checks import check_tokens
from ._graph.sizes import is_known
from ._graph.tiles import product
from ._op import Impl, declare, run
from .mixers import register_mixer

OP = "flow_attention"
FORMS = ("vision", "core", "causal")
EPS = 1e-6
CHUNK = 64  # tokens of a causal block: inside one, queries and keys are multiplied pair by pair


def flow_attention(q: Tensor, k: Tensor, v: Tensor, *, form: str = "vision", impl: Impl | str = Impl.AUTO) -> Tensor:
    """Attend with weights that conserve flow: sigmoid(q) and sigmoid(k) in place of a softmax.

    With q and k after the sigmoid, I = 1 / (q . sum k), O = 1 / (k . sum q), s = q . sum k O, c = k . sum q I, the
    result is I sigmoid(s Nq / Nk) q (sum k^T v Nk softmax(c)), with c clamped to -1..1.

    Cost: (Nq + Nk) * head_dim * value_dim multiply-adds per head; the causal form adds 64 tokens a query.

    Args:
        q: (B, Nq, heads, head_dim).
        k: (B, Nk, heads, head_dim); v: (B, Nk, heads, value_dim). One dtype and device.
        form: "vision", "core" or "causal"; the causal form needs Nq = Nk.
        impl: "auto", "tiled" or "reference"; there is no kernel: "fused" is refused.

    Returns:
        (B, Nq, heads, value_dim), dtype of q (under autocast: the autocast dtype). Sums are made in float32.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the form is unknown.
        NotImplementedError: `impl="fused"`.
    """
    return run(OP, q, k, v, form, impl)


def _check(q: Tensor, k: Tensor, v: Tensor, form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"{OP}: form must be one of {list(FORMS)}, got {form!r}")
    check_tokens(OP, q, k, v)
    if form == "causal" and is_known(q.shape[1] != k.shape[1]):
        raise ValueError(f"{OP}: the causal form needs as many keys as queries {q.shape[1]}, got {k.shape[1]}")


def flow_attention_reference(q: Tensor, k: Tensor, v: Tensor, form: str) -> Tensor:
    """The definition; the causal form keeps a head_dim x value_dim matrix for each token. float32 inside at least."""
    wide, outer = accumulator(q.dtype), EPS if form == "vision" else 0.0
    queries, keys, values = (t.to(wide).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, d)
    queries, keys = queries.sigmoid(), keys.sigmoid()

    def total(x: Tensor) -> Tensor:
        return x.cumsum(2) if form == "causal" else x.sum(2, keepdim=True)

    def flow(x: Tensor, of: Tensor) -> Tensor:  # (B, heads, N)
        return ((x + EPS) * (total(of) + EPS) + outer / x.shape[-1]).sum(-1)

    places = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=wide) if form == "causal" else 1.0
    incoming, outgoing = places / flow(queries, keys), places / flow(keys, queries)
    sinks = flow(queries, keys * outgoing[..., None]) / places
    sources = (flow(keys, queries * incoming[..., None]) / places).clamp(-1, 1)
    if form == "causal":
        competition = sources.exp() / sources.exp().cumsum(-1) * places
        states = (keys[..., None] * (values * competition[..., None])[..., None, :]).cumsum(2)  # (B, heads, N, d, dv)
        out = ((queries * (incoming / places)[..., None])[..., None, :] @ states).squeeze(-2) * sinks.sigmoid()[
            ..., None
        ]
    else:
        competition = sources.softmax(-1) * k.shape[1]
        allocation = (sinks * (q.shape[1] / k.shape[1])).sigmoid()
        mixed = (keys[..., None] * (values * competition[..., None])[..., None, :]).sum(2)  # (B, heads, d, dv)
        out = (queries[..., None, :] @ mixed[:, :, None]).squeeze(-2) * (incoming * allocation)[..., None]
    return out.transpose(1, 2).to(q.dtype)


def flow_attention_tiled(q: Tensor, k: Tensor, v: Tensor, form: str) -> Tensor:
    """Products with a head_dim on one side; in inference every pass writes what the next product reads."""
    records = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if form == "causal" or records or q.device.type != "cpu":
        return flow_attention_graph(q, k, v, form)
    wide, outer, (batch, nq, heads, _) = accumulator(q.dtype), EPS if form == "vision" else 0.0, q.shape
    nk = k.shape[1]
    queries, keys = (_by_head(x, wide).sigmoid_() for x in (q, k))  # (groups, N, d)
    incoming = _inflow(queries, keys.sum(1), outer).reciprocal_()  # (groups, 1, Nq)
    outgoing = _inflow(keys, queries.sum(1), outer).reciprocal_()
    sinks = _inflow(queries, torch.bmm(outgoing, keys).squeeze(1), outer)
    sources = _inflow(keys, torch.bmm(incoming, queries).squeeze(1), outer).clamp_(-1, 1)
    competition = sources.softmax(-1).mul_(nk).view(batch, heads, nk, 1)
    values = q.new_empty(batch, heads, nk, v.shape[3], dtype=wide)
    torch.mul(v.to(wide).transpose(1, 2), competition, out=values)
    mixed = torch.bmm(keys.mT, values.flatten(0, 1))  # (groups, d, dv)
    weights = sinks.mul_(nq / nk).sigmoid_().mul_(incoming).view(batch, heads, nq, 1)
    out = q.new_empty(batch, nq, heads, v.shape[3], dtype=wide)
    torch.mul(torch.bmm(queries, mixed).view(batch, heads, nq, v.shape[3]), weights, out=out.transpose(1, 2))
    return out.to(q.dtype)


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, heads, d) -> (B * heads, N, d), a copy."""
    copy = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=dtype)
    return copy.copy_(x.transpose(1, 2)).flatten(0, 1)


def _inflow(x: Tensor, total: Tensor, outer: float) -> Tensor:
    """(x + eps) . (total + eps) + outer: (groups, N, d) and (groups, d) -> (groups, 1, N)."""
    total = (total + EPS)[:, None]
    return torch.baddbmm(EPS * total.sum(2, keepdim=True) + outer, total, x.mT)


def flow_attention_graph(q: Tensor, k: Tensor, v: Tensor, form: str) -> Tensor:
    """The same by differentiable operations; the causal form works on blocks of `CHUNK` tokens."""
    wide = accumulator(q.dtype)
    queries, keys = (t.to(wide).transpose(1, 2).sigmoid().contiguous() for t in (q, k))  # (B, heads, N, d)
    values = v.to(wide).transpose(1, 2)
    out = _causal(queries, keys, values) if form == "causal" else _flows(queries, keys, values, form)
    return out.transpose(1, 2).to(q.dtype)


def _flows(queries: Tensor, keys: Tensor, values: Tensor, form: str) -> Tensor:
    outer, (nq, nk) = EPS if form == "vision" else 0.0, (queries.shape[2], keys.shape[2])
    incoming = 1 / _flow(queries, keys.sum(2), outer)  # (B, heads, 1, Nq)
    outgoing = 1 / _flow(keys, queries.sum(2), outer)
    sinks = _flow(queries, product(outgoing, keys).squeeze(2), outer)
    sources = _flow(keys, product(incoming, queries).squeeze(2), outer).clamp(-1, 1)
    competition = (sources.softmax(-1) * nk).transpose(2, 3)  # (B, heads, Nk, 1)
    mixed = product(keys.transpose(2, 3), values * competition)  # (B, heads, d, dv)
    weights = incoming * (sinks * (nq / nk)).sigmoid()
    return product(queries, mixed) * weights.transpose(2, 3)


def _flow(x: Tensor, total: Tensor, outer: float) -> Tensor:
    """(x + eps) . (total + eps) + outer: (B, heads, N, d) and (B, heads, d) -> (B, heads, 1, N)."""
    total = (total + EPS)[:, :, None]  # (B, heads, 1, d)
    return product(total, x, transposes=True) + (EPS * total.sum(-1, keepdim=True) + outer)


def _causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    places = torch.arange(1, queries.shape[2] + 1, device=queries.device, dtype=queries.dtype)

    def flow(x: Tensor, of: Tensor) -> Tensor:  # (B, heads, N)
        return ((x + EPS) * (of.cumsum(2) + EPS)).sum(-1)

    incoming, outgoing = places / flow(queries, keys), places / flow(keys, queries)
    sinks = (flow(queries, keys * outgoing[..., None]) / places).sigmoid()
    sources = (flow(keys, queries * incoming[..., None]) / places).clamp(-1, 1).exp()
    competition = sources / sources.cumsum(-1) * places
    weighted = queries * (incoming / places)[..., None]
    return _causal_product(weighted, keys, values * competition[..., None]) * sinks[..., None]


def _causal_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return sum over keys j <= i of (q_i . k_j) v_j, block by block."""
    length = q.shape[2]
    q, k, v = (_to_blocks(x) for x in (q, k, v))  # (B, heads, blocks, CHUNK, d)
    inside = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    near = product(product(q, k, transposes=True).masked_fill(~inside, 0), v)
    states = product(k.transpose(-2, -1), v)  # (B, heads, blocks, d, dv)
    before = states.cumsum(2) - states
    return (near + product(q, before)).flatten(2, 3).narrow(2, 0, length)


def _to_blocks(x: Tensor) -> Tensor:
    blocks = (x.shape[2] + CHUNK - 1) // CHUNK
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * CHUNK - x.shape[2]))
    return padded.unflatten(2, (blocks, CHUNK))


def _why_not_fused() -> str:
    return "its products have a head_dim on one side, which libraries multiply well; there is no Triton kernel"


def _macs(q: Tensor, k: Tensor, v: Tensor) -> int:
    return (q.shape[1] + k.shape[1]) * q.shape[0] * q.shape[2] * q.shape[3] * v.shape[3]


declare(
    flow_attention,
    check=_check,
    reference=flow_attention_reference,
    tiled=flow_attention_tiled,
    graph=flow_attention_graph,
    why_not_fused=_why_not_fused,
    macs=_macs,
)


@register_mixer("flow")
class FlowAttention(nn.Module):
    """Multi-head Flow-Attention with its projections, a token mixer (see mixers.py).

    Prefix tokens are tokens like the others. Maps of any size, linear cost.

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        map_size, prefix_tokens: of all mixers; this one needs neither.
        qkv_bias: give the qkv projection a bias.
        form: of `flow_attention`.
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
        form: str = "vision",
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"FlowAttention: form must be one of {list(FORMS)}, got {form!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.map_size = tuple(map_size)
        self.prefix_tokens = prefix_tokens
        self.form = form
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, N, C) -> (B, N, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        out = flow_attention(q, k, v, form=self.form)
        return self.proj_drop(self.proj(out.flatten(2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, form={self.form}"


class FlowAttention2d(FlowAttention):
    """Flow-Attention on channels-last maps of any size."""

    def __init__(self, dim: int, num_heads: int, *, proj_drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, map_size=(1, 1), proj_drop=proj_drop, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        size = [x.shape[1], x.shape[2]]
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        out = flow_attention(q, k, v, form=self.form)
        return self.proj_drop(self.proj(out.flatten(2))).unflatten(1, size)
