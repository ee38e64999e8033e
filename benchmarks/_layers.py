"""Attention layers of published models, and calls of their kernels without autograd, on meta tensors or on a GPU."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import body_of
from ..kernels.local import launch as local
from ..kernels.local.plan import Pattern
from ..kernels.routed import backward as routed_backward
from ..kernels.routed import forward as routed
from ..kernels.routed.plan import Regions

Pair = tuple[int, int]


@dataclass(frozen=True)
class LocalLayer:
    """Neighborhoods, windows, halos or circles; `table`: "rpb", "bias", "relative" or ""."""

    name: str
    pattern: Pattern
    size: Pair  # of the map, tokens
    heads: int
    dim: int  # of a head
    table: str = ""

    def useful(self) -> float:
        """Return how many keys a query sees, on average over the map; the zeros of a halo count."""
        return math.prod(self._seen(i) for i in (0, 1)) if self.pattern.kind != "circle" else self._seen_in_circle()

    def _seen(self, i: int) -> float:
        reach = self.pattern.reach[i] if self.pattern.kind == "block" else 0
        return self.pattern.keys[i] + 2 * reach

    def _seen_in_circle(self) -> float:
        rows, cols = (torch.arange(n)[:, None] - torch.arange(n) for n in self.size)
        apart = rows.square()[:, None, :, None] + cols.square()[None, :, None, :]
        return float((apart < self.pattern.keys[0] ** 2).sum()) / math.prod(self.size)

    def run(self, batch: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Launch the kernels of a forward pass and of a backward pass with all gradients."""
        q, k, v = _packed(self, batch, device, dtype).unbind(3)
        tables = self._tables(device)
        call = (*local.fields(self.pattern), self.dim**-0.5)
        out, lse = body_of(local._forward)(q, k, v, *tables, *call)
        biased = tables[0] is not None
        body_of(local._backward)(q, k, v, *tables, out, lse, torch.ones_like(out), None, biased, *call)

    def _tables(self, device: str) -> list[Tensor | None]:
        rows, cols = self.pattern.keys
        if self.table == "rpb":
            return [torch.zeros(self.heads, 2 * rows - 1, 2 * cols - 1, device=device), None, None]
        if self.table == "bias":
            return [torch.zeros(self.heads, rows * cols, rows * cols, device=device), None, None]
        if self.table == "relative":
            windows = [size + 2 * reach for size, reach in zip(self.pattern.keys, self.pattern.reach, strict=True)]
            return [None, *(torch.zeros(2 * window - 1, self.dim, device=device) for window in windows)]
        return [None, None, None]


@dataclass(frozen=True)
class RoutedLayer:
    """Bi-level routing: every region sees `topk` regions."""

    name: str
    size: Pair
    region: Pair
    heads: int
    dim: int
    topk: int

    @property
    def cut(self) -> Regions:
        grid = (self.size[0] // self.region[0], self.size[1] // self.region[1])
        return Regions(grid, self.region, self.region)

    def useful(self) -> float:
        return self.topk * math.prod(self.region)

    def run(self, batch: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Launch the kernels of a forward pass and of a backward pass."""
        q, k, v = _packed(self, batch, device, dtype).unbind(3)
        cut = self.cut
        routes = torch.empty(batch, cut.count, self.topk, dtype=torch.int64, device=device)
        if device != "meta":
            routes = torch.rand(batch, cut.count, cut.count, device=device).topk(self.topk).indices
        call = (list(cut.grid), list(cut.query), list(cut.key), 1.0)
        out, lse = (q.new_empty(q.shape), q.new_empty(batch, self.heads, cut.count, cut.queries, dtype=torch.float32))
        routed.launch_forward(q, k, v, routes, out, lse, cut, 1.0)
        body_of(routed_backward.routed_attention_backward)(q, k, v, routes, out, lse, torch.ones_like(out), *call)


def _packed(layer: LocalLayer | RoutedLayer, batch: int, device: str, dtype: torch.dtype) -> Tensor:
    shape = (batch, *layer.size, 3, layer.heads, layer.dim)
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def _square(side: int) -> Pair:
    return side, side


def _nat(model: str, side: int, heads: int, dilation: int = 1) -> LocalLayer:
    words = f" dil {dilation}" if dilation > 1 else ""
    pattern = Pattern("neighborhood", _square(7), dilation=_square(dilation))
    return LocalLayer(f"{model} {side}x{side} x{heads}{words}", pattern, _square(side), heads, 32, "rpb")


def _windows(model: str, side: int, heads: int, window: int, table: str = "") -> LocalLayer:
    name = f"{model} {side}x{side} x{heads} win {window}"
    return LocalLayer(name, Pattern("block", _square(window)), _square(side), heads, 32, table)


def _halo(model: str, side: int, heads: int, dim: int) -> LocalLayer:
    pattern = Pattern("block", _square(8), _square(3))
    return LocalLayer(f"{model} {side}x{side} x{heads} 8+3", pattern, _square(side), heads, dim, "relative")


def _routed(side: int, heads: int, region: int, topk: int) -> RoutedLayer:
    name = f"BiFormer {side}x{side} x{heads} top {topk}"
    return RoutedLayer(name, _square(side), _square(region), heads, 32, topk)


# 224 px, but HaloNet 256 px and CLEAR 512 px; "512": detection and segmentation
LAYERS: tuple[LocalLayer | RoutedLayer, ...] = (
    *(_nat("NAT-T", side, heads) for side, heads in ((56, 2), (28, 4), (14, 8), (7, 16))),
    *(_nat("DiNAT-T", 56 // step, 2 * step, 8 // step) for step in (1, 2, 4)),
    *(_windows("DaViT-T", 56 // step, 3 * step, 7) for step in (1, 2, 4, 8)),
    *(_windows("Swin-T", 56 // step, 3 * step, 7, "bias") for step in (1, 2, 4, 8)),
    _windows("LITv2-S", 14, 2, 2),
    *(_halo("HaloNet-H1", side, heads, dim) for side, heads, dim in ((64, 4, 16), (32, 8, 16), (16, 8, 32))),
    LocalLayer("CLEAR 64x64 x4 r 8", Pattern("circle", _square(8), _square(7)), _square(64), 4, 64),
    *(_routed(*one) for one in ((56, 2, 8, 1), (28, 4, 4, 4), (14, 8, 2, 16))),
    _nat("NAT-T 512", 128, 2),
    _nat("DiNAT-T 512", 128, 2, 16),
    _windows("DaViT-T 512", 133, 3, 7),
    _windows("Swin-T 512", 133, 3, 7, "bias"),
)
