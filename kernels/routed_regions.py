"""Regions of a map: how maps are cut, where a region's tokens lie, and tiles of them on chip.

Kernels index regions where they lie, so nothing is gathered. Offsets inside an image are int32, those of images int64.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ._launch import precision

LEAST_TILE, MOST_TILE = 16, 64  # tokens: what tl.dot takes, and what the registers hold
MOST_HEAD_DIM = 128


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
    """Tokens of a tile that holds `tokens`: a power of two."""
    return min(max(triton.next_power_of_2(tokens), LEAST_TILE), most)


def region_tiles(rows: int, columns: int, itemsize: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile of logits; one warp for 16 rows, as tensor cores cut them."""
    block_rows = tile(rows)
    return block_rows, tile(columns, 32 if itemsize == 4 else MOST_TILE), block_rows // 16  # fp32 spills beyond


def constants(q: Tensor, v: Tensor, cut: Regions) -> dict[str, int | str | bool]:
    """What every kernel of routed attention takes at compile time, but for its tiles."""
    widths = {"D": q.shape[-1], "DV": v.shape[-1]}
    blocks = {f"BLOCK_{name}": tile(width, MOST_HEAD_DIM) for name, width in widths.items()}
    return cut.constants() | widths | blocks | {"PRECISION": precision(q.dtype), "enable_fp_fusion": True}


@triton.jit
def _token_offs(region, token, strides, GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Element offsets in an image, from row-major places of regions in the map and of tokens in them."""
    row = region // GRID_W * ROWS + token // COLS
    col = region % GRID_W * COLS + token % COLS
    return row * strides[1] + col * strides[2]


@triton.jit
def load_tokens(
    ptr, strides, image, head, region, token, seen,
    GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[tokens, BLOCK] of a map (B, H, W, heads, WIDTH); zeros where not `seen` and past WIDTH. image is int64."""
    c = tl.arange(0, BLOCK)
    offs = _token_offs(region, token, strides, GRID_W, ROWS, COLS)[:, None] + c[None, :] * strides[4]
    mask = seen[:, None] & (c < WIDTH)[None, :]
    return tl.load(ptr + (image * strides[0] + head * strides[3]) + offs, mask=mask, other=0.0)


@triton.jit
def store_tokens(
    ptr, x, strides, image, head, region, token, seen,
    GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The way back of `load_tokens`."""
    c = tl.arange(0, BLOCK)
    offs = _token_offs(region, token, strides, GRID_W, ROWS, COLS)[:, None] + c[None, :] * strides[4]
    ptr += image * strides[0] + head * strides[3]
    tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=seen[:, None] & (c < WIDTH)[None, :])
