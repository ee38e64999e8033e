"""Agent attention: few agents gather from all keys, then all queries read from the agents.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention). The agents are given here; the paper pools them from the
           queries (`AgentAttention` in agent_layer.py).
Tiled      two runs of SDPA through the agents; the backward pass recomputes both softmaxes in chunks of images.
"""

import torch
from torch import Tensor

from ._attend import accumulator
from ._checks import check_alike, check_device, why_no_attention_kernel, why_no_kernel
from ._graph.agent import agent_attention_graph
from ._graph.sizes import differs, is_known
from ._op import Impl, declare, run
from .agent_cpu import agent_attention_tiled

OP = "agent_attention"


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    bias_to: Tensor | None = None,
    bias_from: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from agents to keys, and from queries to agents:

    gathered = softmax(scale * agents k^T + bias_to) v, out = softmax(scale * q agents^T + bias_from) gathered.

    Tokens have no order and no map: class tokens and maps of any shape are tokens like others.

    Cost: (Nq + Nk) * n * head_dim multiply-adds per head, twice; linear in the tokens.

    Args:
        q: (B, Nq, heads, head_dim).
        k, v: (B, Nk, heads, head_dim). q, k, v and agents have one dtype and device; strided views are fine.
        agents: (B, n, heads, head_dim).
        bias_to: (heads, n, Nk), added where agents gather from keys. Any floating dtype.
        bias_from: (heads, Nq, n), added where queries read from agents.
        scale: multiplies both logits; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, Nq, heads, head_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, agents, bias_to, bias_from, scale, impl)


def _check(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v), ("agents", agents)):
        if t.dim() != 4:
            raise ValueError(f"{OP}: {name} must be (B, tokens, heads, head_dim), got shape {tuple(t.shape)}")
    check_alike(OP, q=q, k=k, v=v, agents=agents)
    batch, queries, heads, dim = q.shape
    count, keys = agents.shape[1], k.shape[1]
    for name, t in (("k", k), ("agents", agents)):
        if differs(t.shape, (batch, t.shape[1], heads, dim)):
            wanted = f"the batch, heads and head_dim of q {tuple(q.shape)}"
            raise ValueError(f"{OP}: {name} must have {wanted}, got shape {tuple(t.shape)}")
    if differs(v.shape, k.shape):
        raise ValueError(f"{OP}: v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    for size in (queries, keys, count, heads, dim):
        if is_known(size < 1):
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("agents", agents)))
            raise ValueError(f"{OP}: tokens, agents, heads and head_dim must be at least 1, got {shapes}")
    for name, bias, shape, words in (
        ("bias_to", bias_to, (heads, count, keys), "(heads, agents, keys)"),
        ("bias_from", bias_from, (heads, queries, count), "(heads, queries, agents)"),
    ):
        if bias is not None and differs(bias.shape, shape):
            raise ValueError(f"{OP}: {name} must be {words} = {shape}, got {tuple(bias.shape)}")
        if bias is not None and not bias.dtype.is_floating_point:
            raise ValueError(f"{OP}: {name} must be floating point, got {bias.dtype}")
        check_device(OP, name, bias, "q", q)


def agent_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None, scale: float
) -> Tensor:
    """The definition, float32 inside at least."""
    wide = accumulator(q.dtype)
    queries, keys, values, few = (t.to(wide) for t in (q, k, v, agents))
    to_keys = torch.einsum("bahd,bnhd->bhan", few, keys) * scale
    to_keys = to_keys if bias_to is None else to_keys + bias_to.to(wide)
    gathered = torch.einsum("bhan,bnhd->bahd", to_keys.softmax(-1), values)
    to_agents = torch.einsum("bmhd,bahd->bhma", queries, few) * scale
    to_agents = to_agents if bias_from is None else to_agents + bias_from.to(wide)
    return torch.einsum("bhma,bahd->bmhd", to_agents.softmax(-1), gathered).to(q.dtype)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None, scale: float
) -> Tensor:
    from ..kernels.agent.forward import agent_attention as kernels  # here, so that CPU users need no Triton

    return kernels(q, k, v, agents, bias_to, bias_from, scale)[0]


def why_not_fused(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None
) -> str | None:
    """Return the reason why the kernels cannot run on these tensors, or None."""
    if (reason := why_no_attention_kernel(q, k, v)) is not None:
        return reason
    biases = (t for t in (bias_to, bias_from) if t is not None)
    return why_no_kernel(q, agents, *biases)


def _macs(q: Tensor, k: Tensor, agents: Tensor) -> int:
    return 2 * agents.shape[1] * (q.numel() + k.numel())


declare(
    agent_attention,
    check=_check,
    reference=agent_attention_reference,
    tiled=agent_attention_tiled,
    graph=agent_attention_graph,
    fused=_fused,
    why_not_fused=why_not_fused,
    cast=("q", "k", "v", "agents"),
    macs=_macs,
)
