"""Routed attention for exporters and compilers: keys are copied region by region, or masked where that is cheaper."""

from typing import Any

import torch
from torch import Tensor

from .._attend import accumulator, of_one_layout
from .sizes import image_numbers, known, sides
from .tiles import attend

# The least cost of a key, in logits; see LEAST_KEY_COST of the tiled body, which copies alike.
LEAST_KEY_COST = 32


def routed_attention_graph(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Any, scale: float) -> Tensor:
    """Attend by differentiable operations."""
    region, kv_region = regions.region_size, regions.of_keys
    body = _attend_masked if _masking_is_cheaper(k, routes, region, kv_region) else _attend_copies
    return of_one_layout(body(q, k, v, routes, region, kv_region, scale))


def _masking_is_cheaper(k: Tensor, routes: Tensor, region: tuple[int, int], kv_region: tuple[int, int]) -> bool:
    """Say whether all logits of a region cost less than copies of its routed keys; False where sizes are free."""
    if not known(*region, *kv_region, *sides(k), routes.shape[2]):
        return False
    queries, keys = region[0] * region[1], kv_region[0] * kv_region[1]
    return queries * k.shape[1] * k.shape[2] <= routes.shape[2] * keys * max(queries, LEAST_KEY_COST)


def _by_region(x: Tensor, region: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, region rows, region columns, rows, columns, d)."""
    height, width = sides(x)
    cut = x.unflatten(2, (width // region[1], region[1])).unflatten(1, (height // region[0], region[0]))
    return cut.permute(0, 5, 1, 3, 2, 4, 6)


def _attend_copies(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region: tuple[int, int], kv_region: tuple[int, int], scale: float
) -> Tensor:
    queries = _by_region(q, region)
    grid, tokens = queries.shape[2:4], queries.shape[4:6]
    rows = _rows(routes, q.shape[3])
    keys, values = (_copies(_by_region(x, kv_region), rows) for x in (k, v))
    out = attend(queries.flatten(4, 5).flatten(2, 3), keys, values, None, scale)
    return out.unflatten(3, tokens).unflatten(2, grid).permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)


def _rows(routes: Tensor, heads: int) -> Tensor:
    """(B, regions, topk) -> (B, heads, regions, topk): the regions of all images and heads, counted through."""
    plane = image_numbers(routes)[:, None] * heads + torch.arange(heads, device=routes.device)  # (B, heads)
    plane = plane * routes.shape[1]
    return plane[:, :, None, None] + routes[:, None]


def _copies(cut: Tensor, rows: Tensor) -> Tensor:
    """Regions of `_by_region` by rows (B, heads, regions, topk) -> (B, heads, regions, topk * tokens, d)."""
    flat = cut.flatten(4, 6).flatten(0, 3)  # (B * heads * regions, tokens * d)
    copies = flat.index_select(0, rows.flatten())
    tokens = rows.shape[3] * cut.shape[4] * cut.shape[5]
    return copies.reshape(*rows.shape[:3], tokens, cut.shape[6])


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region: tuple[int, int], kv_region: tuple[int, int], scale: float
) -> Tensor:
    mask = _token_mask(q, k, routes, region, kv_region)[:, :, None]
    queries, keys, values = (x.flatten(1, 2).transpose(1, 2)[:, :, None] for x in (q, k, v))  # (B, heads, 1, tokens, d)
    out = attend(queries, keys, values, mask, scale)
    return out.flatten(2, 3).transpose(1, 2).unflatten(1, sides(q))


def _token_mask(q: Tensor, k: Tensor, routes: Tensor, region: tuple[int, int], kv_region: tuple[int, int]) -> Tensor:
    """(B, 1, query tokens, key tokens), 0 where a query sees a key and -inf elsewhere; tokens in the maps' order."""
    batch, regions, _ = routes.shape
    (rows, cols), (kv_rows, kv_cols), (height, width) = region, kv_region, sides(q)
    kv_height, kv_width = sides(k)
    grid, kv_grid = (height // rows, width // cols), (kv_height // kv_rows, kv_width // kv_cols)
    seen = (batch, regions, kv_grid[0] * kv_grid[1])
    mask = torch.full(seen, -torch.inf, dtype=accumulator(q.dtype), device=q.device).scatter(2, routes, 0.0)
    mask = mask.view(batch, grid[0], 1, grid[1], 1, kv_grid[0], 1, kv_grid[1], 1)
    mask = mask.expand(-1, -1, rows, -1, cols, -1, kv_rows, -1, kv_cols)
    return mask.reshape(batch, 1, height * width, kv_height * kv_width)
