"""Halo attention on tiles: the torch body for CPUs.

One key tile holds a block and its halo.

Inference  of a map whose logits fit a CPU's cache is the graph body. Larger maps are walked in boxes: a few neighboring
           tiles with all their heads, whose logits fit. Keys are copied out of a padded map into the same buffers for
           every box: new ones of the size of a map cost more in cleared pages than the attention itself (3 x 64x64, 8
           heads x 16, stride 2: 45 and 12 ms on 2 threads of a virtual Xeon).
Training   works on a few heads at a time, by timm's operations in timm's order: float32 then rounds as in timm's layer
           (bit for bit on CPUs with AVX-512). Otherwise ReLUs behind the layer cross zero elsewhere, and single
           gradients of a HaloNet cannot be compared. Backward recomputes the logits: memory stays at O(one chunk).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import EagerBody, accumulator, of_one_layout
from ._buffers import Buffers
from .tiled_attention import CHUNK_LOGITS
from .tiling import AxisTiling, boxes, cut_axis, cut_regions, gather_keys, merge_queries, scatter_keys, split_queries

Axes = tuple[AxisTiling, AxisTiling]  # rows, columns


class Blocks(NamedTuple):
    """How keys are cut into blocks, in tokens (rows, columns), and how many keys there are for a query on each axis."""

    block_size: tuple[int, int]
    halo: tuple[int, int]
    stride: int


class HaloPlan(NamedTuple):
    """How queries and keys are cut, rows and columns, into as many tiles of either."""

    queries: Axes
    keys: Axes


def halo_plan(q: Tensor, k: Tensor, blocks: Blocks) -> HaloPlan:
    """Cut maps (B, H, W, heads, d)."""
    return _plan((q.shape[1], q.shape[2]), (k.shape[1], k.shape[2]), blocks)


@lru_cache(maxsize=256)
def _plan(queries: tuple[int, int], keys: tuple[int, int], blocks: Blocks) -> HaloPlan:
    def cut(axis: int) -> tuple[AxisTiling, AxisTiling]:
        block, halo = blocks.block_size[axis], blocks.halo[axis]
        of_keys = cut_axis(keys[axis], block, halo, halo)
        return cut_axis(queries[axis], block // blocks.stride, tiles=of_keys.tiles), of_keys

    (query_rows, key_rows), (query_cols, key_cols) = cut(0), cut(1)
    return HaloPlan((query_rows, query_cols), (key_rows, key_cols))


def halo_attention_tiled(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Blocks, scale: float
) -> Tensor:
    """Every block of queries against its one key tile."""
    if q.is_cuda:  # a GPU wants few operations
        return of_one_layout(HaloTiles(halo_plan(q, k, blocks), scale).graph(q, k, v, rel_h, rel_w))
    plan = halo_plan(q, k, blocks)
    if torch.is_grad_enabled():
        return HaloTiles(plan, scale)(q, k, v, rel_h, rel_w)
    if q.shape[0] * q.shape[3] * _logits(plan) <= _budget() and q.dtype == accumulator(q.dtype):
        return HaloTiles(plan, scale).graph(q, k, v, rel_h, rel_w).contiguous()  # all in the cache at once
    return attend_by_boxes(q, k, v, rel_h, rel_w, plan, scale)


def halo_attention_lse_tiled(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """The same tiles; also the log-sum-exp of the logits of every query."""
    tiles = HaloTilesLse(halo_plan(q, k, blocks), scale)
    if q.is_cuda:
        out, lse = tiles.graph(q, k, v, rel_h, rel_w)
        return of_one_layout(out), of_one_layout(lse)
    return tiles(q, k, v, rel_h, rel_w)


def _budget() -> int:
    """Logits that stay in the caches of a CPU."""
    return torch.get_num_threads() * CHUNK_LOGITS


def _logits(plan: HaloPlan) -> int:
    """Logits of one head of one image."""
    (qy, qx), (ky, kx) = plan
    return qy.tiles * qy.tile * qx.tiles * qx.tile * ky.keys * kx.keys


class HaloTiles(EagerBody):
    """Halo attention of a training step, some heads of some images at a time. Tensors: q, k, v, rel_h, rel_w."""

    def __init__(self, plan: HaloPlan, scale: float) -> None:
        self.plan, self.scale = plan, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Any:
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        for part in _chunks(q, self.plan):
            out[part] = _forward(q[part], k[part], v[part], rel_h, rel_w, self.plan, self.scale)[0]
        return out

    def backward(
        self, _: Any, grad: Any, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return self._backward(grad, None, q, k, v, rel_h, rel_w)

    def _backward(
        self, grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *relative: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rel_h, rel_w = relative
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        tables = [t for t in (rel_h, rel_w) if t is not None]
        totals = [torch.zeros_like(t, dtype=accumulator(t.dtype)) for t in tables]
        for part in _chunks(q, self.plan):
            few = q[part], k[part], v[part], grad[part], None if grad_lse is None else grad_lse[part]
            *of_maps, of_tables = _backward(*few, rel_h, rel_w, self.plan, self.scale)
            for whole, value in zip(grads, of_maps, strict=True):
                whole[part] = value.permute(0, 2, 3, 1, 4)
            for total, value in zip(totals, of_tables, strict=True):
                total += value
        return *grads, *([t.to(table.dtype) for t, table in zip(totals, tables, strict=True)] or (None, None))

    def graph(self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Any:
        q_tiles, k_tiles, v_tiles = _tiles(q, k, v, self.plan)
        mask = None
        if rel_h is not None and rel_w is not None:
            by_row, by_col = _relative_logits(q_tiles, rel_h, rel_w, self.plan)
            mask = _both(by_row, by_col).flatten(0, 1)
        few_q, few_k, few_v = (t.flatten(0, 1) for t in (q_tiles, k_tiles, v_tiles))
        out = F.scaled_dot_product_attention(few_q, few_k, few_v, attn_mask=mask, scale=self.scale)
        return merge_queries(out.unflatten(0, q_tiles.shape[:2]), *self.plan.queries).permute(0, 2, 3, 1, 4)


class HaloTilesLse(HaloTiles):
    """`HaloTiles` that also returns the log-sum-exp of the logits of every query, (B, H, W, heads)."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        lse = q.new_empty(q.shape[:4], dtype=accumulator(q.dtype))
        for part in _chunks(q, self.plan):
            few = q[part], k[part], v[part]
            out[part], logits = _forward(*few, rel_h, rel_w, self.plan, self.scale)
            lse[part] = _log_sum_exp(logits, self.plan)
        return out, lse

    def backward(
        self, _: Any, grad: Any, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return self._backward(grad[0], grad[1], q, k, v, rel_h, rel_w)

    def graph(
        self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = accumulator(q.dtype)
        q_tiles, k_tiles, v_tiles = _tiles(q.to(wide), k.to(wide), v.to(wide), self.plan)
        logits = torch.matmul(q_tiles, k_tiles.mT) * self.scale
        if rel_h is not None and rel_w is not None:
            logits = logits + _both(*_relative_logits(q_tiles, rel_h, rel_w, self.plan))
        out = merge_queries(torch.matmul(logits.softmax(-1), v_tiles), *self.plan.queries).permute(0, 2, 3, 1, 4)
        return out.to(q.dtype), _log_sum_exp(logits, self.plan)


def by_place(table: Tensor, queries: int) -> Tensor:
    """(2 * window - 1, d) -> (queries, window, d): the cells that a query at each place of the block uses."""
    window = (table.shape[0] + 1) // 2
    from_cell = table.unfold(0, window, 1)  # (window, d, window), a view: [s, :, place] is cell s + place
    return from_cell[window - queries :].flip(0).mT.contiguous()  # query t begins at cell window - 1 - t


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


def _tile_logits(q: Tensor, k: Tensor, relative: tuple[Tensor, Tensor] | None, scale: float) -> Tensor:
    logits = torch.matmul(q, k.mT).mul_(scale)  # (B, heads, tiles, T, K)
    if relative is not None:
        logits.add_(_both(*relative))
    return logits


def _both(by_row: Tensor, by_col: Tensor) -> Tensor:
    """(.., T, key rows) and (.., T, key columns) -> (.., T, K): their sums for every key."""
    return (by_row[..., :, None] + by_col[..., None, :]).flatten(-2)


def _log_sum_exp(logits: Tensor, plan: HaloPlan) -> Tensor:
    """(B, heads, tiles, T, K) -> (B, H, W, heads)."""
    return merge_queries(logits.logsumexp(-1, keepdim=True), *plan.queries).squeeze(-1).permute(0, 2, 3, 1)


def _chunks(q: Tensor, plan: HaloPlan) -> Iterator[tuple]:
    """Index (images, all rows, all columns, heads) so that one chunk's logits fit `CHUNK_LOGITS` a thread."""
    budget, per_head = _budget(), max(_logits(plan), 1)
    heads = min(max(budget // per_head, 1), q.shape[3])
    images = max(budget // (per_head * heads), 1) if heads == q.shape[3] else 1
    for image in range(0, q.shape[0], images):
        for head in range(0, q.shape[3], heads):
            yield slice(image, image + images), slice(None), slice(None), slice(head, head + heads)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, plan: HaloPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, W, heads, d) and the logits of the tiles, for one chunk."""
    wide = accumulator(q.dtype)
    q, k, v = _tiles(q.to(wide), k.to(wide), v.to(wide), plan)
    relative = None
    if rel_h is not None and rel_w is not None:
        relative = _relative_logits(q, rel_h, rel_w, plan)
    logits = _tile_logits(q, k, relative, scale)
    out = torch.matmul(logits.softmax(-1), v)
    return merge_queries(out, *plan.queries).permute(0, 2, 3, 1, 4), logits


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    plan: HaloPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return dq, dk, dv as (B, heads, Y, X, d), and the gradients of the tables, for one chunk."""
    wide = accumulator(q.dtype)
    q, k, v = _tiles(q.to(wide), k.to(wide), v.to(wide), plan)
    grad = split_queries(grad.to(wide).permute(0, 3, 1, 2, 4), *plan.queries)
    leaves: tuple[Tensor, ...] = ()
    relative = detached = None
    if rel_h is not None and rel_w is not None:
        leaf, leaf_h, leaf_w = leaves = tuple(t.detach().to(wide).requires_grad_() for t in (q, rel_h, rel_w))
        with torch.enable_grad():
            relative = _relative_logits(leaf, leaf_h, leaf_w, plan)
        detached = relative[0].detach(), relative[1].detach()
    probs = _tile_logits(q, k, detached, scale).softmax(-1)
    dv = torch.matmul(probs.mT, grad)
    dprobs = torch.matmul(grad, v.mT)
    delta = (dprobs * probs).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= split_queries(grad_lse.to(wide).permute(0, 3, 1, 2)[..., None], *plan.queries)
    dlogits = dprobs.sub_(delta).mul_(probs)
    dq = torch.matmul(dlogits, k).mul_(scale)
    dk = torch.matmul(dlogits.mT, q).mul_(scale)
    of_tables: list[Tensor] = []
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


# Inference


def attend_by_boxes(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, plan: HaloPlan, scale: float
) -> Tensor:
    """Attend from every query tile to its key tile.

    Args:
        q: (B, Y, X, heads, head_dim); k, v: (B, H, W, heads, head_dim or value_dim), of any strides.
        rel_h, rel_w: (2 * window - 1, head_dim), both or none.
        plan: how both are cut.
        scale: of q . k.

    Returns:
        (B, Y, X, heads, value_dim), contiguous.
    """
    (queries, keys), heads, wide = plan, q.shape[3], accumulator(q.dtype)
    rows, cols = queries
    dim = max(q.shape[-1], v.shape[-1])  # SDPA's fast body wants one; zeros add nothing
    budget = _budget()
    tokens, window = rows.tile * cols.tile, keys[0].keys * keys[1].keys
    out = q.new_empty(len(q), rows.tiles * rows.tile, cols.tiles * cols.tile, heads, v.shape[-1])
    overhang = (0, dim - q.shape[-1], 0, 0, 0, cols.tail, 0, rows.tail)
    q = F.pad(q, overhang) if any(overhang) else q
    q_tiles, out_tiles = (cut_regions(x, [rows.tile, cols.tile]) for x in (q, out))
    relative = None if rel_h is None or rel_w is None else _relative(rel_h.to(wide), rel_w.to(wide), queries)
    buffers, maps = Buffers(q, wide), _empty_maps(q, dim, keys, budget)
    for start in range(0, len(q), len(maps[0])):
        images = slice(start, start + len(maps[0]))
        k_tiles, v_tiles = (_fill(m, x[images], keys) for m, x in zip(maps, (k, v), strict=True))
        for box in boxes(k_tiles.shape[:3], budget // (tokens * window * heads)):
            loaded = (buffers.load(n, x[box]) for n, x in (("q", q_tiles[images]), ("k", k_tiles), ("v", v_tiles)))
            few_q, few_k, few_v = (x.flatten(3, 4).flatten(0, 2) for x in loaded)  # (tiles, tokens, heads, dim)
            bias = None if relative is None else _bias(few_q, relative, buffers)
            few_q, few_k, few_v = (x.transpose(1, 2) for x in (few_q, few_k, few_v))
            attended = F.scaled_dot_product_attention(few_q, few_k, few_v, attn_mask=bias, scale=scale).transpose(1, 2)
            place = out_tiles[images][box]
            place.copy_(attended[..., : v.shape[-1]].reshape(place.shape))
    return out[:, : rows.length, : cols.length].contiguous()


def _empty_maps(q: Tensor, dim: int, keys: Axes, budget: int) -> list[Tensor]:
    """Zeros for the keys and values of some images with what surrounds them: (images, rows, columns, heads, dim)."""
    rows, cols = (axis.before + axis.tiles * axis.tile + axis.after for axis in keys)
    images = max(1, min(len(q), budget // (rows * cols * q.shape[3] * dim)))
    return [q.new_zeros(images, rows, cols, q.shape[3], dim, dtype=accumulator(q.dtype)) for _ in "kv"]


def _fill(padded: Tensor, x: Tensor, axes: Axes) -> Tensor:
    """Copy a map into the middle of `padded`; see it as (B, tile rows, tile columns, rows, columns, heads, dim)."""
    (rows, cols), padded = axes, padded[: len(x)]
    padded[:, rows.before :, cols.before :][:, : x.shape[1], : x.shape[2], :, : x.shape[-1]].copy_(x)
    tiles = padded.unfold(1, rows.keys, rows.tile).unfold(2, cols.keys, cols.tile)
    return tiles.permute(0, 1, 2, 5, 6, 3, 4)


def _relative(rel_h: Tensor, rel_w: Tensor, queries: Axes) -> Tensor:
    """Return (query tokens, d, key tokens): what a query at each place of the block meets."""
    by_row, by_col = (by_place(t, axis.tile).mT for t, axis in zip((rel_h, rel_w), queries, strict=True))
    return (by_row[:, None, :, :, None] + by_col[None, :, :, None, :]).flatten(-2).flatten(0, 1)


def _bias(q: Tensor, relative: Tensor, buffers: Buffers) -> Tensor:
    """(n, T, heads, >= d) queries -> their relative logits, (n, heads, T, keys)."""
    tokens, dim, window = relative.shape
    by_token = q[..., :dim].transpose(0, 1)  # (T, n, heads, d)
    logits = buffers.take("bias", torch.Size((tokens, by_token.shape[1] * by_token.shape[2], window)))
    torch.bmm(by_token.reshape(tokens, -1, dim), relative, out=logits)
    return logits.unflatten(1, by_token.shape[1:3]).permute(1, 2, 0, 3)
