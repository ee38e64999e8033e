"""The interval picture of the local kernels, by the functions that the kernels' launchers use."""

import torch
from panels import Panel
from torch import Tensor

from foveate.kernels.local.plan import Axis

LENGTH, TILE = 14, 4
LABELS = ("key", "query")
INVERSE = ("query", "key")


def axis(kind: str = "neighborhood", keys: int = 5, **options) -> Axis:
    """Return one axis of a kernel; `keys` is the kernel size, the keys of a block, or the radius."""
    settings = {"reach": 0, "queries": 0, "causal": False, "inverse": False, **options}
    return Axis(kind, keys, tile=TILE, step=TILE, walk=TILE, walk_split=1, walk_step=TILE, walks=4, **settings)


def intervals(of: Axis, length: int = LENGTH) -> Tensor:
    """Return (owners, walked) of 0 and 1: the interval that every owner sees, cut at the ends of the map."""
    seen = torch.zeros(length, length)
    for owner in range(length):
        low, high = of.interval(owner, length)
        seen[owner, max(low, 0) : min(high, length)] = 1
    return seen


def walked(of: Axis, length: int = LENGTH) -> Tensor:
    """Return the same, with 0.35 where a tile of owners walks over a token that the owner does not see."""
    picture = intervals(of, length)
    for tile in range(of.tiles(length)):
        _, first, past = of.owned(tile, length)
        begin, end = of.walked(tile, length, length)
        rows = picture[first:past, max(begin, 0) : min(end, length)]
        rows[rows == 0] = 0.35
    return picture


def per_query() -> list[Panel]:
    return [
        Panel("neighborhood, kernel 5", intervals(axis()), labels=LABELS),
        Panel("causal", intervals(axis(causal=True)), labels=LABELS),
        Panel("stride 2", intervals(axis(stride=2)), labels=LABELS),
        Panel("blocks of 4, halo 1", intervals(axis("block", 4, queries=4, reach=1)), labels=LABELS),
        Panel("circle, radius 3", intervals(axis("circle", 3, reach=2)), labels=LABELS),
    ]


def tiles() -> list[Panel]:
    grid = (TILE, LENGTH)
    return [
        Panel("forward and dq: a tile of queries", walked(axis()), labels=LABELS, cell=grid),
        Panel("dk, dv: a tile of keys", walked(axis(inverse=True)), labels=INVERSE, cell=grid),
        Panel("dk, dv, causal", walked(axis(causal=True, inverse=True)), labels=INVERSE, cell=grid),
    ]
