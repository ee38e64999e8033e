"""Bi-level routing attention as modules: projections, padding and the local positional convolution around the op.

Paper      Zhu et al. 2023, arXiv:2303.08810 (BiFormer), section 3.2 and figure 3.
Semantics  those of the authors' code, in its two forms: on (B, H, W, C) maps, and a later one on (B, C, H, W) maps that
           pads in another way. Pooled keys, soft routing and narrow keys are options of their first form; no released
           model uses them.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_at_least
from .routed import bi_level_routes, routed_attention
from .tiling import crop, cut_regions, join_regions, larger, map_size, pad_to_windows, smaller

Routing = Literal["hard", "soft", "differentiable", "learned"]


def _check_layer(name: str, widths: list[int], heads: int, regions: int, topk: int) -> None:
    for width in widths:
        if heads < 1 or width % heads:
            raise ValueError(f"{name}: heads must divide dim {width}, got {heads}")
    check_at_least(name, "regions", [regions], 1)
    if not 1 <= topk <= regions * regions:
        raise ValueError(f"{name}: topk must be 1 to {regions * regions}, all regions, got {topk}")


class RegionPool(nn.Module):
    """Pool every region of a (B, H, W, C) map alone: to `size` tokens a side, or by windows of `stride` tokens.

    Args:
        kind: "avg" or "max".
        size: tokens a side that are left of a region (adaptive pooling).
        stride: side of the pooled windows, in tokens; what is left over at a region's edge is dropped.
    """

    def __init__(self, kind: Literal["avg", "max"], *, size: int | None = None, stride: int | None = None) -> None:
        super().__init__()
        if kind not in ("avg", "max"):
            raise ValueError(f"RegionPool: kind must be 'avg' or 'max', got {kind!r}")
        if (size is None) == (stride is None):
            raise ValueError(f"RegionPool: give one of size and stride, got size {size} and stride {stride}")
        for name, tokens in (("size", size), ("stride", stride)):
            if tokens is not None:
                check_at_least("RegionPool", name, [tokens], 1)
        self.average = kind == "avg"
        self.size = size or 0
        self.stride = stride or 0

    def pooled_size(self, region_size: list[int]) -> list[int]:
        """Tokens (rows, columns) that are left of a region."""
        if self.size > 0:
            return [self.size, self.size]
        if min(region_size) < self.stride:
            raise ValueError(f"RegionPool: regions of {region_size} tokens are smaller than the stride {self.stride}")
        return [region_size[0] // self.stride, region_size[1] // self.stride]

    def forward(self, x: Tensor, region_size: list[int]) -> Tensor:  # (B, H, W, C) -> (B, h, w, C)
        regions = cut_regions(x, region_size)
        batch, rows, cols = regions.shape[0], regions.shape[1], regions.shape[2]
        tiles = regions.flatten(0, 2).permute(0, 3, 1, 2)
        side = self.pooled_size(region_size)[0]
        if self.size > 0:
            tiles = F.adaptive_avg_pool2d(tiles, side) if self.average else F.adaptive_max_pool2d(tiles, side)
        else:
            tiles = F.avg_pool2d(tiles, self.stride) if self.average else F.max_pool2d(tiles, self.stride)
        return join_regions(tiles.permute(0, 2, 3, 1).unflatten(0, (batch, rows, cols)))

    def extra_repr(self) -> str:
        step = f"size={self.size}" if self.size > 0 else f"stride={self.stride}"
        return f"{'avg' if self.average else 'max'}, {step}"


class SoftRouter(nn.Module):
    """Routes, and for each the softmax of its routing logit among the regions that are kept.

    Args:
        dim: width of q and k.
        topk: regions to keep.
        scale: multiplies the routing logits.
        differentiable: let gradients of the weights flow into q and k.
        learned: project the regions' means first, those of q and k alike.
    """

    def __init__(
        self, dim: int, topk: int, scale: float, *, differentiable: bool, learned: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.topk = topk
        self.scale = scale
        self.differentiable = differentiable
        self.emb = nn.Linear(dim, dim, device=device, dtype=dtype) if learned else None

    def forward(self, q: Tensor, k: Tensor, region_size: list[int]) -> tuple[Tensor, Tensor]:
        """(B, H, W, dim) of q and k, which region_size divides -> routes and weights, both (B, regions, topk)."""
        q, k = cut_regions(q, region_size).mean((3, 4)), cut_regions(k, region_size).mean((3, 4))
        if not self.differentiable:
            q, k = q.detach(), k.detach()
        if self.emb is not None:
            q, k = self.emb(q), self.emb(k)
        logits = torch.matmul(q.flatten(1, 2) * self.scale, k.flatten(1, 2).transpose(1, 2))
        best, routes = logits.topk(self.topk, dim=-1)
        return routes, best.softmax(-1)


def weighted_regions(x: Tensor, routes: Tensor, weights: Tensor, region_size: list[int]) -> Tensor:
    """Gather the routed regions of (B, H, W, ...), each times its weight: (B, topk * H, W, ...), a copy.

    Region i of the answer holds what region i is routed to, `topk` regions of `region_size` one below the other.
    """
    regions = cut_regions(x, region_size)
    rows, cols = regions.shape[1], regions.shape[2]
    image = torch.arange(x.shape[0], device=x.device)[:, None, None]
    picked = regions.flatten(1, 2)[image, routes]  # (B, regions, topk, rows, columns, ...)
    picked = picked * weights.to(x.dtype)[:, :, :, None, None, None, None]
    return join_regions(picked.unflatten(1, (rows, cols)).flatten(3, 4))


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
        qk_dim: width of q and k, all heads together; dim when None.
        lepe_kernel: taps a side of the depthwise convolution of v that is added to the output, odd; 0: none.
        qkv_bias: give the qkv projection a bias.
        out_proj: project the output.
        scale: multiplies the logits, the routing ones too; qk_dim ** -0.5 when None, of the whole width, as in the
            released models.
        kv_pool: pools keys and values inside their regions, after the projection; routes and the positional
            convolution are made of what it is given.
        routing: "hard", as in the released models. Else keys and values of a region are multiplied by the softmax of
            the kept routing logits, at the cost of topk copies: "soft" takes that as a constant, "differentiable" lets
            its gradient through, "learned" also projects the means that it is made of.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        regions: int = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        lepe_kernel: int = 5,
        qkv_bias: bool = True,
        out_proj: bool = True,
        scale: float | None = None,
        kv_pool: RegionPool | None = None,
        routing: Routing = "hard",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.qk_head_dim = None if qk_dim is None else qk_dim // max(heads, 1)  # None: as that of v
        qk_dim = dim if qk_dim is None else qk_dim
        _check_layer("BiLevelRoutingAttention", [dim, qk_dim], heads, regions, topk)
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.regions = regions
        self.topk = topk
        self.scale = qk_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, bias=qkv_bias, **dd)
        self.lepe = lepe(dim, lepe_kernel, **dd)
        self.proj = nn.Linear(dim, dim, **dd) if out_proj else nn.Identity()
        self.kv_pool = kv_pool
        if routing not in (names := get_args(Routing)):
            raise ValueError(f"BiLevelRoutingAttention: routing must be one of {names}, got {routing!r}")
        gradient = {"differentiable": routing != "soft", "learned": routing == "learned"}
        self.router = None if routing == "hard" else SoftRouter(qk_dim, topk, self.scale, **gradient, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        height, width = map_size(x)
        x = pad_to_windows(x, [self.regions, self.regions])
        rows, cols = map_size(x)
        region_size = [rows // self.regions, cols // self.regions]
        qkv = self.qkv(x)
        qk_dim = qkv.shape[3] // 3 if self.qk_head_dim is None else self.heads * self.qk_head_dim
        q, k, v = qkv.split([qk_dim, qk_dim, qkv.shape[3] - 2 * qk_dim], dim=-1)
        out = self.attend(q, k, v, region_size)
        if self.lepe is not None:
            out = out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return crop(self.proj(out), height, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, region_size: list[int]) -> Tensor:  # (B, H, W, width) each
        """Route regions and attend, without projections; returns (B, H, W, C)."""
        keys, values, kv_region_size = k, v, region_size
        if self.kv_pool is not None:
            kv_region_size = self.kv_pool.pooled_size(region_size)
            keys, values = self.kv_pool(k, region_size), self.kv_pool(v, region_size)
        queries, keys, values = [t.unflatten(-1, (self.heads, -1)) for t in (q, keys, values)]
        if self.router is None:
            routes = bi_level_routes(q, k, region_size=region_size, topk=self.topk)
        else:
            routes, weights = self.router(q, k, region_size)
            keys = weighted_regions(keys, routes, weights, kv_region_size)
            values = weighted_regions(values, routes, weights, kv_region_size)
            kv_region_size = [self.topk * kv_region_size[0], kv_region_size[1]]
            routes = torch.arange(routes.shape[1], device=q.device)[None, :, None].expand(q.shape[0], -1, -1)
        return routed_attention(
            queries, keys, values, routes, region_size=region_size, kv_region_size=kv_region_size, scale=self.scale
        ).flatten(3)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, regions={self.regions}, topk={self.topk}"


class BiLevelRoutingAttentionNchw(nn.Module):
    """The authors' later form, on (B, C, H, W) maps: it differs where `regions` does not divide the map.

    Regions are max(1, side // regions) tokens a side, so there can be more than `regions` of them. q, k and v are
    padded right and bottom with zeros AFTER the projection: padded keys take part with logit 0 and value 0, means are
    over real tokens, and the positional convolution sees the map as it is. On maps with fewer regions than topk all are
    seen (the authors' code fails there).

    Args: as those of `BiLevelRoutingAttention` of the same name.
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
        _check_layer("BiLevelRoutingAttentionNchw", [dim], heads, regions, topk)
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.regions = regions
        self.topk = topk
        self.scale = dim**-0.5 if scale is None else scale
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias, **dd)
        self.lepe = lepe(dim, lepe_kernel, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        q, k, v = self.qkv(x).permute(0, 2, 3, 1).chunk(3, dim=-1)
        height, width = map_size(q)
        region_size = [larger(height // self.regions, 1), larger(width // self.regions, 1)]
        padded = [pad_to_windows(t, region_size) for t in (q, k, v)]
        rows, cols = map_size(padded[0])
        regions = (rows // region_size[0]) * (cols // region_size[1])
        routes = bi_level_routes(q, k, region_size=region_size, topk=smaller(self.topk, regions))
        heads = [t.unflatten(-1, (self.heads, -1)) for t in padded]
        out = routed_attention(heads[0], heads[1], heads[2], routes, region_size=region_size, scale=self.scale)
        out = crop(out.flatten(3), height, width).permute(0, 3, 1, 2)
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
