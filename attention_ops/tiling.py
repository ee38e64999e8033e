"""Cut maps into regions, and into tiles of queries with the key tiles that cover what those queries see.

Two layouts are cut, because a cut must not copy before it has to:

regions    of maps as the ops take them, (B, H, W, ...): a view, whose regions keep all heads of a token together.
tiles      of maps (..., Y, X, d), with heads and dilation groups in front: a matrix product takes one head's tokens.

Every local pattern (neighborhood, window, halo) is an interval of keys per axis. A map is cut into tiles of `tile`
queries an axis; each tile gets one contiguous key tile that starts `before` tokens ahead of its first query and ends
`after` tokens past its last. Keys outside the map are zeros and must be masked by the caller.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._graph.sizes import cover_map, pad_to_multiples, sides
from ._graph.sizes import crop as crop_map
from ._graph.sizes import larger as larger_size
from ._graph.sizes import smaller as smaller_size


def pieces(length: int, size: int) -> int:
    """Return how many pieces of `size` cover `length`."""
    return -(-length // size)


class AxisTiling(NamedTuple):
    """How one axis is cut; plain numbers, in tokens but for `tiles`. Made by `cut_axis`."""

    length: int
    tile: int  # queries a tile
    before: int  # keys ahead of a tile's first query
    after: int  # keys past a tile's last query
    tiles: int
    keys: int  # keys a tile
    tail: int  # queries by which the last tile overhangs the map


def cut_axis(length: int, tile: int, before: int = 0, after: int = 0, tiles: int | None = None) -> AxisTiling:
    """Cut an axis into tiles of `tile` queries: as many as cover it, or so many."""
    tiles = pieces(length, tile) if tiles is None else tiles
    return AxisTiling(length, tile, before, after, tiles, before + tile + after, tiles * tile - length)


def cut_windows(size: tuple[int, int], window: tuple[int, int]) -> tuple[AxisTiling, AxisTiling]:
    """Cut both axes into tiles that see nothing but themselves; `window` must divide `size`, symbols or not."""
    known = isinstance(size[0], int) and isinstance(size[1], int)
    return _cached_windows(size, window) if known else _make_windows(size, window)


def _make_windows(size: tuple[int, int], window: tuple[int, int]) -> tuple[AxisTiling, AxisTiling]:
    (height, width), (rows, cols) = size, window
    return AxisTiling(height, rows, 0, 0, height // rows, rows, 0), AxisTiling(
        width, cols, 0, 0, width // cols, cols, 0
    )


_cached_windows = lru_cache(maxsize=256)(_make_windows)


class AxisWindow(NamedTuple):
    """What every query of one axis sees, by the definition of an op; each is (queries, keys of a query)."""

    keys: Tensor  # positions, inside the map
    seen: Tensor  # bool; what hidden keys count as is the op's matter
    cells: Tensor  # of the relative position table


def boxes(counts: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cut a grid of so many tiles a dimension into boxes of at most `most` tiles (1 if that is below 1).

    A box is as long as it can be along the last dimension, then along the one before. The first is the largest.
    """
    sizes: list[int] = []
    for count in reversed(counts):
        sizes.insert(0, max(1, min(count, most)))
        most //= max(1, count)
    for corner in product(*(range(0, count, size) for count, size in zip(counts, sizes, strict=True))):
        yield tuple(slice(start, start + size) for start, size in zip(corner, sizes, strict=True))


def map_size(x: Tensor) -> tuple[int, int]:
    """Return the height and width of (B, H, W, ...)."""
    if torch.jit.is_scripting():
        return x.shape[1], x.shape[2]
    else:
        return sides(x)


def larger(a: int, b: int) -> int:
    """Return the larger of two sizes."""
    if torch.jit.is_scripting():
        return max(a, b)
    else:
        return larger_size(a, b)


def smaller(a: int, b: int) -> int:
    """Return the smaller of two sizes."""
    if torch.jit.is_scripting():
        return min(a, b)
    else:
        return smaller_size(a, b)


def pad_to_windows(x: Tensor, window: list[int]) -> Tensor:
    """Add zeros below and right of (..., Y, X, d) until whole windows cover the map, and no more."""
    if torch.jit.is_scripting():
        rows = (window[0] - x.shape[-3] % window[0]) % window[0]
        cols = (window[1] - x.shape[-2] % window[1]) % window[1]
        return F.pad(x, [0, 0, 0, cols, 0, rows]) if rows > 0 or cols > 0 else x
    else:
        return pad_to_multiples(x, window[0], window[1])


def cover_with_windows(x: Tensor, window: list[int]) -> Tensor:
    """Pad as `pad_to_windows`, for windows that do not see each other: a map of any size may get more windows."""
    if torch.jit.is_scripting():
        return pad_to_windows(x, window)
    else:
        return cover_map(x, window[0], window[1])


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Return the upper left part of a map (B, Y, X, ...)."""
    if torch.jit.is_scripting():
        return x[:, :height, :width]
    else:
        return crop_map(x, height, width)


# Regions


def cut_regions(x: Tensor, region: list[int]) -> Tensor:
    """(B, H, W, ...) -> (B, region rows, region columns, rows, columns, ...), a view; `region` divides (H, W)."""
    return x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0])).transpose(2, 3)


def join_regions(x: Tensor) -> Tensor:
    """(B, region rows, region columns, rows, columns, ...) -> (B, H, W, ...): the inverse of `cut_regions`."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def on_dilation_groups(x: Tensor, dilation: tuple[int, int], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of maps that keeps the size to every dilation group of (B, C, H, W), as images of one batch.

    Tokens with the same remainder modulo `dilation` form a group; groups are padded with zeros to one size. Copies the
    map twice, channels last.
    """
    height, width = x.shape[2:]
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % dilation[1], 0, -height % dilation[0]))
    groups = cut_regions(x, list(dilation)).permute(0, 3, 4, 1, 2, 5)  # (B, dy, dx, Y, X, C)
    images = groups.reshape(-1, *groups.shape[3:]).permute(0, 3, 1, 2)  # (B * dy * dx, C, Y, X), channels last
    images = function(images).permute(0, 2, 3, 1)
    x = join_regions(images.reshape(groups.shape).permute(0, 3, 4, 1, 2, 5))
    return x[:, :height, :width].permute(0, 3, 1, 2)


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, windows, tokens of a window, d); a view where one window is the map."""
    return split_queries(x.permute(0, 3, 1, 2, 4), *cut_windows((x.shape[1], x.shape[2]), window))


def merge_windows(windows: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, heads, windows, tokens of a window, d) -> (B, H, W, heads, d): the inverse of `split_windows`."""
    return merge_queries(windows, *cut_windows(size, window)).permute(0, 2, 3, 1, 4)


# Tiles


def _pad(x: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    return F.pad(x, (0, 0, *cols, *rows)) if any(rows) or any(cols) else x


def _crop(x: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    return x[..., : rows.length, : cols.length, :] if rows.tail or cols.tail else x


def split_queries(x: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., Y, X, d) -> (..., tiles, tokens of a query tile, d)."""
    x = _pad(x, (0, rows.tail), (0, cols.tail))
    *lead, _, _, dim = x.shape
    x = x.reshape(*lead, rows.tiles, rows.tile, cols.tiles, cols.tile, dim).transpose(-3, -4)
    return x.reshape(*lead, rows.tiles * cols.tiles, rows.tile * cols.tile, dim)


def merge_queries(tiles: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., tiles, tokens of a query tile, d) -> (..., Y, X, d): the inverse of `split_queries`."""
    *lead, _, _, dim = tiles.shape
    x = tiles.reshape(*lead, rows.tiles, cols.tiles, rows.tile, cols.tile, dim).transpose(-3, -4)
    x = x.reshape(*lead, rows.tiles * rows.tile, cols.tiles * cols.tile, dim)
    return _crop(x, rows, cols)


def gather_keys(x: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., Y, X, d) -> (..., tiles, tokens of a key tile, d): one copy, `keys / tile` times the map on each axis."""
    if rows.keys == rows.tile and cols.keys == cols.tile:
        return split_queries(x, rows, cols)
    x = _pad(x, (rows.before, rows.tail + rows.after), (cols.before, cols.tail + cols.after))
    *lead, _, _, dim = x.shape
    x = x.unfold(-3, rows.keys, rows.tile).unfold(-3, cols.keys, cols.tile)  # (..., ty, tx, d, ky, kx)
    return x.movedim(-3, -1).reshape(*lead, rows.tiles * cols.tiles, rows.keys * cols.keys, dim)


def scatter_keys(tiles: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., tiles, tokens of a key tile, d) -> (..., Y, X, d), overlaps added: the adjoint of `gather_keys`.

    A key tile is cut into pieces no larger than a query tile; pieces of one kind never overlap, so a kind is one add.
    """
    if rows.keys == rows.tile and cols.keys == cols.tile:
        return merge_queries(tiles, rows, cols)
    *lead, _, _, dim = tiles.shape
    x = tiles.reshape(*lead, rows.tiles, cols.tiles, rows.keys, cols.keys, dim)
    pieces_y, pieces_x = -(-rows.keys // rows.tile), -(-cols.keys // cols.tile)
    grid = (rows.tiles + pieces_y - 1, rows.tile, cols.tiles + pieces_x - 1, cols.tile)
    total = x.new_zeros(*lead, *grid, dim)
    by_tile = total.transpose(-3, -4)  # (..., grid_y, grid_x, tile, tile, d)
    for py in range(pieces_y):
        for px in range(pieces_x):
            top, left = py * rows.tile, px * cols.tile
            piece = x[..., top : top + rows.tile, left : left + cols.tile, :]
            place = by_tile[..., py : py + rows.tiles, px : px + cols.tiles, : piece.shape[-3], : piece.shape[-2], :]
            place += piece
    total = total.flatten(-3, -2).flatten(-4, -3)
    return total[..., rows.before :, cols.before :, :][..., : rows.length, : cols.length, :]
