"""How the kernels of local attention are launched: plan, grid and constants, once for calls of equal sizes."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from .._launch import padded
from .plan import (
    MOST_OWNERS,
    Pattern,
    Plan,
    launch_shape,
    make_plan,
    one_pass_plan,
    one_pass_shape,
    share_images,
    stages_of,
    tile_costs,
)
from .shares import PROGRAMS, Shares, share_out

OWNERS_OF_A_WARP = {2: 16, 4: 8}  # by bytes of a number: float32 products keep twice the registers busy


def warps(owners: int, itemsize: int) -> int:
    return max(owners // OWNERS_OF_A_WARP[itemsize], 1)


def full_precision(capability: tuple[int, int]) -> str:
    """Return how the products of float32 keep their digits on a GPU, where a kernel can: see `precision_of`.

    Three TF32 products ("tf32x3") take as many instructions on sm_80 (114 a logit, 106 without) and spill in dkv.
    """
    return "tf32x3" if capability[0] == 9 else "ieee"


def precision_of(kernel: str, plan: Plan, sizes: "Sizes") -> str:
    """Return the `input_precision` of a kernel's products.

    On sm_90 three TF32 products take 80 to 128 instructions a logit at head_dim 32, in place of 102 to 171, and 104 to
    175 at 64, in place of 177 to 316. The exceptions take more: small tiles of narrow heads, which no warpgroup
    multiplies, and dbias, which spills. Relative logits were not measured.
    """
    narrow = plan.owners < MOST_OWNERS and max(padded(sizes.dim), padded(sizes.dim_v)) <= 32
    if sizes.precision == "tf32x3" and (narrow or kernel == "dbias" or sizes.tables):
        return "ieee"
    return sizes.precision


class Sizes(NamedTuple):
    """What decides how kernels are launched, in plain numbers: calls of equal sizes are planned once."""

    pattern: Pattern
    queries: tuple[int, int]
    keys: tuple[int, int]
    images: int
    heads: int
    dim: int
    dim_v: int
    itemsize: int
    precision: str
    bias: bool
    tables: bool


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel's plan, and what Triton takes for it."""

    plan: Plan
    grid: tuple[int]
    tiles: tuple[int, int]
    constants: dict[str, Any]


@lru_cache(maxsize=1024)
def plan_launch(kernel: str, sizes: Sizes) -> KernelLaunch:
    """Plan "forward", "dq", "dkv" or "dbias"."""
    extra, widest = sizes.bias or sizes.tables, max(padded(sizes.dim), padded(sizes.dim_v))
    walked, stages = launch_shape(kernel, widest, sizes.itemsize, extra)
    maps = (sizes.pattern, sizes.queries, sizes.keys, walked)
    costs = dict(zip(("least_owners", "step_overhead"), tile_costs(kernel, widest, sizes.itemsize), strict=True))
    plan = make_plan(*maps, inverse=kernel == "dkv", by_block=sizes.tables, **costs)
    tiles = _tiles(plan, sizes)
    grid = (sizes.images * sizes.heads * math.prod(tiles) * math.prod(sizes.pattern.dilation),)
    return KernelLaunch(plan, grid, tiles, _constants(kernel, plan, sizes, stages_of(kernel, plan, stages, extra)))


@lru_cache(maxsize=1024)
def plan_one_pass(kernel: str, sizes: Sizes) -> tuple[KernelLaunch, int, int] | None:
    """Plan "forward" or "backward" as one kernel whose tiles see only themselves.

    Also return how many units there are, and among how many programs of a head and group they are shared.

    None where tiles see other tiles, or the registers do not hold what one pass needs.
    """
    if sizes.tables or sizes.queries != sizes.keys:
        return None
    stages = one_pass_shape(kernel, max(padded(sizes.dim), padded(sizes.dim_v)), sizes.itemsize, sizes.bias)
    plan = one_pass_plan(sizes.pattern, sizes.queries)
    if stages is None or plan is None:
        return None
    tiles = _tiles(plan, sizes)
    others = sizes.heads * math.prod(sizes.pattern.dilation)
    units = sizes.images * math.prod(tiles)
    shares = share_images(units, others)
    return KernelLaunch(plan, (others * shares,), tiles, _constants(kernel, plan, sizes, stages)), units, shares


@lru_cache(maxsize=1024)
def plan_shares(sizes: Sizes) -> Shares:
    """Share the work of "dbias" out among programs."""
    plan = plan_launch("dbias", sizes).plan
    return share_out(sizes.pattern, plan, sizes.queries, sizes.images, max(PROGRAMS // (sizes.heads * plan.steps), 1))


def _tiles(plan: Plan, sizes: Sizes) -> tuple[int, int]:
    owners = sizes.keys if plan.rows.inverse else sizes.queries
    longest = [-(-n // step) for n, step in zip(owners, sizes.pattern.dilation, strict=True)]
    return plan.rows.tiles(longest[0]), plan.cols.tiles(longest[1])


def _constants(kernel: str, plan: Plan, sizes: Sizes, stages: int) -> dict[str, Any]:
    return {
        "ROWS": plan.rows, "COLS": plan.cols, "DIM": sizes.dim, "DIM_V": sizes.dim_v, "PAD": padded(sizes.dim),
        "PAD_V": padded(sizes.dim_v), "PRECISION": precision_of(kernel, plan, sizes),
        "num_warps": warps(plan.owners, sizes.itemsize), "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip
