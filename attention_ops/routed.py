"""Bi-level routing attention: every region of queries sees the tokens of the few regions that it is routed to.

Paper      Zhu et al. 2023, arXiv:2303.08810 (BiFormer), section 3.2.
Semantics  those of the authors' released models: routes come from region means of q and k over all heads at once, with
           no gradient; heads share the routes. The scale of the paper's models is dim ** -0.5, of the whole width.
We differ  soft routing and the authors' ways of pooling keys are not here (no released model uses them);
           `kv_region_size` is for callers that pool keys.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels._launch import no_autocast
from ..kernels.routed.plan import MOST_REGIONS
from ._attend import accumulator
from ._checks import check_alike, check_at_least, pair, why_no_attention_kernel, why_no_kernel
from ._graph.routed import routed_attention_graph
from ._graph.sizes import covering, differs, is_known
from ._graph.tiles import product
from ._op import Count, Impl, SymSize, call, declare, is_traced, register, run, under_transform
from .routed_cpu import Regions, routed_attention_tiled
from .tiling import merge_windows, pad_to_windows, split_windows

OP = "routed_attention"


def bi_level_routes(q: Tensor, k: Tensor, *, region_size: SymSize, topk: Count) -> Tensor:
    """Route every region to the `topk` regions whose mean keys agree most with its mean query.

    Regions at the lower and right edge may overhang the map: their means are over the tokens that exist.

    Args:
        q, k: (B, H, W, heads, head_dim) or (B, H, W, C), of one shape.
        region_size: tokens, an int or (rows, columns).
        topk: regions to keep, at most all of them.

    Returns:
        (B, regions, topk) int64, regions row-major, best first. It carries no gradient.

    Raises:
        ValueError: shapes disagree, a size is below 1, or topk is above the number of regions.
    """
    region_size = pair("bi_level_routes", "region_size", region_size)
    return call("bi_level_routes", {"q": q, "k": k, "region_size": region_size, "topk": topk})


def _bi_level_routes(q: Tensor, k: Tensor, *, region_size: list[int], topk: int) -> Tensor:
    if q.dim() not in (4, 5) or q.shape != k.shape:
        raise ValueError(
            f"bi_level_routes: q and k must be (B, H, W, heads, head_dim) or (B, H, W, C) of one shape, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check_at_least("bi_level_routes", "region_size", region_size, 1)
    check_at_least("bi_level_routes", "topk", [topk], 1)
    with torch.no_grad(), no_autocast(q):
        q, k = (x.detach().flatten(3) for x in (q, k))
        if q.dtype == k.dtype and why_no_kernel(q, k) is None and not under_transform([q, k]):
            regions = -(-q.shape[1] // region_size[0]) * -(-q.shape[2] // region_size[1])
            if regions <= MOST_REGIONS:
                _check_topk(topk, regions)
                from ..kernels.routed.routes import bi_level_routes_forward  # here, so that CPU users need no Triton

                return bi_level_routes_forward(q, k, [region_size[0], region_size[1]], topk)
        means_q, means_k = (region_means(x, region_size) for x in (q, k))
        _check_topk(topk, means_q.shape[1])
        return product(means_q, means_k, transposes=True).topk(topk).indices


def _check_topk(topk: int, regions: int) -> None:
    if is_known(topk > regions):
        raise ValueError(f"bi_level_routes: topk must be at most the {regions} regions, got {topk}")


register(bi_level_routes, _bi_level_routes)


def region_means(x: Tensor, region_size: Sequence[int]) -> Tensor:
    """(B, H, W, C) -> (B, regions, C): means over the tokens that exist, float32 at least; differentiable."""
    tokens = _tokens if is_traced([x]) or under_transform([x]) else _cached_tokens
    counts = tokens((x.shape[1], x.shape[2]), (region_size[0], region_size[1]), x.device)
    x = pad_to_windows(x, list(region_size))
    # One axis after the other: 33 % of the time of both at once, and no copy where x is a slice of a packed qkv.
    sums = x.unflatten(2, (counts.shape[1], region_size[1])).sum(3, dtype=accumulator(x.dtype))
    sums = sums.unflatten(1, (counts.shape[0], region_size[0])).sum(2)
    return (sums / counts).flatten(1, 2)


def _tokens(size: tuple[int, int], region_size: tuple[int, int], device: torch.device) -> Tensor:
    """(region rows, region columns, 1): the tokens of the map that lie in each region."""
    of_axis = []
    for length, region in zip(size, region_size, strict=True):
        starts = torch.arange(covering(length, region), device=device) * region
        of_axis.append((length - starts).clamp(max=region))
    return (of_axis[0][:, None] * of_axis[1])[..., None]


@lru_cache(maxsize=64)
def _cached_tokens(*key) -> Tensor:
    with torch.inference_mode(False):  # made first during inference, they must serve training too
        return _tokens(*key)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    region_size: SymSize,
    kv_region_size: SymSize | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every token to all tokens of the regions that its own region is routed to.

    Cost: H * W * topk * (tokens of a key region) * head_dim multiply-adds per head, twice. The tiled body may compute
    all logits and mask them, where copying the routed keys would cost more; it keeps no logits for the backward pass.

    Args:
        q: (B, H, W, heads, head_dim); strided views are fine.
        k: (B, Hk, Wk, heads, head_dim), as q's dtype and device.
        v: (B, Hk, Wk, heads, any width), q's dtype and device.
        routes: (B, regions, topk) int64, for every region of queries the regions of keys it sees; row-major, no
            repetitions in a row (`bi_level_routes` makes them).
        region_size: tokens of a query region, an int or (rows, columns); must divide (H, W).
        kv_region_size: tokens of a key region; must cut (Hk, Wk) into as many rows and columns of regions. region_size
            when None.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, width of v), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, a region size does not divide its map, or routes are out of
            range. Kernels do not raise for a route out of range: the results of its region are NaN.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, routes, region_size, kv_region_size, scale, impl)


def _check(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions) -> None:
    region_size, kv_region_size = regions.region_size, regions.of_keys
    if q.dim() != 5 or any(is_known(size < 1) for size in q.shape[1:]):
        raise ValueError(f"{OP}: q must be (B, H, W, heads, head_dim), none of the last four 0, got {tuple(q.shape)}")
    if k.dim() != 5 or differs((k.shape[0], *k.shape[3:]), (q.shape[0], *q.shape[3:])):
        raise ValueError(f"{OP}: k must be (B, Hk, Wk, heads, head_dim) as q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != 5 or differs(v.shape[:4], k.shape[:4]):
        raise ValueError(f"{OP}: v must be (B, Hk, Wk, heads, width) as k {tuple(k.shape)}, got {tuple(v.shape)}")
    check_alike(OP, q=q, k=k, v=v)
    check_at_least(OP, "region_size", region_size, 1)
    check_at_least(OP, "kv_region_size", kv_region_size, 1)
    for name, t, size in (("region_size", q, region_size), ("kv_region_size", k, kv_region_size)):
        if any(is_known(t.shape[1 + i] % size[i] != 0) for i in (0, 1)):
            raise ValueError(f"{OP}: {name} {tuple(size)} must divide the map {tuple(t.shape[1:3])}")
    grid, kv_grid = (
        tuple(t.shape[1 + i] // size[i] for i in (0, 1)) for t, size in ((q, region_size), (k, kv_region_size))
    )
    if differs(grid, kv_grid):
        raise ValueError(f"{OP}: kv_region_size must cut k into {grid} regions as q, got {kv_grid}")
    _check_routes(routes, q, grid[0] * grid[1])


def _check_routes(routes: Tensor, q: Tensor, regions: int) -> None:
    shape, topk = (q.shape[0], regions), routes.shape[-1]
    if routes.dim() != 3 or differs(routes.shape[:2], shape) or is_known(topk < 1) or is_known(topk > regions):
        wanted = f"(B = {q.shape[0]}, regions = {regions}, topk of 1 to {regions})"
        raise ValueError(f"{OP}: routes must be {wanted}, got {tuple(routes.shape)}")
    if routes.dtype != torch.int64 or routes.device != q.device:
        raise ValueError(f"{OP}: routes must be int64 on {q.device}, got {routes.dtype} on {routes.device}")
    readable = routes.device.type == "cpu" and not is_traced([routes]) and not under_transform([routes])
    if readable and routes.numel():
        low, high = (int(t) for t in routes.aminmax())
        if low < 0 or high >= regions:
            raise ValueError(f"{OP}: routes must be in 0 ... {regions - 1}, got {low} ... {high}")


def routed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, scale: float
) -> Tensor:
    """The definition: every region gathers its own keys, topk copies of k and v. float32 inside at least."""
    wide = accumulator(q.dtype)
    queries = split_windows(q.to(wide), regions.region_size)  # (B, heads, regions, T, d)
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    keys, values = (
        split_windows(x.to(wide), regions.of_keys).transpose(1, 2)[image, routes].transpose(2, 3).flatten(3, 4)
        for x in (k, v)
    )  # (B, regions, heads, topk * Tk, d)
    logits = torch.matmul(queries.transpose(1, 2) * scale, keys.mT)
    out = torch.matmul(logits.softmax(-1), values).transpose(1, 2)
    return merge_windows(out, (q.shape[1], q.shape[2]), regions.region_size).to(q.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Regions, scale: float) -> Tensor:
    from ..kernels.routed.forward import routed_attention as kernels  # here, so that CPU users need no Triton

    (rows, cols), of_keys = regions.region_size, regions.of_keys
    grid = [q.shape[1] // rows, q.shape[2] // cols]
    return kernels(q, k, v, routes, grid, [rows, cols], list(of_keys), scale)[0]


def _macs(q: Tensor, v: Tensor, routes: Tensor, regions: Regions) -> int:
    rows, cols = regions.of_keys
    return q[..., 0].numel() * routes.shape[2] * rows * cols * (q.shape[-1] + v.shape[-1])


declare(
    routed_attention,
    check=_check,
    reference=routed_attention_reference,
    tiled=routed_attention_tiled,
    graph=routed_attention_graph,
    fused=_fused,
    why_not_fused=why_no_attention_kernel,
    macs=_macs,
    bundles={"regions": Regions},
)
