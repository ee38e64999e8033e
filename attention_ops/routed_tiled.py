"""Routed attention as tracers see it, and for eager torch the choice between routed keys and all keys with a mask."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import routed_gathered as gathered
from . import tiled_attention as tiles
from ._attend import EagerBody, accumulator, is_finite
from .routed_parts import Part, RegionPlan, cut_into_parts
from .tiling import by_region


def routed_attention_tiled(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """Attend to copies of the routed keys, or to all keys with a mask, whichever is cheaper, part by part."""
    return RoutedAttention(routes, plan)(q, k, v)


def routed_attention_graph(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """The same by differentiable operations."""
    return RoutedAttention(routes, plan).graph(q, k, v)


# The least cost of a key, in logits: 4, 16 and 64 queries broke even with a mask at 0.1, 0.5 and all of the keys
# (head_dim 32, float32, forward and backward, 2 threads of a Xeon with AVX-512).
LOGITS_PER_KEY = 32


def masking_is_cheaper(q: Tensor, k: Tensor, routes: Tensor, plan: RegionPlan) -> bool:
    """Say whether all logits of a region cost less than copies of its routed keys and their logits."""
    queries, keys = plan.region[0] * plan.region[1], plan.kv_region[0] * plan.kv_region[1]
    return queries * k.shape[1] * k.shape[2] <= routes.shape[2] * keys * max(queries, LOGITS_PER_KEY)


def _masking_is_cheaper_in_a_graph(q: Tensor, k: Tensor, routes: Tensor, plan: RegionPlan) -> bool:
    """The same where keys are copied token by token."""
    queries, keys = plan.region[0] * plan.region[1], plan.kv_region[0] * plan.kv_region[1]
    return queries * k.shape[1] * k.shape[2] <= routes.shape[2] * keys * (queries + tiles.LOGITS_PER_KEY)


def _attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """Plain differentiable torch. Returns the output seen as by `by_region`, not yet copied there."""
    if _masking_is_cheaper_in_a_graph(q, k, routes, plan):
        return _attend_masked(q, k, v, routes, plan)
    tokens = _routed_tokens(k, routes, plan)
    return _attend_copies(q, _copies(k, tokens), _copies(v, tokens), plan)


def _copies(x: Tensor, tokens: Tensor) -> Tensor:
    """(B, Hk, Wk, heads, d) -> (B * regions, topk * Tk, heads, d)."""
    return x.flatten(0, 2).flatten(1).index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[3:])


def _attend_copies(q: Tensor, keys: Tensor, values: Tensor, plan: RegionPlan) -> Tensor:
    cut = by_region(q, plan.region).transpose(2, 3)  # (B, region rows, region columns, rows, columns, heads, d)
    queries = cut.flatten(3, 4).flatten(0, 2)  # (B * regions, T, heads, d)
    parts = (x.transpose(1, 2) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(*parts, scale=plan.scale).transpose(1, 2)
    return out.unflatten(1, plan.region).unflatten(0, cut.shape[:3]).transpose(2, 3)


def _routed_tokens(k: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """(B * regions, topk * Tk): the keys that every region sees, as rows of k seen as (B * Hk * Wk, ...)."""
    (batch, height, width), (rows, cols) = k.shape[:3], plan.kv_region
    row = (routes // (width // cols) * rows)[..., None, None] + torch.arange(rows, device=k.device)[:, None]
    col = (routes % (width // cols) * cols)[..., None, None] + torch.arange(cols, device=k.device)
    image = torch.arange(batch, device=k.device).view(-1, 1, 1, 1, 1) * (height * width)
    return (image + row * width + col).flatten(2).flatten(0, 1)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    mask = _token_mask(q, k, routes, plan)
    maps = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, d), views
    out = F.scaled_dot_product_attention(*maps, attn_mask=mask, scale=plan.scale)
    return by_region(out.transpose(1, 2).unflatten(1, q.shape[1:3]), plan.region)


def _token_mask(q: Tensor, k: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """(B, 1, query tokens, key tokens), 0 where a query sees a key and -inf elsewhere; tokens in the maps' order."""
    batch, regions, _ = routes.shape
    (rows, cols), (kv_rows, kv_cols) = plan.region, plan.kv_region
    grid, kv_grid = (q.shape[1] // rows, q.shape[2] // cols), (k.shape[1] // kv_rows, k.shape[2] // kv_cols)
    seen = (batch, regions, kv_grid[0] * kv_grid[1])
    mask = torch.full(seen, -torch.inf, dtype=accumulator(q.dtype), device=q.device).scatter(2, routes, 0.0)
    mask = mask.view(batch, grid[0], 1, grid[1], 1, kv_grid[0], 1, kv_grid[1], 1)
    mask = mask.expand(-1, -1, rows, -1, cols, -1, kv_rows, -1, kv_cols)
    return mask.reshape(batch, 1, q.shape[1] * q.shape[2], k.shape[1] * k.shape[2])


class RoutedAttention(EagerBody):
    """Keeps its inputs only; the backward pass attends once more. Tensors: q, k, v.

    Where a masked result is not finite, the routed keys are copied: a NaN reaches those queries only that see it.
    """

    def __init__(self, routes: Tensor, plan: RegionPlan) -> None:
        self.routes, self.plan = routes, plan

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if masking_is_cheaper(q, k, self.routes, self.plan):
            out = _forward_masked(q, k, v, self.routes, self.plan)
            if is_finite(out):
                return out
        return gathered.forward(q, k, v, self.routes, self.plan)

    def backward(self, _: None, grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        if masking_is_cheaper(q, k, self.routes, self.plan):
            grads = _backward_masked(q, k, v, self.routes, grad, self.plan)
            if is_finite(*grads):
                return grads
        return gathered.backward(q, k, v, self.routes, grad, self.plan)

    def graph(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.routes, self.plan).reshape(*q.shape[:4], v.shape[-1])


def _map(cut: Tensor) -> Tensor:
    """Undo `by_region`."""
    return cut.flatten(3, 4).flatten(1, 2)


def _masked_parts(q: Tensor, k: Tensor, plan: RegionPlan, budget: int) -> Iterator[Part]:
    """Cut so that a part's mask, which has no heads, is within `budget` numbers, if it can."""
    return cut_into_parts(q, plan, budget // (plan.region[0] * plan.region[1] * k.shape[1] * k.shape[2]))


def _forward_masked(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    out = q.new_empty(*q.shape[:4], v.shape[-1])
    for part in _masked_parts(q, k, plan, torch.get_num_threads() * tiles.CHUNK_LOGITS):
        seen = k[part.images], v[part.images], part.routes(routes, q, plan)
        part.of(out, plan).copy_(_attend_masked(_map(part.of(q, plan)), *seen, plan))
    return out


def _backward_masked(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, grad: Tensor, plan: RegionPlan) -> list[Tensor]:
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for part in _masked_parts(q, k, plan, torch.get_num_threads() * tiles.CHUNK_LOGITS // 2):
        inputs = _map(part.of(q, plan)), k[part.images], v[part.images]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = _attend_masked(*leaves, part.routes(routes, q, plan), plan)
        of_q, of_k, of_v = torch.autograd.grad(out, leaves, part.of(grad, plan))
        part.of(dq, plan).copy_(by_region(of_q, plan.region))
        dk[part.images] += of_k  # several parts share the keys
        dv[part.images] += of_v
    return [dq, dk, dv]
