"""How local attention is cut into tiles: pure Python, no Triton, so that every choice can be tested and printed.

A kernel owns a tile of tokens (queries in forward and dq, keys in dkv) and walks over tiles of the other kind. On each
axis an owner sees one interval of walked tokens; `interval` returns it; intervals.py computes the same on the GPU.
Coordinates are ranks inside a dilation group.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

WORD_BITS = 32


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, as (rows, columns) where two numbers can differ.

    kind          keys                    reach                   stride
    neighborhood  kernel size             -                       queries that share one window
    block         keys of a block         halo; 0 for windows     keys per query
    circle        radius                  radius - 1              -
    """

    kind: str
    keys: tuple[int, int]
    reach: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    causal: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Axis:
    """One axis of one kernel: what an owner sees, how owners and walked tokens are cut. A kernel's constant."""

    kind: str
    keys: int  # kernel size, or keys of a block
    reach: int
    queries: int  # queries of a block
    causal: bool
    inverse: bool  # owners are keys
    tile: int  # owners a tile, a power of two
    split: int = 1  # tiles a step
    step: int = 0  # owners from the first tile of a step to the first of the next step
    first: int = 0  # where step 0 begins; negative where key tiles straddle two blocks
    walk: int = 0  # walked tokens a tile, a power of two
    walk_split: int = 1  # the same for the walked side
    walk_step: int = 0
    walks: int = 0  # walked tiles an owner tile visits at most
    stride: int = 1  # of a neighborhood

    @property
    def wide(self) -> bool:
        """Whether the walked tokens of an owner tile are more than the bits of a word."""
        return self.walks // self.walk_split * self.walk_step > WORD_BITS

    def tiles(self, owners: int) -> int:
        return -(-(owners - self.first) // self.step) * self.split

    def owned(self, tile: int, owners: int) -> tuple[int, int, int]:
        """Where a tile starts, and the range that it owns (empty where the first is not below the last)."""
        block = self.first + tile // self.split * self.step
        start = block + tile % self.split * self.tile
        return start, max(start, 0), min(start + self.tile, block + self.step, owners)

    def interval(self, x: int, walked: int) -> tuple[int, int]:
        """The walked tokens [low, high) that owner `x` sees; past the map where a halo's zeros are seen."""
        size = self.keys
        if self.kind == "circle":
            return max(x - self.reach, 0), min(x + self.reach + 1, walked)
        if self.kind == "block" and self.inverse:
            low, high = (x - self.reach) // size, (x + self.reach) // size + 1
            return max(low * self.queries, 0), min(high * self.queries, walked)
        if self.kind == "block":
            low = x // self.queries * size - self.reach
            return low, low + size + 2 * self.reach
        return self._seers(x, walked) if self.inverse else self._neighborhood(x, walked)

    def _neighborhood(self, x: int, walked: int) -> tuple[int, int]:
        """The keys of query `x`: those of its leader's window."""
        size, leader = self.keys, x // self.stride * self.stride
        if self.causal:
            return max(min(leader + self.stride, walked) - size, 0), x + 1
        low = max(min(leader + self.stride // 2 - size // 2, walked - size), 0)
        return low, low + size

    def _seers(self, x: int, walked: int) -> tuple[int, int]:
        """The queries that see key `x`: whole groups of `stride`, but for the first of a causal axis."""
        size, stride = self.keys, self.stride
        if self.causal:
            return x, walked if x + size >= walked else (x + size) // stride * stride
        half = size // 2 - stride // 2
        low = 0 if x < size else -((size - 1 - half - x) // stride) * stride
        return low, walked if x >= walked - size else ((x + half) // stride + 1) * stride

    def walked(self, tile: int, owners: int, walked: int) -> tuple[int, int]:
        """The interval that covers those of all owners of a tile (intervals only move forward)."""
        _, low, high = self.owned(tile, owners)
        return self.interval(low, walked)[0], self.interval(high - 1, walked)[1]

    def walk_offset(self, index: int) -> int:
        """Where the walked tile of this index begins, from the first walked token of the owner tile."""
        return index // self.walk_split * self.walk_step + index % self.walk_split * self.walk


@dataclass(frozen=True)
class Plan:
    """One kernel on one map: both axes, and how often each tile occurs."""

    rows: Axis
    cols: Axis

    @property
    def owners(self) -> int:
        return self.rows.tile * self.cols.tile

    @property
    def walked(self) -> int:
        return self.rows.walk * self.cols.walk

    @property
    def steps(self) -> int:
        return self.rows.walks * self.cols.walks


def launch_shape(kernel: str, head_dim: int, itemsize: int, extra: bool) -> tuple[int, int]:
    """Return (tokens of a walked tile, pipeline stages): the most that 64 owners and 4 warps hold without spills.

    Read from sm_80 and sm_90 machine code, not timed.

    Args:
        kernel: "forward", "dq", "dkv" or "dbias".
        head_dim: the larger one, padded. extra: with a bias or relative logits.
    """
    if itemsize == 4:
        return 32, 2
    if kernel == "dbias":
        return (64, 3) if head_dim <= 64 else (32, 2)
    if kernel == "dq" and extra:
        return 64 if head_dim <= 32 else 32, 2
    if kernel == "dkv" and (head_dim > 64 or (head_dim > 32 and extra)):
        return 32, 3
    return 64, 2 if kernel == "dkv" and extra else 3


OWNER_TILES = ((8, 8), (4, 16), (16, 4), (4, 8), (8, 4), (2, 16), (16, 2), (4, 4), (2, 8), (8, 2))
WALK_COLS = (16, 8, 4)
TILE_OVERHEAD = 2048  # in logits: what a program costs without its products (estimated, not timed)
LOAD_OVERHEAD = 16  # in owners: what loading a walked tile costs (estimated)


@lru_cache(maxsize=1024)
def make_plan(
    pattern: Pattern, queries: tuple[int, int], keys: tuple[int, int], walked: int, *, inverse: bool, by_block: bool
) -> Plan:
    """Choose the tiles of least estimated work.

    Args:
        pattern: what is seen.
        queries, keys: sizes of the two maps, (rows, columns).
        walked: tokens of a walked tile.
        inverse: owners are keys.
        by_block: no tile of queries may hold tokens of two blocks (relative logits are indexed by block).
    """
    owners, others = (keys, queries) if inverse else (queries, keys)
    best, least = None, float("inf")
    tiles = OWNER_TILES if pattern.kind == "block" else OWNER_TILES[:3]
    for tile, walk_cols in product(tiles, [c for c in WALK_COLS if walked // c <= 16]):
        walk = (walked // walk_cols, walk_cols)
        axes = [_axis_options(pattern, i, tile[i], walk[i], owners[i], others[i], inverse, by_block) for i in range(2)]
        for (rows, row_tiles, row_steps), (cols, col_tiles, _) in product(*axes):
            per_step = (tile[0] * tile[1] + LOAD_OVERHEAD) * walked
            work = row_steps * col_tiles * cols.walks * per_step + row_tiles * col_tiles * TILE_OVERHEAD
            if work < least:
                best, least = Plan(rows, cols), work
    return best


def _axis_options(
    pattern: Pattern, i: int, tile: int, walk: int, owners: int, walked: int, inverse: bool, by_block: bool
) -> list[tuple[Axis, int, int]]:
    """Return every way to lay tiles of this size on the axis: axis, tiles, and walked tiles of all tiles together."""
    size, reach = pattern.keys[i], pattern.reach[i]
    queries = size // pattern.stride[i]
    block = size if inverse else queries
    axis = Axis(pattern.kind, size, reach, queries, pattern.causal[i], inverse, tile, step=tile, walk=walk)
    if pattern.kind == "neighborhood":
        axis = replace(axis, stride=pattern.stride[i])
    axes = [axis]
    if pattern.kind == "block":
        first = size // 2 - size if inverse and 0 < reach <= size // 2 else 0  # then a tile straddles two blocks only
        packed = {1} if by_block and not inverse else {1, max(tile // block, 1)}
        axes = [replace(axis, split=-(-block // tile), step=block * several, first=first) for several in packed]
    if by_block and inverse:
        axes = [replace(a, walk_split=-(-queries // walk), walk_step=queries) for a in axes]
    else:
        axes = [replace(a, walk_step=walk) for a in axes]
    return [_count_walks(a, owners, walked, pattern.dilation[i]) for a in axes]


def _count_walks(axis: Axis, owners: int, walked: int, dilation: int) -> tuple[Axis, int, int]:
    """Fill in `walks`; also return how many tiles there are and how many walked tiles they visit, over all groups."""
    visits = []
    for group in range(dilation):
        in_group, seen = ((n - group + dilation - 1) // dilation for n in (owners, walked))
        for tile in range(axis.tiles(in_group)):
            _, low, high = axis.owned(tile, in_group)
            if low < high:
                first, last = axis.walked(tile, in_group, seen)
                visits.append(-(-(last - first) // axis.walk_step) * axis.walk_split)
    return replace(axis, walks=max(visits)), len(visits), sum(visits)
