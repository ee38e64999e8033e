"""Agent attention for exporters and compilers: two attentions in plain torch."""

from torch import Tensor

from .._attend import accumulator, of_one_layout
from .tiles import attend


def agent_attention_graph(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None, scale: float
) -> Tensor:
    """Attend by differentiable operations."""
    queries, keys, values, few = (x.transpose(1, 2)[:, :, None] for x in (q, k, v, agents))  # (B, heads, 1, N, d)
    wide = accumulator(q.dtype)
    to_keys, to_agents = (None if bias is None else bias.to(wide)[:, None] for bias in (bias_to, bias_from))
    gathered = attend(few, keys, values, to_keys, scale)
    out = attend(queries, few, gathered, to_agents, scale)
    return of_one_layout(out.squeeze(2).transpose(1, 2))
