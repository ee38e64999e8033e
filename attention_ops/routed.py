"""Bi-level routing attention: every region of queries sees the tokens of the few regions that it is routed to.

Paper      Zhu et al. 2023, arXiv:2303.08810 (BiFormer), section 3.2.
Semantics  those of the authors' released models: routes come from region means of q and k over all heads at once, with
           no gradient; heads share the routes. The scale of the paper's models is dim ** -0.5, of the whole width.
We differ  soft routing and the authors' ways of pooling keys are not here (no released model uses them);
           `kv_region_size` serves callers who pool keys themselves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import tiled_attention as tiles
from ._autocast import cast_for_autocast, no_autocast
from ._checks import check_at_least, pair
from ._choice import Impl, choose
from .tiling import merge_windows, pad_to_windows, split_windows

OP = "routed_attention"


def bi_level_routes(q: Tensor, k: Tensor, *, region_size: int | Sequence[int], topk: int) -> Tensor:
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
    return torch.ops.foveate.bi_level_routes(q, k, pair("bi_level_routes", "region_size", region_size), topk)


torch.library.define("foveate::bi_level_routes", "(Tensor q, Tensor k, SymInt[2] region_size, SymInt topk) -> Tensor")


@torch.library.impl("foveate::bi_level_routes", "CompositeImplicitAutograd")
def _bi_level_routes(q: Tensor, k: Tensor, region_size: list[int], topk: int) -> Tensor:
    if q.dim() not in (4, 5) or q.shape != k.shape:
        raise ValueError(
            f"bi_level_routes: q and k must be (B, H, W, heads, head_dim) or (B, H, W, C) of one shape, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check_at_least("bi_level_routes", "region_size", region_size, 1)
    check_at_least("bi_level_routes", "topk", [topk], 1)
    with torch.no_grad(), no_autocast(q):
        means_q, means_k = (_region_means(x.detach().flatten(3), region_size) for x in (q, k))
        if topk > means_q.shape[1]:
            raise ValueError(f"bi_level_routes: topk must be at most the {means_q.shape[1]} regions, got {topk}")
        return torch.matmul(means_q, means_k.mT).topk(topk).indices


def _region_means(x: Tensor, region_size: list[int]) -> Tensor:
    """(B, H, W, C) -> (B, regions, C), float32 at least."""
    # One pass over a channels-last map: 5 to 10 times as fast as a mean over two axes of the cut map.
    x = x.to(tiles.accumulator(x.dtype)).permute(0, 3, 1, 2)
    return F.avg_pool2d(x, region_size, region_size, ceil_mode=True, count_include_pad=False).flatten(2).mT


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every token to all tokens of the regions that its own region is routed to.

    Cost: H * W * topk * (tokens of a key region) * head_dim multiply-adds per head, twice. The tiled body may compute
    all logits and mask them, where copying the routed keys would cost more; it keeps no logits for the backward pass.

    Args:
        q: (B, H, W, heads, head_dim); strided views are fine.
        k: (B, Hk, Wk, heads, head_dim), as q's dtype and device.
        v: (B, Hk, Wk, heads, any width), likewise.
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
            range (looked at on a CPU only, where it costs nothing).
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    region_size = pair(OP, "region_size", region_size)
    kv_region_size = region_size if kv_region_size is None else pair(OP, "kv_region_size", kv_region_size)
    impl = Impl(impl).value if isinstance(impl, Impl) else impl
    return torch.ops.foveate.routed_attention(q, k, v, routes, region_size, kv_region_size, scale, impl)


torch.library.define(
    "foveate::routed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor routes, SymInt[2] region_size, SymInt[2] kv_region_size, "
    "float? scale=None, str impl='auto') -> Tensor",
)


# CompositeImplicitAutograd: tracers see through to torch ops on a CPU, so backward, export and ONNX need nothing more.
@torch.library.impl("foveate::routed_attention", "CompositeImplicitAutograd")
def _routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    region_size: list[int],
    kv_region_size: list[int],
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    _check(q, k, v, routes, region_size, kv_region_size)
    run = choose(OP, impl, why_not_fused(q))
    q, k, v = cast_for_autocast(q, k, v)
    body = routed_attention_reference if run is Impl.REFERENCE else routed_attention_tiled
    plan = RegionPlan(tuple(region_size), tuple(kv_region_size), q.shape[-1] ** -0.5 if scale is None else scale)
    with no_autocast(q):
        return body(q, k, v, routes, plan)


def why_not_fused(q: Tensor) -> str | None:
    """Return the reason why no fused kernel can run on these tensors, or None."""
    return "routed attention has no Triton kernel in this version"


def _check(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region_size: list[int], kv_region_size: list[int]) -> None:
    if q.dim() != 5 or min(q.shape[1:]) < 1:
        raise ValueError(f"{OP}: q must be (B, H, W, heads, head_dim), none of the last four 0, got {tuple(q.shape)}")
    if k.dim() != 5 or (k.shape[0], *k.shape[3:]) != (q.shape[0], *q.shape[3:]):
        raise ValueError(f"{OP}: k must be (B, Hk, Wk, heads, head_dim) as q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != 5 or v.shape[:4] != k.shape[:4]:
        raise ValueError(f"{OP}: v must be (B, Hk, Wk, heads, width) as k {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{OP}: {name} must be {q.dtype} on {q.device} as q, got {t.dtype} on {t.device}")
    if not q.is_floating_point():
        raise ValueError(f"{OP}: q, k, v must be floating point, got {q.dtype}")
    check_at_least(OP, "region_size", region_size, 1)
    check_at_least(OP, "kv_region_size", kv_region_size, 1)
    for name, t, size in (("region_size", q, region_size), ("kv_region_size", k, kv_region_size)):
        if t.shape[1] % size[0] or t.shape[2] % size[1]:
            raise ValueError(f"{OP}: {name} {tuple(size)} must divide the map {tuple(t.shape[1:3])}")
    grid, kv_grid = (
        tuple(t.shape[1 + i] // size[i] for i in (0, 1)) for t, size in ((q, region_size), (k, kv_region_size))
    )
    if grid != kv_grid:
        raise ValueError(f"{OP}: kv_region_size must cut k into {grid} regions as q, got {kv_grid}")
    _check_routes(routes, q, grid[0] * grid[1])


def _check_routes(routes: Tensor, q: Tensor, regions: int) -> None:
    if routes.dim() != 3 or tuple(routes.shape[:2]) != (q.shape[0], regions) or not 1 <= routes.shape[2] <= regions:
        wanted = f"(B = {q.shape[0]}, regions = {regions}, topk of 1 to {regions})"
        raise ValueError(f"{OP}: routes must be {wanted}, got {tuple(routes.shape)}")
    if routes.dtype != torch.int64 or routes.device != q.device:
        raise ValueError(f"{OP}: routes must be int64 on {q.device}, got {routes.dtype} on {routes.device}")
    if type(routes) is Tensor and routes.device.type == "cpu" and routes.numel():
        low, high = (int(t) for t in routes.aminmax())
        if low < 0 or high >= regions:
            raise ValueError(f"{OP}: routes must be in 0 ... {regions - 1}, got {low} ... {high}")


@dataclass(frozen=True)
class RegionPlan:
    """How maps are cut, in tokens, and the scale of the logits."""

    region: tuple[int, int]
    kv_region: tuple[int, int]
    scale: float


def routed_attention_reference(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """The definition: every region gathers its own keys, topk copies of k and v. float32 inside at least."""
    wide = tiles.accumulator(q.dtype)
    queries = split_windows(q.to(wide), plan.region)  # (B, heads, regions, T, d)
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    keys, values = (
        split_windows(x.to(wide), plan.kv_region).transpose(1, 2)[image, routes].transpose(2, 3).flatten(3, 4)
        for x in (k, v)
    )  # (B, regions, heads, topk * Tk, d)
    logits = torch.matmul(queries.transpose(1, 2) * plan.scale, keys.mT)
    out = torch.matmul(logits.softmax(-1), values).transpose(1, 2)
    return merge_windows(out, (q.shape[1], q.shape[2]), plan.region).to(q.dtype)


def routed_attention_tiled(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """SDPA over copies of the routed keys, or over all keys with a mask, whichever is cheaper; images in chunks."""
    if type(q) is not Tensor:  # a compiler or exporter is tracing: give it plain differentiable ops
        return _attend(q, k, v, routes, plan)
    return _RoutedAttention.apply(q, k, v, routes, plan)


# Copying a key costs as much as so many logits; see neighborhood_tiled.py for how the figure came about.
LOGITS_PER_KEY = 45


def masking_is_cheaper(q: Tensor, k: Tensor, routes: Tensor, plan: RegionPlan) -> bool:
    """Say whether all logits of a region cost less than the copy of its routed keys and their logits."""
    queries, keys = plan.region[0] * plan.region[1], plan.kv_region[0] * plan.kv_region[1]
    return queries * k.shape[1] * k.shape[2] <= routes.shape[2] * keys * (queries + LOGITS_PER_KEY)


def _attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    attend = _attend_masked if masking_is_cheaper(q, k, routes, plan) else _attend_copied
    return attend(q, k, v, routes, plan)


def _attend_copied(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    batch, height, width, heads, _ = q.shape
    regions = routes.shape[1]
    first = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * regions
    index = (routes[:, None] + first).flatten()
    queries = split_windows(q, plan.region).flatten(1, 2)  # (B, heads * regions, T, d)
    keys, values = (
        split_windows(x, plan.kv_region)
        .reshape(batch * heads * regions, -1)
        .index_select(0, index)
        .view(batch, heads * regions, -1, x.shape[-1])
        for x in (k, v)
    )
    out = F.scaled_dot_product_attention(queries, keys, values, scale=plan.scale)
    return merge_windows(out.unflatten(1, (heads, regions)), (height, width), plan.region)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    height, width = q.shape[1:3]
    mask = _token_mask(q, routes, plan)
    maps = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, d), views
    out = F.scaled_dot_product_attention(*maps, attn_mask=mask, scale=plan.scale)
    return out.transpose(1, 2).unflatten(1, (height, width))


def _token_mask(q: Tensor, routes: Tensor, plan: RegionPlan) -> Tensor:
    """(B, 1, query tokens, key tokens), 0 where a query sees a key and -inf elsewhere; tokens in the maps' order."""
    batch, regions, _ = routes.shape
    (rows, cols), (kv_rows, kv_cols) = plan.region, plan.kv_region
    grid = (q.shape[1] // rows, q.shape[2] // cols)
    mask = torch.full((batch, regions, regions), -torch.inf, dtype=tiles.accumulator(q.dtype), device=q.device)
    mask = mask.scatter(2, routes, 0.0).view(batch, grid[0], 1, grid[1], 1, grid[0], 1, grid[1], 1)
    mask = mask.expand(-1, -1, rows, -1, cols, -1, kv_rows, -1, kv_cols)
    return mask.reshape(batch, 1, regions * rows * cols, regions * kv_rows * kv_cols)


def _chunks(q: Tensor, k: Tensor, routes: Tensor, plan: RegionPlan) -> Iterator[slice]:
    """Cut the batch so that one chunk's logits fit the tiled body's budget a thread."""
    keys = routes.shape[2] * plan.kv_region[0] * plan.kv_region[1]
    if masking_is_cheaper(q, k, routes, plan):
        keys = k.shape[1] * k.shape[2]
    per_image = q.shape[1] * q.shape[2] * q.shape[3] * keys
    step = max(1, torch.get_num_threads() * tiles.CHUNK_LOGITS // per_image)
    for start in range(0, q.shape[0], step):
        yield slice(start, start + step)


class _RoutedAttention(torch.autograd.Function):
    """Keeps its inputs alone; the backward pass attends once more, chunk by chunk, and differentiates that."""

    @staticmethod
    def forward(ctx, q, k, v, routes, plan):
        ctx.save_for_backward(q, k, v, routes)
        ctx.plan = plan
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        for part in _chunks(q, k, routes, plan):
            out[part] = _attend(q[part], k[part], v[part], routes[part], plan)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        *inputs, routes = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for part in _chunks(inputs[0], inputs[1], routes, ctx.plan):
            with torch.enable_grad(), no_autocast(grad_out):
                leaves = [x[part].detach().requires_grad_() for x in inputs]
                out = _attend(*leaves, routes[part], ctx.plan)
            for grad, value in zip(grads, torch.autograd.grad(out, leaves, grad_out[part]), strict=True):
                grad[part] = value
        return *grads, None, None


def _check_layer(name: str, dim: int, heads: int, regions: int, topk: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: heads must divide dim {dim}, got {heads}")
    check_at_least(name, "regions", [regions], 1)
    if not 1 <= topk <= regions * regions:
        raise ValueError(f"{name}: topk must be 1 to {regions * regions}, all regions, got {topk}")


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention with its projections, on channels-last maps (figure 3 of arXiv:2303.08810).

    A map that `regions` does not divide is padded right and bottom with zeros BEFORE the qkv projection, as by the
    authors' `auto_pad`: padded tokens carry the qkv bias, count in the means, are attended and lie next to the border
    for the local positional convolution; the output is cropped.

    Args:
        dim: channels; heads must divide it.
        heads: number of heads.
        regions: regions a side of the map, whatever its size.
        topk: regions that a region sees.
        lepe_kernel: taps a side of the depthwise convolution of v that is added to the output, odd; 0: none.
        qkv_bias: give the qkv projection a bias.
        scale: multiplies the logits; dim ** -0.5 when None, of the whole width, as in the released models.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        regions: int = 7,
        topk: int = 4,
        *,
        lepe_kernel: int = 5,
        qkv_bias: bool = True,
        scale: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _check_layer("BiLevelRoutingAttention", dim, heads, regions, topk)
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.regions = regions
        self.topk = topk
        self.scale = dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = lepe(dim, lepe_kernel, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        height, width = x.shape[1], x.shape[2]
        x = pad_to_windows(x, [self.regions, self.regions])
        region_size = [x.shape[1] // self.regions, x.shape[2] // self.regions]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        routes = torch.ops.foveate.bi_level_routes(q, k, region_size, self.topk)
        heads = [t.unflatten(-1, (self.heads, -1)) for t in (q, k, v)]
        out = torch.ops.foveate.routed_attention(
            heads[0], heads[1], heads[2], routes, region_size, region_size, self.scale, "auto"
        ).flatten(3)
        if self.lepe is not None:
            out = out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)[:, :height, :width]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, regions={self.regions}, topk={self.topk}"


class BiLevelRoutingAttentionNchw(nn.Module):
    """The authors' later form, on (B, C, H, W) maps: it differs where `regions` does not divide the map.

    Regions are max(1, side // regions) tokens a side, so there can be more than `regions` of them. q, k and v are
    padded right and bottom with zeros AFTER the projection: padded keys take part with logit 0 and value 0, means are
    over real tokens, and the positional convolution sees the map as it is. On maps with fewer regions than topk all are
    seen (the authors' code fails there).

    Args: as of `BiLevelRoutingAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        regions: int = 7,
        topk: int = 4,
        *,
        lepe_kernel: int = 5,
        qkv_bias: bool = True,
        scale: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _check_layer("BiLevelRoutingAttentionNchw", dim, heads, regions, topk)
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.regions = regions
        self.topk = topk
        self.scale = dim**-0.5 if scale is None else scale
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias, **dd)
        self.lepe = lepe(dim, lepe_kernel, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        height, width = x.shape[2], x.shape[3]
        region_size = [max(height // self.regions, 1), max(width // self.regions, 1)]
        qkv = self.qkv(x)
        q, k, v = qkv.permute(0, 2, 3, 1).chunk(3, dim=-1)
        padded = [pad_to_windows(t, region_size) for t in (q, k, v)]
        regions = (padded[0].shape[1] // region_size[0]) * (padded[0].shape[2] // region_size[1])
        routes = torch.ops.foveate.bi_level_routes(q, k, region_size, min(self.topk, regions))
        heads = [t.unflatten(-1, (self.heads, -1)) for t in padded]
        out = torch.ops.foveate.routed_attention(
            heads[0], heads[1], heads[2], routes, region_size, region_size, self.scale, "auto"
        )
        out = out.flatten(3)[:, :height, :width].permute(0, 3, 1, 2)
        if self.lepe is not None:
            out = out + self.lepe(v.permute(0, 3, 1, 2))
        return self.proj(out)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, regions={self.regions}, topk={self.topk}"


def lepe(dim: int, kernel_size: int, **dd) -> nn.Conv2d | None:
    """Local enhanced positional encoding (arXiv:2107.00652): a depthwise convolution that keeps the size; 0: none."""
    if kernel_size == 0:
        return None
    if kernel_size < 0 or kernel_size % 2 == 0:
        raise ValueError(f"lepe: kernel_size must be odd, or 0 for none, got {kernel_size}")
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
