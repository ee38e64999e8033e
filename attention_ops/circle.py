"""Circular attention: every token sees the tokens closer than a radius.

Paper      Liu et al. 2024, arXiv:2412.16112 (CLEAR), the mask of image queries on image keys.
Semantics  a query sees the keys at dy * dy + dx * dx < radius * radius; at the border fewer, nothing is clamped.
We differ  text tokens and the optional down-sampled keys of the paper's model are not part of this op.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ._autocast import cast_for_autocast, no_autocast
from ._checks import check_at_least, check_qkv
from ._choice import Impl, choose
from ._fused import why_no_local_kernel
from .tiled_attention import TILES, TilePlan, accumulator, cheapest_tiles, tiled_attention
from .tiling import AxisTiling

OP = "circle_attention"


def circle_attention(
    q: Tensor, k: Tensor, v: Tensor, radius: int, *, scale: float | None = None, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """Attend from every token to the tokens at a distance below `radius`.

    Cost: about 3.14 * H * W * radius ** 2 * head_dim multiply-adds per head, twice; the tiled and the fused body
    compute up to 2.5 times as many in exchange for dense products. The fused body has no double backward.

    Args:
        q, k, v: (B, H, W, heads, head_dim), one shape, dtype and device; strided views are fine.
        radius: in tokens, at least 1 (a token sees itself only).
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, head_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or radius is below 1.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    impl = Impl(impl).value if isinstance(impl, Impl) else impl
    return torch.ops.foveate.circle_attention(q, k, v, radius, scale, impl)


torch.library.define(
    "foveate::circle_attention",
    "(Tensor q, Tensor k, Tensor v, int radius, float? scale=None, str impl='auto') -> Tensor",
)


# CompositeImplicitAutograd: tracers see through to torch ops on a CPU, so backward, export and ONNX need nothing more.
@torch.library.impl("foveate::circle_attention", "CompositeImplicitAutograd")
def _circle_attention(
    q: Tensor, k: Tensor, v: Tensor, radius: int, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    check_qkv(OP, q, k, v)
    check_at_least(OP, "radius", (radius,), 1)
    run = choose(OP, impl, why_not_fused(q, k, v, scale))
    q, k, v = cast_for_autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if run is Impl.FUSED:
        from ..kernels.local import Pattern, local_attention  # here, so that CPU users need no Triton

        pattern = Pattern("circle", (radius, radius), (radius - 1, radius - 1))
        return local_attention(q, k, v, pattern, scale=scale)
    body = circle_attention_reference if run is Impl.REFERENCE else circle_attention_tiled
    with no_autocast(q):
        return body(q, k, v, radius, scale=scale)


def why_not_fused(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str | None:
    """Return the reason why no fused kernel can run on these tensors, or None."""
    return why_no_local_kernel(q, k, v, scale)


def circle_attention_reference(q: Tensor, k: Tensor, v: Tensor, radius: int, *, scale: float) -> Tensor:
    """The definition: every logit of the map, those outside the circle masked. float32 inside at least."""
    wide = accumulator(q.dtype)
    rows, cols = (torch.arange(length, device=q.device) for length in q.shape[1:3])
    apart_y, apart_x = ((x[:, None] - x).square() for x in (rows, cols))
    seen = apart_y[:, None, :, None] + apart_x[None, :, None, :] < radius * radius  # (H, W, H, W)
    logits = torch.einsum("bhwnd,bijnd->bnhwij", q.to(wide) * scale, k.to(wide))
    probs = logits.masked_fill(~seen, -torch.inf).flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bnhwij,bijnd->bhwnd", probs, v.to(wide)).to(q.dtype)


def circle_attention_tiled(q: Tensor, k: Tensor, v: Tensor, radius: int, *, scale: float) -> Tensor:
    """Tiles of queries against the one key tile that covers their circles."""
    size = (q.shape[1], q.shape[2])
    rows, cols = plan_tiles(size, radius)
    eager = type(q) is Tensor  # under a tracer, tables must become part of the graph
    mask = (_cached_mask if eager else tile_mask)(radius, rows, cols, q.device)
    maps = (x.permute(0, 3, 1, 2, 4)[:, :, None, None] for x in (q, k, v))  # (B, heads, 1, 1, H, W, d)
    out = tiled_attention(*maps, mask, None, TilePlan(rows, cols, scale))
    return out[:, :, 0, 0].permute(0, 2, 3, 1, 4)


def plan_tiles(size: tuple[int, int], radius: int) -> tuple[AxisTiling, AxisTiling]:
    """Choose the tiles of least estimated work; a traced size that is a symbol gets a tiling right for every length."""
    if all(isinstance(length, int) for length in size):
        return _cheapest_tiles(size, radius)
    return tuple(AxisTiling(length, TILES[-1], radius - 1, radius - 1) for length in size)


@lru_cache(maxsize=256)
def _cheapest_tiles(size: tuple[int, int], radius: int) -> tuple[AxisTiling, AxisTiling]:
    return cheapest_tiles(
        *(
            [AxisTiling(length, length), *(AxisTiling(length, t, radius - 1, radius - 1) for t in TILES if t < length)]
            for length in size
        )
    )


def tile_mask(radius: int, rows: AxisTiling, cols: AxisTiling, device: torch.device) -> Tensor:
    """(tiles, query tokens, key tokens) bool, True where the query sees the key."""
    apart, inside = [], []
    for axis in (rows, cols):
        first = torch.arange(axis.tiles, device=device)[:, None, None] * axis.tile
        query = first + torch.arange(axis.tile, device=device)[:, None]
        key = first - axis.before + torch.arange(axis.keys, device=device)
        apart.append((key - query).square())  # (tiles, tile, keys)
        # A query past the end is cropped; it sees what lies past the end, since an empty row would make it NaN.
        inside.append((key >= 0) & ((key < axis.length) | (query >= axis.length)))
    y, x = apart[0][:, None, :, None, :, None], apart[1][None, :, None, :, None, :]
    on_map = inside[0][:, None, :, None, :, None] & inside[1][None, :, None, :, None, :]
    return ((y + x < radius * radius) & on_map).flatten(4, 5).flatten(2, 3).flatten(0, 1)


@lru_cache(maxsize=128)
def _cached_mask(*key) -> Tensor:
    with torch.inference_mode(False):  # a mask first made during inference must serve training too
        return tile_mask(*key)
