"""Tokens of a region on chip: load and store tiles of a map where its regions lie (Triton helpers, no kernel).

Offsets inside an image are int32, those of images int64.
"""

import triton
import triton.language as tl


@triton.jit
def _token_offs(region, token, strides, GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Element offsets in an image, from row-major places of regions in the map and of tokens in them."""
    row = region // GRID_W * ROWS + token // COLS
    col = region % GRID_W * COLS + token % COLS
    return row * strides[1] + col * strides[2]


@triton.jit
def routes_are_valid(ptr, topk, regions, TOPK: tl.constexpr):
    """Whether all routes of a region are in the map; TOPK is topk or the next power of two."""
    place = tl.arange(0, TOPK)
    route = tl.load(ptr + place, mask=place < topk, other=0)
    return tl.sum(((route < 0) | (route >= regions)).to(tl.int32), 0) == 0


@triton.jit
def load_region(
    ptr, strides, image, head, region, token, seen,
    GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[tokens, BLOCK] of a map (B, H, W, heads, WIDTH); zeros where not `seen` and past WIDTH. image is int64."""
    c = tl.arange(0, BLOCK)
    offs = _token_offs(region, token, strides, GRID_W, ROWS, COLS)[:, None] + c[None, :] * strides[4]
    mask = seen[:, None] & (c < WIDTH)[None, :]
    return tl.load(ptr + (image * strides[0] + head * strides[3]) + offs, mask=mask, other=0.0)


@triton.jit
def store_region(
    ptr, x, strides, image, head, region, token, seen,
    GRID_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a tile that `load_region` could load."""
    c = tl.arange(0, BLOCK)
    offs = _token_offs(region, token, strides, GRID_W, ROWS, COLS)[:, None] + c[None, :] * strides[4]
    ptr += image * strides[0] + head * strides[3]
    tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=seen[:, None] & (c < WIDTH)[None, :])
