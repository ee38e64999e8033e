"""How local attention is cut into tiles: pure Python, no Triton, so that every choice can be tested and printed.

A kernel owns a tile of tokens (queries in forward and dq, keys in dkv) and walks over tiles of the other kind. On each
axis an owner sees one interval of walked tokens; `interval` returns it; intervals.py computes the same on the GPU.
Coordinates are ranks inside a dilation group.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, TypeVar

WORD_BITS = 32
# Pipeline stages that a card wants, measured by benchmarks/retune.py: by kernel, head_dim, bytes of a number, extra
STAGES: dict[tuple[str, int, int, bool], int] = {}
SIZES = ("heads", "tiles", "queries", "keys")  # arguments of which no kernel needs a version of its own
T = TypeVar("T", bound=type)


def keeps_hash(cls: T) -> T:
    """Decorate a frozen dataclass whose objects are keys of caches at each launch: hash its fields once."""
    plain: Any = cls.__hash__

    def hash_once(self) -> int:
        if (found := self.__dict__.get("_hash")) is None:
            self.__dict__["_hash"] = found = plain(self)
        return found

    type.__setattr__(cls, "__hash__", hash_once)
    return cls


@keeps_hash
@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, as (rows, columns) where two numbers can differ.

    kind          keys                    reach                   stride
    neighborhood  kernel size             -                       queries that share one window
    block         keys of a block         halo; 0 for windows     keys per query
    circle        radius                  radius - 1              -

    With a shift, for windows only, the first window holds the first `shift` tokens, and the last one those left over.
    """

    kind: str
    keys: tuple[int, int]
    reach: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    causal: tuple[bool, bool] = (False, False)
    shift: tuple[int, int] = (0, 0)


pattern_of = lru_cache(maxsize=1024)(Pattern)  # the one object of these numbers, which knows its hash


@keeps_hash
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
    shift: int = 0  # of windows

    @property
    def wide(self) -> bool:
        """Whether the walked tokens of an owner tile are more than the bits of a word."""
        return self.walks // self.walk_split * self.walk_step > WORD_BITS

    @property
    def origin(self) -> int:
        """Where the first window begins: before the map, where windows are shifted."""
        return self.shift - self.keys if self.shift > 0 else 0

    @property
    def is_window(self) -> bool:
        return self.kind == "block" and self.reach == 0 and self.queries == self.keys

    @property
    def period(self) -> int:
        """After how many tiles, away from borders, the distance from a tile to its first walked token repeats."""
        return self.split if self.kind == "block" else self.stride // math.gcd(self.stride, self.tile)

    @property
    def lead(self) -> int:
        """How far a walked token may lie before an owner of its tile, and no further: also owners past the map."""
        return self.keys - 1 + self.tile - 1

    @property
    def lines(self) -> int:
        """Distances from an owner to a walked token, of a row."""
        return self.lead + self.walks * self.walk

    @property
    def shifts(self) -> int:
        """Distances from an owner to the first walked token of a step."""
        return self.lead + (self.walks - 1) * self.walk + 1

    def tiles(self, owners: int) -> int:
        return -(-(owners - self.first) // self.step) * self.split

    def owned(self, tile: int, owners: int) -> tuple[int, int, int]:
        """Where a tile starts, and the range that it owns (empty where the first is not below the last)."""
        block = self.first + tile // self.split * self.step
        start = block + tile % self.split * self.tile
        return start, max(start, 0), min(start + self.tile, block + self.step, owners)

    def interval(self, x: int, walked: int) -> tuple[int, int]:
        """The walked tokens [low, high) that owner `x` sees.

        Past the map where a halo's zeros are seen, and where a shift cuts a window: the kernels leave those out.
        """
        size = self.keys
        if self.kind == "circle":
            return max(x - self.reach, 0), min(x + self.reach + 1, walked)
        if self.is_window:
            low = (x - self.origin) // size * size + self.origin
            return low, low + size
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


@keeps_hash
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
    """Return (most tokens of a walked tile, pipeline stages): what 64 owners and 4 warps hold without spills.

    Read from machine code, not timed; shared memory stays below the 99 KB that a block has on sm_86, sm_89 and sm_120.

    Args:
        kernel: "forward", "dq", "dkv" or "dbias".
        head_dim: the larger one, padded. extra: with a bias or relative logits.
    """
    walked, stages = _shape_of_registers(kernel, head_dim, itemsize, extra)
    return walked, STAGES.get((kernel, head_dim, itemsize, extra), stages)


def _shape_of_registers(kernel: str, head_dim: int, itemsize: int, extra: bool) -> tuple[int, int]:
    if itemsize == 4:
        return (16, 1) if head_dim > 64 and kernel != "forward" else (32, 2)
    if kernel == "dbias":
        return (64, 3) if head_dim <= 64 else (32, 1)  # all four of its tiles would be loaded ahead
    if kernel == "dq" and (extra or head_dim > 64):
        return 64 if head_dim <= 32 or not extra else 32, 2
    if kernel == "dkv" and (head_dim > 64 or (head_dim > 32 and extra)):
        return 32, 3 if head_dim <= 64 else 2
    return 64, 2 if extra and (kernel == "dkv" or head_dim > 64) else 3  # of the forward pass: a bias tile takes 16 KB


def stages_of(kernel: str, plan: Plan, stages: int, extra: bool) -> int:
    """Return the pipeline stages: a loop of one turn has nothing to load ahead, and needs no registers for it.

    A bias is still copied through shared memory: read straight into registers it takes 12 instructions a logit more.
    """
    return 1 if plan.steps == 1 and kernel != "dbias" and not extra else stages


def one_pass_shape(kernel: str, head_dim: int, itemsize: int, bias: bool) -> int | None:
    """Return the pipeline stages of a kernel whose tiles see only themselves; None where registers do not hold them.

    Args:
        kernel: "forward" or "backward". head_dim: the larger one, padded.
    """
    if kernel == "forward":
        return 2 if itemsize == 2 and head_dim <= 64 else None
    if itemsize == 4 or head_dim > (32 if bias else 64):
        return None
    return 1 if bias or head_dim > 32 else 2


def share_images(units: int, others: int) -> int:
    """Return among how many programs the units of a head and group are shared, all of about the same length.

    Args:
        units: tiles of all images (images where a tile is the map).
        others: heads * dilation groups, each with programs of its own.
    """
    turns = max(-(-units * others // ONE_PASS_PROGRAMS), 1)
    return -(-units // turns)


ONE_PASS_PROGRAMS = 1536  # a few waves on a large GPU, and few enough partial sums of a bias (estimated)

# 16 owners would load each walked token twice as often: more than the L2 cache delivers (estimated)
OWNER_TILES = ((8, 8), (4, 16), (16, 4), (4, 8), (8, 4), (2, 16), (16, 2))
WALK_COLS = (16, 8, 4)
MOST_WALK_ROWS = 16
MOST_OWNERS = 64
LEAST_WALKED = 32  # tokens of a walked tile: below, a product is half as wide as its registers
# In logits, from instructions in sm_80 and sm_90 machine code
PROGRAM_OVERHEAD = 100  # for each owner: its masks and pointers, loading and storing it
STEP_OVERHEAD = 7  # for each owner and each walked token of a step


def tile_costs(kernel: str, head_dim: int, itemsize: int) -> tuple[int, float]:
    """Return (least owners of a tile, overhead of a step), read from machine code.

    Small tiles of neighborhoods save logits, but with wide heads in 16 bits products of 32 rows need 1.5 times the
    instructions of a logit. dbias loads both of
    its tiles in every step.
    """
    return 64 if head_dim > 32 and itemsize == 2 else 32, 40 if kernel == "dbias" else STEP_OVERHEAD


@lru_cache(maxsize=1024)
def make_plan(
    pattern: Pattern, queries: tuple[int, int], keys: tuple[int, int], walked: int, *, inverse: bool, by_block: bool,
    least_owners: int = 32, step_overhead: float = STEP_OVERHEAD,
) -> Plan:  # fmt: skip
    """Choose the tiles of least estimated work.

    Args:
        pattern: what is seen.
        queries, keys: sizes of the two maps, (rows, columns).
        walked: tokens of a walked tile; half as many are tried too where a tile has fewer than 64 owners.
        inverse: owners are keys.
        by_block: no tile of queries may hold tokens of two blocks (relative logits are indexed by block).
        least_owners, step_overhead: from `tile_costs`; the first is for neighborhoods, whose smaller tiles save logits.
    """
    owners, others = (keys, queries) if inverse else (queries, keys)
    best, lowest = None, float("inf")
    widths = [width for width in (walked, walked // 2) if width == walked or width >= LEAST_WALKED]
    windows = pattern.kind == "block" and not any(pattern.reach)
    least = 1 if windows else least_owners if pattern.kind == "neighborhood" else MOST_OWNERS
    tiles = [tile for tile in OWNER_TILES if math.prod(tile) >= least]
    for tile, width, walk_cols in product(tiles, widths, WALK_COLS):
        if width // walk_cols > MOST_WALK_ROWS or (width < walked and math.prod(tile) == MOST_OWNERS):
            continue
        walk = (width // walk_cols, walk_cols)
        axes = [_axis_options(pattern, i, tile[i], walk[i], owners[i], others[i], inverse, by_block) for i in range(2)]
        for (rows, row_tiles, row_steps), (cols, col_tiles, _) in product(*axes):
            work = row_steps * col_tiles * cols.walks * _step_work(tile, width, step_overhead)
            work += row_tiles * col_tiles * math.prod(tile) * PROGRAM_OVERHEAD
            if work < lowest:
                best, lowest = Plan(rows, cols), work
    return best


def _step_work(tile: tuple[int, int], walked: int, overhead: float = STEP_OVERHEAD) -> float:
    owners = math.prod(tile)
    return owners * walked + overhead * (owners + walked)


@lru_cache(maxsize=1024)
def one_pass_plan(pattern: Pattern, size: tuple[int, int]) -> Plan | None:
    """Return a plan whose tiles see themselves and nothing else, or None: one kernel then gets all gradients.

    So it is with windows that fit into a tile, and with maps or dilation groups of one tile.

    Args:
        pattern: what is seen.
        size: of the map of queries and of that of keys, (rows, columns).
    """
    best, least = None, float("inf")
    for tile in OWNER_TILES:
        found = [_closed_axes(pattern, i, tile[i], size[i]) for i in range(2)]
        for (rows, row_tiles), (cols, col_tiles) in product(*found):
            owners = math.prod(tile)
            work = row_tiles * col_tiles * (_step_work(tile, owners) + owners * PROGRAM_OVERHEAD)
            if work < least:
                best, least = Plan(rows, cols), work
    return best


def _closed_axes(pattern: Pattern, i: int, tile: int, size: int) -> list[tuple[Axis, int]]:
    """Return the ways to lay tiles on an axis so that each sees itself and nothing else, with their number."""
    if pattern.kind == "block" and (pattern.stride[i] > 1 or pattern.reach[i] > 0):
        return []
    options = _axis_options(pattern, i, tile, tile, size, size, inverse=False, by_block=False)
    longest = -(-size // pattern.dilation[i])
    return [
        (axis, tiles)
        for axis, tiles, _ in options
        if axis.split == 1 and axis.walks == 1 and (pattern.kind == "block" or axis.tiles(longest) == 1)
    ]


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
        axis = replace(axis, shift=pattern.shift[i])
        # where keys see a halo, a tile then straddles two blocks only
        first = size // 2 - size if inverse and 0 < reach <= size // 2 else axis.origin
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
