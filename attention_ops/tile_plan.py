"""How a local pattern is cut into tiles, and which keys of its tile a query sees: decided once per pattern and size.

All caches are bounded and hold plain numbers and tables that depend on the size of a map, never on its values.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .tiling import AxisTiling, cut_axis, pieces

TILES = (4, 7, 8)  # queries of a tile on one axis; the whole axis is tried too
# What copying a key costs, in logits (head_dim 32, float32, 2 threads of a Xeon with AVX-512: 4x4, 4x7, 7x7, 14x14
# tiles and the whole 56x56 map took 13.8, 14.0, 18.3, 23.3 and 139 ms at batch 8, 2 heads, kernel 7).
KEY_COPY_COST = 45
# Elements of a mask that is cached whole. Larger masks are joined on every call, from one table an axis: cached, they
# would take the memory of as many logits.
SMALL_MASK = 1 << 18


class LocalPattern(Protocol):
    """Which keys a query sees, one axis at a time: 0 is rows, 1 columns. Hashable: plans and masks are cached by it.

    Tokens with the same remainder modulo `dilation` form a group, a separate map; positions are counted inside a group.
    """

    def __hash__(self) -> int: ...

    @property
    def dilation(self) -> tuple[int, int]: ...

    def reach(self, axis: int, length: int, tile: int) -> tuple[int, int]:
        """Return how many keys ahead of its first and past its last query a tile needs, wherever it lies.

        The length of the axis may be a symbol of a tracer.
        """
        ...

    def axis_table(self, axis: int, length: int, tiling: AxisTiling, device: torch.device) -> Tensor:
        """Return (groups, tiles, query tile, key tile): what `seen` needs to know of one axis."""
        ...

    def seen(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return whether a query sees a key, from the tables of both axes, which broadcast against each other."""
        ...

    def sees_all(self, size: tuple[int, int]) -> bool:
        """Say whether every query of a map of this size sees all keys of its group."""
        ...


class TilePlan(NamedTuple):
    """How a map is cut: a tiling an axis, of the groups that `dilation` makes. Plain numbers; made by `plan_tiles`."""

    rows: AxisTiling
    cols: AxisTiling
    dilation: tuple[int, int]
    per_map: int  # tiles of one head of one image, of all groups together
    logits: int  # of one head of one image


def plan_tiles(rows: AxisTiling, cols: AxisTiling, dilation: tuple[int, int] = (1, 1)) -> TilePlan:
    """Put the tilings of two axes together."""
    per_map = dilation[0] * dilation[1] * rows.tiles * cols.tiles
    return TilePlan(rows, cols, dilation, per_map, per_map * rows.tile * cols.tile * rows.keys * cols.keys)


class TileMask(NamedTuple):
    """Which key of its tile a query sees."""

    seen: Tensor  # (groups * tiles, query tokens, key tokens) bool; a query past the end of a map sees nothing
    shown: Tensor  # the same for SDPA, where such a query sees all keys: a row of nothing but -inf would make NaN
    additive: Tensor | None = None  # 0 where shown, -inf elsewhere, where it is cached

    @staticmethod
    def of(seen: Tensor) -> "TileMask":
        return TileMask(seen, seen | ~seen.any(-1, keepdim=True))


@lru_cache(maxsize=256, typed=True)
def tile_plan(pattern: LocalPattern, size: tuple[int, int]) -> TilePlan:
    """Return the tiles of least estimated work."""

    def work(plan: TilePlan) -> tuple[int, int, int]:
        queries = plan.rows.tile * plan.cols.tile
        return plan.logits // queries * (queries + KEY_COPY_COST), plan.rows.tile, plan.cols.tile

    rows, cols = ({_cut(pattern, axis, length, tile) for tile in (*TILES, length)} for axis, length in enumerate(size))
    return min((plan_tiles(*pair, pattern.dilation) for pair in product(rows, cols)), key=work)


def _cut(pattern: LocalPattern, axis: int, length: int, tile: int) -> AxisTiling:
    longest = pieces(length, pattern.dilation[axis])  # of the groups
    if tile >= longest:
        return cut_axis(longest, longest)
    return cut_axis(longest, tile, *pattern.reach(axis, length, tile))


def tile_mask(pattern: LocalPattern, size: tuple[int, int], plan: TilePlan, device: torch.device) -> TileMask:
    """Make the mask from new tables, which become part of a traced graph."""
    tilings = (plan.rows, plan.cols)
    rows, cols = (pattern.axis_table(axis, size[axis], tilings[axis], device) for axis in (0, 1))
    return TileMask.of(_join(pattern, rows, cols))


def cached_tile_mask(
    pattern: LocalPattern, size: tuple[int, int], plan: TilePlan, device: torch.device, dtype: torch.dtype | None
) -> TileMask | None:
    """Make the mask of real tensors from cached tables; None where every query sees all keys of its tile.

    Args:
        dtype: of the additive mask; None where a bias makes one for every call.
    """
    if plan.logits <= SMALL_MASK:
        return _small_mask(pattern, size, device, dtype)
    if _hides_nothing(pattern, size, plan):
        return None
    return TileMask.of(_join(pattern, _axis_table(pattern, size, 0, device), _axis_table(pattern, size, 1, device)))


@lru_cache(maxsize=32, typed=True)
def _small_mask(
    pattern: LocalPattern, size: tuple[int, int], device: torch.device, dtype: torch.dtype | None
) -> TileMask | None:
    plan = tile_plan(pattern, size)
    if _hides_nothing(pattern, size, plan):
        return None
    with torch.inference_mode(False):  # a mask first made during inference must serve training too
        mask = tile_mask(pattern, size, plan, device)
        return mask if dtype is None else mask._replace(additive=additive_mask(mask.shown, dtype))


@lru_cache(maxsize=256, typed=True)
def _axis_table(pattern: LocalPattern, size: tuple[int, int], axis: int, device: torch.device) -> Tensor:
    plan = tile_plan(pattern, size)
    with torch.inference_mode(False):
        return pattern.axis_table(axis, size[axis], (plan.rows, plan.cols)[axis], device)


def _hides_nothing(pattern: LocalPattern, size: tuple[int, int], plan: TilePlan) -> bool:
    whole = plan.rows.keys == plan.rows.length and plan.cols.keys == plan.cols.length
    return whole and pattern.sees_all(size)


def _join(pattern: LocalPattern, rows: Tensor, cols: Tensor) -> Tensor:
    """Join the tables of two axes: (groups * tiles, query tokens, key tokens)."""
    rows, cols = rows[:, None, :, None, :, None, :, None], cols[None, :, None, :, None, :, None, :]
    return pattern.seen(rows, cols).flatten(6, 7).flatten(4, 5).flatten(0, 3)  # from (gy, gx, ty, tx, qy, qx, ky, kx)


def additive_mask(shown: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask for SDPA: 0 where `shown`, -inf elsewhere."""
    return torch.zeros((), dtype=dtype, device=shown.device).where(shown, -torch.inf)


def positions(tiling: AxisTiling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions on an axis of queries, (tiles, query tile, 1), and of keys, (tiles, 1, key tile)."""
    first = torch.arange(tiling.tiles, device=device)[:, None, None] * tiling.tile
    query = first + torch.arange(tiling.tile, device=device)[:, None]
    return query, first - tiling.before + torch.arange(tiling.keys, device=device)
