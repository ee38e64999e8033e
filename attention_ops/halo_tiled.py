"""Halo attention on tiles: the torch body for CPUs, compilers and exporters.

One key tile holds a block and its halo. Forward walks few tiles with all their heads, which lie side by side in memory,
so that a tile is copied in long runs; scaled_dot_product_attention takes the relative logits as its bias. Backward
computes the logits of a few heads again instead of keeping them. Memory stays at O(one chunk) logits either way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autocast import no_autocast
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

    @property
    def tile_logits(self) -> int:
        """Of one head and one tile."""
        queries, keys = self.queries, self.keys
        return queries[0].tile * queries[1].tile * keys[0].keys * keys[1].keys


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
    by_y, by_x = _by_place(rel_h.to(q.dtype), rows.tile), _by_place(rel_w.to(q.dtype), cols.tile)
    by_row = torch.matmul(q, by_y.mT)  # (.., qy, qx, ky): one matrix per row of queries
    by_col = torch.matmul(q.transpose(-2, -3), by_x.mT).transpose(-2, -3)  # (.., qy, qx, kx)
    return by_row.flatten(-3, -2), by_col.flatten(-3, -2)


def _by_place(table: Tensor, queries: int) -> Tensor:
    """(2 * window - 1, d) -> (queries, window, d): the cells that a query at each place of the block uses."""
    window = (table.shape[0] + 1) // 2
    place = torch.arange(window, device=table.device)
    query = torch.arange(queries, device=table.device)[:, None]
    return table[place - query + window - 1]


def _probs(q: Tensor, k: Tensor, relative: tuple[Tensor, Tensor] | None, plan: HaloPlan) -> Tensor:
    logits = torch.matmul(q * plan.scale, k.mT)  # (B, heads, tiles, T, K)
    if relative is not None:
        by_place = logits.unflatten(-1, (plan.keys[0].keys, plan.keys[1].keys))
        by_place.add_(relative[0][..., :, None]).add_(relative[1][..., None, :])
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


def _forward(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, plan: HaloPlan) -> Tensor:
    """Return (B, Y, X, heads, value_dim), with the logits of a few tiles at a time."""
    heads, value_dim, wide = q.shape[3], v.shape[-1], accumulator(q.dtype)
    dim = max(q.shape[-1], value_dim)  # SDPA's fast body for CPUs wants one; zeros add nothing
    q, k, v = (t if t.shape[-1] == dim else F.pad(t, (0, dim - t.shape[-1])) for t in (q, k, v))
    q, k, v = (t.to(wide).flatten(3) for t in (q, k, v))  # (B, Y, X, heads * dim)
    tiles = [split_queries(q, *plan.queries), gather_keys(k, *plan.keys), gather_keys(v, *plan.keys)]
    q, k, v = (t.flatten(0, 1).unflatten(-1, (heads, dim)) for t in tiles)  # (n, tokens, heads, dim)
    step = torch.get_num_threads() * CHUNK_LOGITS // max(plan.tile_logits * heads, 1)
    step = min(max(step, 1), len(q))
    bias, tables, out = None, None, torch.empty_like(q)
    if rel_h is not None and rel_w is not None:
        tables, room = torch.cat([rel_h, rel_w]).to(wide), q.new_empty(step, heads, q.shape[1], k.shape[1])
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        if tables is not None:
            bias = _bias(q[part], tables, plan, room[: len(q) - start])
        few = (t[part].transpose(1, 2) for t in (q, k, v))  # (few, heads, tokens, dim)
        attended = F.scaled_dot_product_attention(*few, attn_mask=bias, scale=plan.scale)
        out[part] = attended.transpose(1, 2)
    out = merge_queries(out.flatten(2).unflatten(0, tiles[0].shape[:2]), *plan.queries)
    return out.unflatten(-1, (heads, dim))[..., :value_dim]


def _bias(q: Tensor, tables: Tensor, plan: HaloPlan, room: Tensor) -> Tensor:
    """Write the relative logits of (n, T, heads, >= d) queries into `room`, (n, heads, T, keys), and return it.

    `tables` holds the cells of the rows, then those of the columns, (cells, d).

    A query's logits with every cell of a table are one product; those that it uses begin one cell further left for
    each place further right in the block, which is a view with a shortened stride.
    """
    (rows, cols), (ky, kx), heads = plan.queries, (plan.keys[0].keys, plan.keys[1].keys), q.shape[2]
    cells = torch.matmul(q[..., : tables.shape[-1]], tables.mT)  # (n, T, heads, cells of both tables)
    image, token, head, _ = cells.stride()
    by_row = (image, head, token * cols.tile - 1, token, 1, 0)  # n, heads, qy, qx, ky, kx
    by_col = (image, head, token * cols.tile, token - 1, 0, 1)
    size = (len(q), heads, rows.tile, cols.tile)
    by_row = cells.as_strided((*size, ky, 1), by_row, ky - 1)
    by_col = cells.as_strided((*size, 1, kx), by_col, 2 * ky - 1 + kx - 1)
    torch.add(by_row, by_col, out=room.unflatten(-1, (ky, kx)).unflatten(2, (rows.tile, cols.tile)))
    return room


class _HaloTiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rel_h, rel_w, plan):
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        keys, dim = plan.keys, max(q.shape[-1], v.shape[-1])
        per_image = keys[0].tiles * keys[0].keys * keys[1].tiles * keys[1].keys * q.shape[3] * dim
        images = max(torch.get_num_threads() * CHUNK_LOGITS // max(per_image, 1), 1)  # keys are gathered for so many
        for start in range(0, q.shape[0], images):
            part = slice(start, start + images)
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
