"""How routed attention is cut into regions and tiles. No Triton needed.

Kernels index regions where they lie, so nothing is gathered.
"""

from dataclasses import dataclass

from torch import Tensor

from .._launch import LEAST_DOT, MOST_HEAD_DIM, dot_precision, power_of_2

MOST_TILE = 64  # tokens that the registers hold
MOST_REGIONS = 256  # of a map whose routes a kernel makes: the registers hold the scores of 16 regions
MOST_INVERTED = 64  # regions of a map whose routes a kernel inverts: it holds one number for each pair


@dataclass(frozen=True)
class Regions:
    """How the maps are cut; in tokens, but for `grid`."""

    grid: tuple[int, int]  # regions in a column and in a row of the map
    query: tuple[int, int]
    key: tuple[int, int]

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def queries(self) -> int:
        return self.query[0] * self.query[1]

    @property
    def keys(self) -> int:
        return self.key[0] * self.key[1]

    def constants(self) -> dict[str, int]:
        """What every kernel of routed attention takes at compile time."""
        return {
            "GRID_W": self.grid[1],
            "ROWS": self.query[0],
            "COLS": self.query[1],
            "KEY_ROWS": self.key[0],
            "KEY_COLS": self.key[1],
        }


def tile(tokens: int, most: int = MOST_TILE) -> int:
    """Tokens of a tile that holds `tokens`, or a part of them: a power of two."""
    return min(power_of_2(tokens, LEAST_DOT), most)


def region_tiles(rows: int, columns: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile of logits; one warp for 16 rows, as tensor cores cut them."""
    block_rows = tile(rows)
    return block_rows, tile(columns, 32 if itemsize == 4 else MOST_TILE), block_rows // 16  # fp32 spills beyond


def constants(q: Tensor, v: Tensor, cut: Regions) -> dict[str, int | str | bool]:
    """What every kernel of routed attention takes at compile time, but for its tiles."""
    widths = {"D": q.shape[-1], "DV": v.shape[-1]}
    blocks = {f"BLOCK_{name}": tile(width, MOST_HEAD_DIM) for name, width in widths.items()}
    return cut.constants() | widths | blocks | {"PRECISION": dot_precision(q.dtype), "enable_fp_fusion": True}
