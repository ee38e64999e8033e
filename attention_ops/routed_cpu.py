"""Routed attention on a CPU.

Attention runs over copies of the routed keys, or over all keys with a mask, whichever is cheaper, part by part of the
batch. Figures are of 2 threads of a Xeon with AVX-512 and torch 2.15.

Rows       keys and values of an image are copied so that a region is one row of memory: gathering routed regions then
           copies whole rows (70 GB/s where tokens of the map gave 20). The gradients of keys are summed in rows, too.
Forward    plain matrix products, 1.1 to 1.3 times as fast as SDPA over 64 to 1024 keys a query, with one buffer for the
           copies of keys and then of values (5 % faster than two); in 16 bits SDPA, which there was 1.5 times as fast
           as products of float32 copies.
Backward   recomputes the logits, by plain matrix products: for 64 queries and 256 keys of 32 channels a logit took
           1.6 ns, where SDPA's two passes took 4.5 ns; in 16 bits 7 ns and more.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tiled_attention as tiles
from ._attend import EagerBody, accumulator, is_finite
from ._buffers import Buffers
from .tile_plan import KEY_COPY_COST
from .tiling import boxes, cut_regions, join_regions


class Regions(NamedTuple):
    """How maps are cut, in tokens (rows, columns)."""

    region_size: tuple[int, int]
    kv_region_size: tuple[int, int] | None  # as region_size when None

    @property
    def of_keys(self) -> tuple[int, int]:
        return self.region_size if self.kv_region_size is None else self.kv_region_size


def routed_attention_tiled(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, scale: float) -> Tensor:
    """Attend to copies of the routed keys, or to all keys with a mask, whichever is cheaper, part by part."""
    return RoutedAttention(routes, RegionPlan(regions.region_size, regions.of_keys, scale))(q, k, v)


class RegionPlan(NamedTuple):
    """How maps are cut, in tokens, and the scale of the logits."""

    region: tuple[int, int]
    kv_region: tuple[int, int]
    scale: float


class Part(NamedTuple):
    """Some images, all their queries; or one image, the queries of a rectangle of regions. All keys in both cases.

    A part is an index of what `cut_regions` returns.
    """

    images: slice
    rows: slice  # of regions
    cols: slice

    def routes(self, routes: Tensor, q: Tensor, plan: RegionPlan) -> Tensor:
        return routes.unflatten(1, (q.shape[1] // plan.region[0], -1))[self].flatten(1, 2)


def cut_into_parts(q: Tensor, plan: RegionPlan, regions: int) -> Iterator[Part]:
    """Cut the batch, and large images too, so that a part has at most so many regions (1 if that is below 1)."""
    counts = q.shape[0], q.shape[1] // plan.region[0], q.shape[2] // plan.region[1]
    for box in boxes(counts, regions):
        yield Part(*box)


# The least cost of a key, in logits: 4, 16 and 64 queries broke even with a mask at 0.1, 0.5 and all of the keys
# (head_dim 32, float32, forward and backward, 2 threads of a Xeon with AVX-512).
LEAST_KEY_COST = 32


def masking_is_cheaper(q: Tensor, k: Tensor, routes: Tensor, plan: RegionPlan) -> bool:
    """Say whether all logits of a region cost less than copies of its routed keys and their logits."""
    queries, keys = plan.region[0] * plan.region[1], plan.kv_region[0] * plan.kv_region[1]
    return queries * k.shape[1] * k.shape[2] <= routes.shape[2] * keys * max(queries, LEAST_KEY_COST)


def _masking_is_cheaper_in_a_graph(q: Tensor, k: Tensor, routes: Tensor, plan: RegionPlan) -> bool:
    """Say what `masking_is_cheaper` says, for bodies that copy keys token by token."""
    queries, keys = plan.region[0] * plan.region[1], plan.kv_region[0] * plan.kv_region[1]
    return queries * k.shape[1] * k.shape[2] <= routes.shape[2] * keys * (queries + KEY_COPY_COST)


def _attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """Plain differentiable torch."""
    if _masking_is_cheaper_in_a_graph(q, k, routes, plan):
        return _attend_masked(q, k, v, routes, plan)
    tokens = _routed_tokens(k, routes, plan)
    return _attend_copies(q, _copies(k, tokens), _copies(v, tokens), plan)


def _copies(x: Tensor, tokens: Tensor) -> Tensor:
    """(B, Hk, Wk, heads, d) -> (B * regions, topk * Tk, heads, d)."""
    return x.flatten(0, 2).flatten(1).index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[3:])


def _attend_copies(q: Tensor, keys: Tensor, values: Tensor, plan: RegionPlan) -> Tensor:
    cut = cut_regions(q, list(plan.region))
    queries = cut.flatten(3, 4).flatten(0, 2)  # (B * regions, T, heads, d)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values, scale=plan.scale).transpose(1, 2)
    return join_regions(out.unflatten(1, plan.region).unflatten(0, cut.shape[:3]))


def _routed_tokens(k: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """(B * regions, topk * Tk): the keys that every region sees, as rows of k seen as (B * Hk * Wk, ...)."""
    (batch, height, width), (rows, cols) = k.shape[:3], plan.kv_region
    row = (routes // (width // cols) * rows)[..., None, None] + torch.arange(rows, device=k.device)[:, None]
    col = (routes % (width // cols) * cols)[..., None, None] + torch.arange(cols, device=k.device)
    image = torch.arange(batch, device=k.device).view(-1, 1, 1, 1, 1) * (height * width)
    return (image + row * width + col).flatten(2).flatten(0, 1)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    mask = _token_mask(q, k, routes, plan)
    size = q.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, d), views
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=plan.scale)
    return out.transpose(1, 2).unflatten(1, size)


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
        return _forward_gathered(q, k, v, self.routes, self.plan)

    def backward(self, _: None, grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        if masking_is_cheaper(q, k, self.routes, self.plan):
            grads = _backward_masked(q, k, v, self.routes, grad, self.plan)
            if is_finite(*grads):
                return grads
        return _backward_gathered(q, k, v, self.routes, grad, self.plan)

    def graph(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.routes, self.plan)


def _masked_parts(q: Tensor, k: Tensor, plan: RegionPlan, budget: int) -> Iterator[Part]:
    """Cut so that a part's mask, which has no heads, is within `budget` numbers, if it can."""
    return cut_into_parts(q, plan, budget // (plan.region[0] * plan.region[1] * k.shape[1] * k.shape[2]))


def _forward_masked(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    parts = list(_masked_parts(q, k, plan, torch.get_num_threads() * tiles.CHUNK_LOGITS))
    if len(parts) == 1:
        return _attend_masked(q, k, v, routes, plan).contiguous()
    out = q.new_empty(*q.shape[:4], v.shape[-1])
    cut_q, cut_out = (cut_regions(x, list(plan.region)) for x in (q, out))
    for part in parts:
        seen = k[part.images], v[part.images], part.routes(routes, q, plan)
        attended = _attend_masked(join_regions(cut_q[part]), *seen, plan)
        cut_out[part].copy_(cut_regions(attended, list(plan.region)))
    return out


def _backward_masked(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, grad: Tensor, plan: RegionPlan) -> list[Tensor]:
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    cut_q, cut_grad, cut_dq = (cut_regions(x, list(plan.region)) for x in (q, grad, dq))
    for part in _masked_parts(q, k, plan, torch.get_num_threads() * tiles.CHUNK_LOGITS // 2):
        inputs = join_regions(cut_q[part]), k[part.images], v[part.images]
        with torch.enable_grad():
            few_q, few_k, few_v = (x.detach().requires_grad_() for x in inputs)
            out = _attend_masked(few_q, few_k, few_v, part.routes(routes, q, plan), plan)
        of_q, of_k, of_v = torch.autograd.grad(out, (few_q, few_k, few_v), join_regions(cut_grad[part]))
        cut_dq[part].copy_(cut_regions(of_q, list(plan.region)))
        dk[part.images] += of_k  # several parts share the keys
        dv[part.images] += of_v
    return [dq, dk, dv]


# Over copies of the routed keys


def _forward_gathered(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """(B, H, W, heads, d) and so on, as `routed_attention` says -> (B, H, W, heads, width of v)."""
    out, buffers = q.new_empty(*q.shape[:4], v.shape[-1]), Buffers(q, q.dtype)
    at_once = _regions_at_once(q, k, v, routes, plan)
    cut, cut_out = (_by_head(x, plan.region) for x in (q, out))
    cut_keys = [_by_head(x, plan.kv_region) for x in (k, v)]
    rows = _rows(routes, max(1, at_once // routes.shape[1]), q.shape[3]).view(*cut.shape[:4], routes.shape[2])
    for images, parts in groupby(cut_into_parts(q, plan, at_once), lambda part: part.images):
        keys, values = (_tiles(buffers.load(n, x[images])) for n, x in zip("kv", cut_keys, strict=True))
        for part in parts:
            queries, index = _tiles(buffers.load("q", cut[part])), rows[part].flatten(0, 3)
            results, place = _attend_rows(queries, keys, values, index, plan.scale, buffers), cut_out[part]
            place.copy_(results.view(place.shape))
    return out


def _backward_gathered(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, grad: Tensor, plan: RegionPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    buffers, grads = Buffers(q, accumulator(q.dtype)), [x.new_empty(x.shape) for x in (q, k, v)]
    kinds = (plan.region, plan.kv_region, plan.kv_region, plan.region)
    inputs = [_by_head(x, region) for x, region in zip((q, k, v, grad), kinds, strict=True)]
    places = [_by_head(x, region) for x, region in zip(grads, kinds, strict=False)]
    # Logits and their gradients, copies of keys and values.
    numbers = _keys(routes, plan) * (2 * plan.region[0] * plan.region[1] + k.shape[4] + v.shape[4])
    step = max(1, _budget(q) // numbers)
    for images, heads in _blocks(q):
        queries, keys, values, grad = (
            _tiles(buffers.load(n, x[images, :, :, heads])) for n, x in zip("qkvg", inputs, strict=True)
        )
        totals = [buffers.take(n, x.shape).zero_() for n, x in (("dk", keys), ("dv", values))]
        routed = routes[images]
        rows = _rows(routed, len(routed), len(keys) // routed[:, :, 0].numel())
        for index, few, few_grad in zip(*(x.split(step) for x in (rows, queries, grad)), strict=True):
            seen = [buffers.gather(n, x, index) for n, x in (("keys", keys), ("values", values))]
            _to_gradients(few, few_grad, seen[0], seen[1], plan.scale, buffers)
            for total, copies, factor in zip(totals, seen, (plan.scale, 1), strict=True):
                total.flatten(1).index_add_(0, index.flatten(), copies.view(index.numel(), -1), alpha=factor)
        for place, total in zip(places, (queries, *totals), strict=True):
            place = place[images, :, :, heads]
            place.copy_(total.view(place.shape))
    dq, dk, dv = grads
    return dq, dk, dv


def _regions_at_once(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> int:
    """Regions whose logits and copies, of keys or of values, fit about 1.5 times the second-level caches."""
    per_key = max(k.shape[4], v.shape[4]) + plan.region[0] * plan.region[1]
    return 3 * torch.get_num_threads() * tiles.CHUNK_LOGITS // (2 * _keys(routes, plan) * k.shape[3] * per_key)


def _keys(routes: Tensor, plan: RegionPlan) -> int:
    return routes.shape[2] * plan.kv_region[0] * plan.kv_region[1]


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices: some images with all heads, or some heads of one image, so that six copied maps fit a cache."""
    heads = q.shape[3]
    planes = max(1, _budget(q) // (4 * q.shape[1] * q.shape[2] * q.shape[4]))
    images = max(1, planes // heads)
    for image in range(0, q.shape[0], images):
        for head in range(0, heads, planes):
            yield slice(image, image + images), slice(head, head + planes)


def _budget(q: Tensor) -> int:
    """Numbers that fit the second-level caches, at most 50 % of a small map."""
    return min(torch.get_num_threads() * tiles.CHUNK_LOGITS, q.numel() // 2)


def _by_head(x: Tensor, region: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, region rows, region columns, heads, rows, columns, d), a view."""
    return cut_regions(x, list(region)).permute(0, 1, 2, 5, 3, 4, 6)


def _tiles(cut: Tensor) -> Tensor:
    """A contiguous result of `_by_head` -> (B * regions * heads, tokens, d)."""
    return cut.view(cut.shape[:4].numel(), cut.shape[4] * cut.shape[5], cut.shape[6])


def _rows(routes: Tensor, images: int, heads: int = 1) -> Tensor:
    """(B, regions, topk) -> (B * regions * heads, topk): the rows, by image, region and head, that are seen."""
    image = torch.arange(len(routes), device=routes.device).remainder_(images).mul_(routes.shape[1]).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=routes.device)[:, None]
    return ((image + routes[:, :, None]) * heads + head).view(-1, routes.shape[2])


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float, buffers: Buffers) -> Tensor:
    """(n, T, d), to the rows by `index` (n, topk) of (m, Tk, d) and (m, Tk, w) -> (n, T, w). Overwrites q."""
    if q.dtype in (torch.float16, torch.bfloat16):
        keys, values = buffers.gather("keys", k, index), buffers.gather("values", v, index)
        return F.scaled_dot_product_attention(q[:, None], keys[:, None], values[:, None], scale=scale)[:, 0]
    keys = buffers.gather("copies", k, index)
    weights = buffers.take("weights", torch.Size((*q.shape[:2], keys.shape[1])))
    torch.baddbmm(weights, q, keys.mT, beta=0, alpha=scale, out=weights)
    torch.softmax(weights, -1, out=weights)
    values = buffers.gather("copies", v, index)  # over the keys
    return torch.bmm(weights, values, out=buffers.take("q", torch.Size((*q.shape[:2], v.shape[2]))))


def _to_gradients(q: Tensor, grad: Tensor, k: Tensor, v: Tensor, scale: float, buffers: Buffers) -> None:
    """Overwrite q (n, T, d), k (n, K, d) and v (n, K, w) with gradients, dk without scale. Overwrites grad too."""
    logits, dlogits = (buffers.take(n, torch.Size((*q.shape[:2], k.shape[1]))) for n in ("logits", "dlogits"))
    torch.baddbmm(logits, q, k.mT, beta=0, alpha=scale, out=logits)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    sums = weights.sum(-1, keepdim=True)
    grad.div_(sums)  # cheaper than dividing the weights
    torch.bmm(grad, v.mT, out=dlogits)
    torch.bmm(weights.mT, grad, out=v)
    dlogits.mul_(weights)
    dlogits.addcmul_(weights, dlogits.sum(-1, keepdim=True).div_(sums), value=-1)
    dq = torch.bmm(dlogits, k)
    torch.bmm(dlogits.mT, q, out=k)
    torch.mul(dq, scale, out=q)
