"""How the bias gradient's work is shared out among programs: pure Python, no Triton.

A program sums the logit gradients of tiles that read the same biases: their walked tokens begin at one distance from
them. So it is with all tiles of an axis but a few at its borders. A slot is a set of such tiles: each border tile is
one, those between are dealt out to `middle` slots. intervals.py computes the tiles of a slot on the GPU.
"""

import math
from itertools import product
from typing import NamedTuple

from .plan import Axis, Pattern, Plan

PROGRAMS = 1024  # of one launch: a few waves on a large GPU, and few enough partial sums (estimated)


class Slots(NamedTuple):
    """The tiles of one axis in the dilation groups of one length; a kernel's arguments."""

    left: int  # tiles before the middle
    middle: int  # slots of the middle
    right: int  # first tile past the middle
    tiles: int

    @property
    def total(self) -> int:
        return self.left + self.middle + self.tiles - self.right

    def of(self, slot: int) -> range:
        """Return the tiles of a slot."""
        if slot < self.left + self.middle:
            return range(slot, self.right, self.middle) if slot >= self.left else range(slot, slot + 1)
        tile = slot - self.left - self.middle + self.right
        return range(tile, tile + 1)


class Shares(NamedTuple):
    """Slots of both axes, as (long groups, short groups), and among how many programs the images are shared."""

    rows: tuple[Slots, Slots]
    cols: tuple[Slots, Slots]
    images: int

    @property
    def numbers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of rows and of columns, as kernels take them."""
        return self.rows[0] + self.rows[1], self.cols[0] + self.cols[1]

    @property
    def works(self) -> int:
        return math.prod(long.total + short.total for long, short in (self.rows, self.cols)) * self.images


def groups_of(length: int, dilation: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (groups, their tokens) for the long dilation groups of an axis, then for those of one token less."""
    longest, short = -(-length // dilation), -length % dilation
    return (dilation - short, longest), (short, longest - 1)


def distances(axis: Axis, owners: int, walked: int) -> list[int]:
    """Return the first walked token of every tile, counted from the tile's start."""
    starts = [axis.owned(tile, owners)[0] for tile in range(axis.tiles(owners))]
    return [axis.interval(max(start, 0), walked)[0] - start for start in starts]


def middle_of(distances: list[int], period: int) -> tuple[int, int]:
    """Return the longest run [left, right) of tiles whose distances repeat with this period."""
    best, left = (0, min(period, len(distances))), 0
    for tile in range(period, len(distances)):
        if distances[tile] != distances[tile - period]:
            left = tile - period + 1
        best = max(best, (left, tile + 1), key=lambda run: run[1] - run[0])
    return best


class Run(NamedTuple):
    """The tiles of one axis in `groups` dilation groups of one length; `middle` tiles repeat with `period`."""

    groups: int
    left: int
    right: int
    tiles: int
    period: int

    def dealt(self, each: int) -> Slots:
        """Return slots of at most about so many tiles."""
        middle = -(-(self.right - self.left) // each)
        if each > 1:
            middle = min(-(-middle // self.period) * self.period, self.right - self.left)
        return Slots(self.left, middle, self.right, self.tiles)


def run(axis: Axis, groups: int, length: int) -> Run:
    """Return the tiles of an axis in groups of this length."""
    if groups == 0:
        return Run(0, 0, 0, 0, 1)
    found = distances(axis, length, length)
    return Run(groups, *middle_of(found, axis.period), len(found), axis.period)


def share_out(pattern: Pattern, plan: Plan, size: tuple[int, int], images: int, works: int) -> Shares:
    """Share (image, tile) pairs out to `works` works at most (more only where borders have more tiles).

    Args:
        size: of the map of queries and of that of keys, (rows, columns).
    """
    found = [
        [run(axis, *groups) for groups in groups_of(length, step)]
        for axis, length, step in zip((plan.rows, plan.cols), size, pattern.dilation, strict=True)
    ]
    options = (
        Shares(rows, cols, max(min(images, works // max(rows_and_cols, 1)), 1))
        for (rows, of_rows), (cols, of_cols) in product(*(_dealt(runs) for runs in found))
        if (rows_and_cols := of_rows * of_cols)
    )
    return min(options, key=lambda shares: (max(shares.works, works), _longest(shares, found, images)))


def _dealt(runs: list[Run]) -> list[tuple[tuple[Slots, Slots], int]]:
    """Return the ways to deal out an axis, with the number of slots: by one tile, two, ... and all in one slot."""
    longest = max(run.right - run.left for run in runs)
    each = {-(-longest // slots): slots for slots in range(longest, 0, -1)} or {1: 0}
    dealt = [(runs[0].dealt(tiles), runs[1].dealt(tiles)) for tiles in each]
    return [(both, both[0].total + both[1].total) for both in dealt]


def _longest(shares: Shares, found: list[list[Run]], images: int) -> int:
    """Return the (image, tile) pairs of the longest work."""
    pairs = -(-images // shares.images)
    for classes, runs in zip((shares.rows, shares.cols), found, strict=True):
        pairs *= max(
            len(slots.of(slots.left)) * run.groups for slots, run in zip(classes, runs, strict=True) if run.groups
        )
    return pairs
