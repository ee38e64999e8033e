"""Agent attention in eager torch: two runs of SDPA, and a backward pass that keeps no logits.

Probabilities that are no larger than the queries are computed as they are: SDPA is no faster with so few keys, and a
backward pass that computes them again takes 1.1 to 1.6 times as long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import EagerBody, accumulator
from ._graph.agent import agent_attention_graph

CHUNK_LOGITS = 1 << 19  # alive at once in the backward pass, per thread; see tiled_attention.py


def agent_attention_tiled(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None, scale: float
) -> Tensor:
    """Products for few agents, SDPA for many; the same with and without gradients."""
    if agents.shape[1] <= q.shape[3] and q.dtype == accumulator(q.dtype):
        return _with_probabilities(q, k, v, agents, bias_to, bias_from, scale)
    return AgentBody(scale)(q, k, v, agents, bias_to, bias_from)


def _with_probabilities(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None, scale: float
) -> Tensor:
    queries, keys, values, few = (x.transpose(1, 2) for x in (q, k, v, agents * scale))
    to_keys, to_agents = torch.matmul(few, keys.mT), torch.matmul(queries, few.mT)
    to_keys = to_keys if bias_to is None else to_keys + bias_to.to(q.dtype)
    to_agents = to_agents if bias_from is None else to_agents + bias_from.to(q.dtype)
    out = torch.matmul(to_agents.softmax(-1), torch.matmul(to_keys.softmax(-1), values))
    return out.transpose(1, 2).contiguous()


class AgentBody(EagerBody):
    """Tensors: q, k, v, agents (B, N, heads, d), bias_to (heads, n, Nk) and bias_from (heads, Nq, n) or None."""

    keeps_output = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None
    ) -> Tensor:
        queries, keys, values, few = (x.transpose(1, 2) for x in (q, k, v, agents))
        wide = accumulator(q.dtype)
        # detached: SDPA's fast kernel refuses a bias that requires a gradient, even where none is recorded
        to_keys, to_agents = (None if b is None else b.detach().to(wide)[None] for b in (bias_to, bias_from))
        gathered = F.scaled_dot_product_attention(few, keys, values, to_keys, scale=self.scale)
        out = F.scaled_dot_product_attention(queries, few, gathered, to_agents, scale=self.scale)
        return out.transpose(1, 2).contiguous()

    def backward(
        self,
        out: Tensor,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        bias_to: Tensor | None,
        bias_from: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        grads = [t.new_empty(t.shape) for t in (q, k, v, agents)]
        wide = accumulator(q.dtype)
        sums = [None if bias is None else torch.zeros_like(bias, dtype=wide) for bias in (bias_to, bias_from)]
        step = self._images(q, k, agents)
        for start in range(0, q.shape[0], step):
            part = slice(start, start + step)
            few = (x[part].transpose(1, 2).to(wide) for x in (q, k, v, agents, out, grad))
            *parts, of_to, of_from = self._gradients(*few, bias_to, bias_from)  # type: ignore[call-arg]
            for whole, value in zip(grads, parts, strict=True):
                whole[part] = value.transpose(1, 2)
            for total, dlogits in zip(sums, (of_to, of_from), strict=True):
                if total is not None:
                    total += dlogits.sum(0)
        biases = zip(sums, (bias_to, bias_from), strict=True)
        return *grads, *(None if total is None or bias is None else total.to(bias.dtype) for total, bias in biases)

    def graph(
        self, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None
    ) -> Tensor:
        return agent_attention_graph(q, k, v, agents, bias_to, bias_from, self.scale)

    def _images(self, q: Tensor, k: Tensor, agents: Tensor) -> int:
        """How many images have logits that fit `CHUNK_LOGITS` a thread."""
        logits = q.shape[2] * agents.shape[1] * max(q.shape[1], k.shape[1])
        return max(1, torch.get_num_threads() * CHUNK_LOGITS // logits)

    def _gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        out: Tensor,
        grad: Tensor,
        bias_to: Tensor | None,
        bias_from: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v and agents (B, heads, N, d), and of both logits."""
        few = agents * self.scale
        of_keys, of_agents = self._probabilities(few, k, bias_to), self._probabilities(q, few, bias_from)
        gathered = torch.matmul(of_keys, v)
        delta = (out * grad).sum(-1, keepdim=True)
        to_agents = of_agents * (torch.matmul(grad, gathered.mT) - delta)  # gradient of the logits (B, heads, Nq, n)
        dgathered = torch.matmul(of_agents.mT, grad)
        delta = (gathered * dgathered).sum(-1, keepdim=True)
        to_keys = of_keys * (torch.matmul(dgathered, v.mT) - delta)  # (B, heads, n, Nk)
        dagents = (torch.matmul(to_agents.mT, q) + torch.matmul(to_keys, k)) * self.scale
        dq, dk, dv = torch.matmul(to_agents, few), torch.matmul(to_keys.mT, few), torch.matmul(of_keys.mT, dgathered)
        return dq, dk, dv, dagents, to_keys, to_agents

    def _probabilities(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        logits = torch.matmul(x, y.mT)
        return (logits if bias is None else logits + bias.to(logits.dtype)).softmax(-1)
