"""Halo attention on tiles: the torch body for CPUs, compilers and exporters.

One key tile holds a block and its halo. Inference on a CPU walks boxes of tiles (halo_boxes.py). Training works on a
few heads at a time, by timm's operations in timm's order: float32 then rounds as timm's layer does (bit for bit on CPUs
with AVX-512), without which ReLUs behind it cross zero elsewhere, and single gradients of a HaloNet cannot be compared.
Backward computes the logits again instead of keeping them: memory stays at O(one chunk) logits either way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autocast import no_autocast
from .halo_boxes import attend_by_boxes, by_place
from .tiled_attention import CHUNK_LOGITS, accumulator
from .tiling import AxisTiling, gather_keys, merge_queries, scatter_keys, split_queries


@dataclass(frozen=True)
class QueryTiling(AxisTiling):
    """Queries cut into as many tiles as the keys, whose number may be a symbol."""

    count: int = 0

    @property
    def tiles(self) -> int:
        return self.count


@dataclass(frozen=True)
class HaloPlan:
    """How queries and keys are cut, rows and columns, and the scale of the logits."""

    queries: tuple[QueryTiling, QueryTiling]
    keys: tuple[AxisTiling, AxisTiling]
    scale: float


def halo_attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: tuple[int, int],
    halo: tuple[int, int],
    *,
    stride: int = 1,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Every block of queries against its one key tile."""
    keys = tuple(AxisTiling(k.shape[1 + i], block_size[i], halo[i], halo[i]) for i in (0, 1))
    queries = tuple(QueryTiling(q.shape[1 + i], block_size[i] // stride, count=keys[i].tiles) for i in (0, 1))
    plan = HaloPlan(queries, keys, scale)
    if type(q) is not Tensor or q.is_cuda or torch.jit.is_tracing():  # tracers want plain ops, a GPU few of them
        return _plain(q, k, v, rel_h, rel_w, plan)
    if not torch.is_grad_enabled():
        return attend_by_boxes(q, k, v, rel_h, rel_w, plan.queries, plan.keys, plan.scale)
    return _HaloTiled.apply(q, k, v, rel_h, rel_w, plan)


def _plain(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, plan: HaloPlan) -> Tensor:
    q_tiles, k_tiles, v_tiles = _tiles(q, k, v, plan)
    mask = None
    if rel_h is not None and rel_w is not None:
        by_row, by_col = _relative_logits(q_tiles, rel_h, rel_w, plan)
        mask = (by_row[..., :, None] + by_col[..., None, :]).flatten(-2).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        *(t.flatten(0, 1) for t in (q_tiles, k_tiles, v_tiles)), attn_mask=mask, scale=plan.scale
    )
    return merge_queries(out.unflatten(0, q_tiles.shape[:2]), *plan.queries).permute(0, 2, 3, 1, 4)


def _tiles(q: Tensor, k: Tensor, v: Tensor, plan: HaloPlan) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, heads, d) -> (B, heads, tiles, tokens, d)."""
    q, k, v = (t.permute(0, 3, 1, 2, 4) for t in (q, k, v))
    return split_queries(q, *plan.queries), gather_keys(k, *plan.keys), gather_keys(v, *plan.keys)


def _relative_logits(q: Tensor, rel_h: Tensor, rel_w: Tensor, plan: HaloPlan) -> tuple[Tensor, Tensor]:
    """(B, heads, tiles, T, d) -> (B, heads, tiles, T, key rows) and (.., key columns)."""
    rows, cols = plan.queries
    q = q.unflatten(-2, (rows.tile, cols.tile))  # (B, heads, tiles, qy, qx, d)
    by_y, by_x = by_place(rel_h.to(q.dtype), rows.tile), by_place(rel_w.to(q.dtype), cols.tile)
    by_row = torch.matmul(q, by_y.mT)  # (.., qy, qx, ky): one matrix per row of queries
    by_col = torch.matmul(q.transpose(-2, -3), by_x.mT).transpose(-2, -3)  # (.., qy, qx, kx)
    return by_row.flatten(-3, -2), by_col.flatten(-3, -2)


def _probs(q: Tensor, k: Tensor, relative: tuple[Tensor, Tensor] | None, plan: HaloPlan) -> Tensor:
    logits = torch.matmul(q, k.mT).mul_(plan.scale)  # (B, heads, tiles, T, K)
    if relative is not None:
        by_row, by_col = relative
        logits.add_((by_row[..., :, None] + by_col[..., None, :]).flatten(-2))
    return logits.softmax(-1)


def _chunks(q: Tensor, plan: HaloPlan) -> Iterator[tuple]:
    """Index (images, all rows, all columns, heads) so that one chunk's logits fit `CHUNK_LOGITS` a thread."""
    budget = torch.get_num_threads() * CHUNK_LOGITS
    (qy, qx), (ky, kx) = plan.queries, plan.keys
    per_head = max(qy.tiles * qy.tile * qx.tiles * qx.tile * ky.keys * kx.keys, 1)
    heads = min(max(budget // per_head, 1), q.shape[3])
    images = max(budget // (per_head * heads), 1) if heads == q.shape[3] else 1
    for image in range(0, q.shape[0], images):
        for head in range(0, q.shape[3], heads):
            yield slice(image, image + images), slice(None), slice(None), slice(head, head + heads)


class _HaloTiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rel_h, rel_w, plan):
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        for part in _chunks(q, plan):
            out[part] = _forward(q[part], k[part], v[part], rel_h, rel_w, plan)
        ctx.save_for_backward(q, k, v, rel_h, rel_w)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, rel_h, rel_w = ctx.saved_tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        tables = [] if rel_h is None else [torch.zeros_like(t, dtype=accumulator(t.dtype)) for t in (rel_h, rel_w)]
        with no_autocast(q):
            for part in _chunks(q, ctx.plan):
                *of_maps, of_tables = _backward(q[part], k[part], v[part], grad_out[part], rel_h, rel_w, ctx.plan)
                for grad, value in zip(grads, of_maps, strict=True):
                    grad[part] = value.permute(0, 2, 3, 1, 4)
                for grad, value in zip(tables, of_tables, strict=True):
                    grad += value
        given = [None, None] if rel_h is None else [g.to(t.dtype) for g, t in zip(tables, (rel_h, rel_w), strict=True)]
        return *grads, *given, None


def _forward(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, plan: HaloPlan) -> Tensor:
    wide = accumulator(q.dtype)
    q, k, v = _tiles(*(t.to(wide) for t in (q, k, v)), plan)
    relative = None
    if rel_h is not None and rel_w is not None:
        relative = _relative_logits(q, rel_h, rel_w, plan)
    out = torch.matmul(_probs(q, k, relative, plan), v)
    return merge_queries(out, *plan.queries).permute(0, 2, 3, 1, 4)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, plan: HaloPlan
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return dq, dk, dv as (B, heads, Y, X, d), and the gradients of the tables, for one chunk."""
    wide = accumulator(q.dtype)
    q, k, v = _tiles(*(t.to(wide) for t in (q, k, v)), plan)
    grad = split_queries(grad.to(wide).permute(0, 3, 1, 2, 4), *plan.queries)
    leaves, relative = [], None
    if rel_h is not None and rel_w is not None:
        leaves = [t.detach().to(wide).requires_grad_() for t in (q, rel_h, rel_w)]
        with torch.enable_grad():
            relative = _relative_logits(*leaves, plan)
    probs = _probs(q, k, None if relative is None else tuple(t.detach() for t in relative), plan)
    dv = torch.matmul(probs.mT, grad)
    dprobs = torch.matmul(grad, v.mT)
    dlogits = dprobs.sub_((dprobs * probs).sum(-1, keepdim=True)).mul_(probs)
    dq = torch.matmul(dlogits, k).mul_(plan.scale)
    dk = torch.matmul(dlogits.mT, q).mul_(plan.scale)
    of_tables = []
    if relative is not None:
        by_place = dlogits.unflatten(-1, (plan.keys[0].keys, plan.keys[1].keys))
        dq_relative, *of_tables = torch.autograd.grad(relative, leaves, (by_place.sum(-1), by_place.sum(-2)))
        dq += dq_relative
    return (
        merge_queries(dq, *plan.queries),
        scatter_keys(dk, *plan.keys),
        scatter_keys(dv, *plan.keys),
        of_tables,
    )
