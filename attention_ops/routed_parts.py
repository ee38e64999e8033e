"""How the bodies of routed attention cut maps into regions, and batches into parts."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .tiling import boxes, by_region


@dataclass(frozen=True)
class RegionPlan:
    """How maps are cut, in tokens, and the scale of the logits."""

    region: tuple[int, int]
    kv_region: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class Part:
    """Some images, all their queries; or one image, the queries of a rectangle of regions. All keys in both cases."""

    images: slice
    rows: slice  # of regions
    cols: slice

    @property
    def place(self) -> tuple[slice, slice, slice]:
        return self.images, self.rows, self.cols

    def of(self, x: Tensor, plan: RegionPlan) -> Tensor:
        """(B, H, W, heads, d) -> this part's queries, seen as by `by_region`."""
        return by_region(x, plan.region)[self.images, self.rows, :, self.cols]

    def routes(self, routes: Tensor, q: Tensor, plan: RegionPlan) -> Tensor:
        return routes.unflatten(1, (q.shape[1] // plan.region[0], -1))[self.images, self.rows, self.cols].flatten(1, 2)


def cut_into_parts(q: Tensor, plan: RegionPlan, regions: int) -> Iterator[Part]:
    """Cut the batch, and large images too, so that a part has at most so many regions (1 if that is below 1)."""
    counts = q.shape[0], q.shape[1] // plan.region[0], q.shape[2] // plan.region[1]
    for box in boxes(counts, regions):
        yield Part(*box)
