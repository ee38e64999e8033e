"""Circular attention: every token sees the tokens closer than a radius.

Paper      Liu et al. 2024, arXiv:2412.16112 (CLEAR), the mask of image queries on image keys.
Semantics  a query sees the keys at dy * dy + dx * dx < radius * radius; at the border fewer, nothing is clamped. It may
           see more keys in the same softmax: those of text tokens, and cells, averages of the map's keys and values
           with learned weights.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.local.plan import Pattern, pattern_of
from ._attend import accumulator
from ._checks import check_at_least, check_qkv, why_no_local_kernel
from ._graph.local import circle_attention_graph, circle_attention_lse_graph
from ._lse import first_result, lse_variant
from ._op import Impl, declare, run
from .keys import Extras, KeysAttentionLse, check_extras, joined, keys_attention_lse_graph
from .tile_plan import cached_tile_mask, positions, tile_plan
from .tiled_attention import TiledAttention, TiledAttentionLse
from .tiling import AxisTiling

OP = "circle_attention"
CAST = ("q", "k", "v", "cell_weight", "text_k", "text_v")


def circle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    radius: int,
    *,
    cell_weight: Tensor | None = None,
    text_k: Tensor | None = None,
    text_v: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every token to the tokens at a distance below `radius`, and to text tokens and cells of the map.

    Cost: about 3.14 * H * W * radius ** 2 * head_dim multiply-adds per head, twice; the tiled and the fused body
    compute up to 2.5 times as many in exchange for dense products. Every text token and every cell adds H * W *
    head_dim, twice. The fused body has no double backward.

    Args:
        q, k: (B, H, W, heads, head_dim); v: (B, H, W, heads, value_dim). One dtype and device; strided views are fine.
        radius: in tokens, at least 1 (a token sees itself only).
        cell_weight: (rows, columns), weights of the tokens of a cell, which must divide the map; their sum is free.
            All queries see all cells. None: no cells.
        text_k: (B, T, heads, head_dim); text_v: (B, T, heads, value_dim): keys that all queries see. None: no text.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, radius is below 1, or cells do not divide the map.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, radius, cell_weight, text_k, text_v, scale, impl)


circle_attention_lse = lse_variant(circle_attention)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, radius: int, extras: Extras) -> None:
    check_qkv(op, q, k, v, value_dim=True)
    check_at_least(op, "radius", (radius,), 1)
    check_extras(op, q, v, extras)


def circle_attention_lse_reference(
    q: Tensor, k: Tensor, v: Tensor, radius: int, extras: Extras, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition: gather the keys of every query's circle, 3.14 * radius ** 2 copies of k and v. float32 inside."""
    wide = accumulator(q.dtype)
    more = extras.of_map(k, v)
    away = torch.arange(1 - radius, radius, device=q.device)
    dy, dx = (t.flatten() for t in torch.meshgrid(away, away, indexing="ij"))
    near = dy * dy + dx * dx < radius * radius
    row = torch.arange(q.shape[1], device=q.device)[:, None, None] + dy[near]  # (H, 1, keys)
    col = torch.arange(q.shape[2], device=q.device)[:, None] + dx[near]  # (W, keys)
    outside = (row < 0) | (row >= q.shape[1]) | (col < 0) | (col >= q.shape[2])  # (H, W, keys)
    index = row.clamp(0, q.shape[1] - 1), col.clamp(0, q.shape[2] - 1)
    k, v = (t.to(wide)[:, index[0], index[1]].masked_fill(outside[..., None, None], 0) for t in (k, v))
    logits = torch.einsum("bhwnd,bhwknd->bnhwk", q.to(wide) * scale, k).masked_fill(outside, -torch.inf)
    near = logits.shape[-1]
    if more is not None:
        logits = torch.cat([logits, torch.einsum("bhwnd,bknd->bnhwk", q.to(wide) * scale, more[0].to(wide))], -1)
    probs = logits.softmax(-1)
    out = torch.einsum("bnhwk,bhwknd->bhwnd", probs[..., :near], v)
    if more is not None:
        out = out + torch.einsum("bnhwk,bknd->bhwnd", probs[..., near:], more[1].to(wide))
    return out.to(q.dtype), logits.logsumexp(-1).permute(0, 2, 3, 1)


class Circle(NamedTuple):
    """The tokens closer than a radius; at the border fewer."""

    radius: int

    @property
    def dilation(self) -> tuple[int, int]:
        return 1, 1

    def reach(self, axis: int, length: int, tile: int) -> tuple[int, int]:
        return self.radius - 1, self.radius - 1

    def axis_table(self, axis: int, length: int, tiling: AxisTiling, device: torch.device) -> Tensor:
        """Squared distances; radius ** 2 where the query or the key is outside the map."""
        query, key = positions(tiling, device)
        outside = (key < 0) | (key >= length) | (query >= length)
        return (key - query).square().masked_fill(outside, self.radius**2)[None]

    def seen(self, rows: Tensor, cols: Tensor) -> Tensor:
        return rows + cols < self.radius**2

    def sees_all(self, size: tuple[int, int]) -> bool:
        return (size[0] - 1) ** 2 + (size[1] - 1) ** 2 < self.radius**2


def _tiled(q: Tensor, k: Tensor, v: Tensor, circle: Circle, extras: Extras, scale: float) -> Tensor:
    if extras.given:
        return _tiled_lse(q, k, v, circle, extras, scale)[0]
    return _near(TiledAttention, q, k, v, circle, scale)


def _tiled_lse(q: Tensor, k: Tensor, v: Tensor, circle: Circle, extras: Extras, scale: float) -> tuple[Tensor, Tensor]:
    near = _near(TiledAttentionLse, q, k, v, circle, scale)
    more = extras.of_map(k, v)
    return near if more is None else joined(near, KeysAttentionLse(scale)(q, *more))


def _near(kind: type[TiledAttention], q: Tensor, k: Tensor, v: Tensor, circle: Circle, scale: float) -> Any:
    """Tiles of queries against the one key tile that covers their circles."""
    size = (q.shape[1], q.shape[2])
    plan = tile_plan(circle, size)
    mask = cached_tile_mask(circle, size, plan, q.device, accumulator(q.dtype))
    return kind(plan, mask, scale)(q, k, v, None)


def _graph(q: Tensor, k: Tensor, v: Tensor, circle: Circle, extras: Extras, scale: float) -> Tensor:
    if extras.given:
        return _graph_lse(q, k, v, circle, extras, scale)[0]
    return circle_attention_graph(q, k, v, circle, scale)


def _graph_lse(q: Tensor, k: Tensor, v: Tensor, circle: Circle, extras: Extras, scale: float) -> tuple[Tensor, Tensor]:
    near = circle_attention_lse_graph(q, k, v, circle, scale)
    more = extras.of_map(k, v)
    return near if more is None else joined(near, keys_attention_lse_graph(q, *more, scale))


def _pattern(radius: int) -> Pattern:
    return pattern_of("circle", (radius, radius), (radius - 1, radius - 1))


def _fused(q: Tensor, k: Tensor, v: Tensor, radius: int, extras: Extras, scale: float) -> Tensor:
    from ..kernels.local.launch import local_attention  # here, so that CPU users need no Triton

    if extras.given:
        return _fused_lse(q, k, v, radius, extras, scale)[0]
    return local_attention(q, k, v, _pattern(radius), scale=scale)


def _fused_lse(q: Tensor, k: Tensor, v: Tensor, radius: int, extras: Extras, scale: float) -> tuple[Tensor, Tensor]:
    from ..kernels.keys import keys_attention_lse
    from ..kernels.local.launch import local_attention_lse

    near = local_attention_lse(q, k, v, _pattern(radius), scale=scale)
    more = extras.of_map(k, v)
    return near if more is None else joined(near, keys_attention_lse(q, *more, scale=scale))


def _macs(q: Tensor, v: Tensor, radius: int, extras: Extras) -> int:
    rows, cols = (torch.arange(length) for length in q.shape[1:3])
    apart_y, apart_x = ((x[:, None] - x).square().flatten().bincount() for x in (rows, cols))  # pairs by distance ** 2
    near = torch.arange(len(apart_y))[:, None] + torch.arange(len(apart_x)) < radius * radius
    pairs = int((apart_y[:, None] * apart_x * near).sum()) + q.shape[1] * q.shape[2] * extras.count(q)
    return q.shape[0] * q.shape[3] * (q.shape[4] + v.shape[4]) * pairs


BUNDLES = {"circle": Circle, "extras": Extras}

declare(
    circle_attention,
    check=partial(_check, OP),
    reference=first_result(circle_attention_lse_reference),
    tiled=_tiled,
    graph=_graph,
    fused=_fused,
    why_not_fused=why_no_local_kernel,
    cast=CAST,
    macs=_macs,
    bundles=BUNDLES,
)
declare(
    circle_attention_lse,
    check=partial(_check, f"{OP}_lse"),
    reference=circle_attention_lse_reference,
    tiled=_tiled_lse,
    graph=_graph_lse,
    fused=_fused_lse,
    why_not_fused=why_no_local_kernel,
    cast=CAST,
    macs=_macs,
    bundles=BUNDLES,
)
