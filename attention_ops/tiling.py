"""Cut maps into tiles of queries and the key tiles that cover what those queries see.

Every local pattern (neighborhood, window, halo) is an interval of keys per axis. Here a map is cut into tiles of
`tile` queries an axis; each tile gets one contiguous key tile that starts `before` tokens ahead of its first query and
ends `after` tokens past its last. Keys outside the map are zeros and must be masked by the caller.

Maps are (..., Y, X, d) in this file, with any dimensions in front; tiles are (..., tiles, tokens, d), row-major.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch.nn.functional as F
from torch import Tensor


def pieces(length: int, size: int) -> int:
    """How many pieces of `size` cover `length`; for a symbol of a tracer at least two, and with some overhang.

    A count that may be 1, or a padding that may be 0, would tie an exported graph to one of the two cases.
    """
    return -(-length // size) if isinstance(length, int) or size == 1 else length // size + 2


@dataclass(frozen=True)
class AxisTiling:
    """How one axis is cut. All in tokens, but for `tiles`."""

    length: int
    tile: int  # queries a tile
    before: int = 0  # keys ahead of a tile's first query
    after: int = 0  # keys past a tile's last query

    @property
    def tiles(self) -> int:
        return pieces(self.length, self.tile)

    @property
    def keys(self) -> int:
        return self.before + self.tile + self.after

    @property
    def tail(self) -> int:
        """Queries by which the last tile overhangs the map."""
        return self.tiles * self.tile - self.length


@dataclass(frozen=True)
class WindowTiling(AxisTiling):
    """Tiles that divide the axis and see nothing but themselves. `tile` must divide `length`."""

    @property
    def tiles(self) -> int:
        return self.length // self.tile

    @property
    def tail(self) -> int:
        return 0


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


def pad_to_windows(x: Tensor, window: list[int]) -> Tensor:
    """Add zeros below and right of (..., Y, X, d) until whole windows cover the map, and no more."""
    rows = (window[0] - x.shape[-3] % window[0]) % window[0]
    cols = (window[1] - x.shape[-2] % window[1]) % window[1]
    return F.pad(x, [0, 0, 0, cols, 0, rows]) if rows > 0 or cols > 0 else x


def cover_with_windows(x: Tensor, window: list[int]) -> Tensor:
    """The same for windows that do not see each other: where a size is a symbol of a tracer, whole windows more."""
    rows = pieces(x.shape[-3], window[0]) * window[0] - x.shape[-3]
    cols = pieces(x.shape[-2], window[1]) * window[1] - x.shape[-2]
    if isinstance(rows, int) and isinstance(cols, int) and rows == 0 and cols == 0:  # asking a symbol would fix it
        return x
    return F.pad(x, [0, 0, 0, cols, 0, rows])


def _pad(x: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    known_zero = all(isinstance(p, int) and p == 0 for p in (*rows, *cols))  # asking a symbol would fix it
    return x if known_zero else F.pad(x, (0, 0, *cols, *rows))


def by_region(x: Tensor, region: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, region rows, rows, region columns, columns, heads, d), always a view."""
    return x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))


def split_queries(x: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., Y, X, d) -> (..., tiles, tokens of a query tile, d)."""
    x = _pad(x, (0, rows.tail), (0, cols.tail))
    x = x.unflatten(-2, (cols.tiles, cols.tile)).unflatten(-4, (rows.tiles, rows.tile))
    return x.transpose(-3, -4).flatten(-3, -2).flatten(-4, -3)


def merge_queries(tiles: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., tiles, tokens of a query tile, d) -> (..., Y, X, d): the inverse of `split_queries`."""
    x = tiles.unflatten(-2, (rows.tile, cols.tile)).unflatten(-4, (rows.tiles, cols.tiles))
    x = x.transpose(-3, -4).flatten(-3, -2).flatten(-4, -3)
    return x[..., : rows.length, : cols.length, :]


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, windows, tokens of a window, d); a view where one window is the map."""
    rows, cols = WindowTiling(x.shape[1], window[0]), WindowTiling(x.shape[2], window[1])
    return split_queries(x.permute(0, 3, 1, 2, 4), rows, cols)


def merge_windows(windows: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, heads, windows, tokens of a window, d) -> (B, H, W, heads, d): the inverse of `split_windows`."""
    merged = merge_queries(windows, WindowTiling(size[0], window[0]), WindowTiling(size[1], window[1]))
    return merged.permute(0, 2, 3, 1, 4)


def gather_keys(x: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., Y, X, d) -> (..., tiles, tokens of a key tile, d): one copy, `keys / tile` times the map on each axis."""
    x = _pad(x, (rows.before, rows.tail + rows.after), (cols.before, cols.tail + cols.after))
    x = x.unfold(-3, rows.keys, rows.tile).unfold(-3, cols.keys, cols.tile)  # (..., ty, tx, d, ky, kx)
    return x.movedim(-3, -1).flatten(-3, -2).flatten(-4, -3)


def outer_mask(rows: Tensor, cols: Tensor) -> Tensor:
    """Join the masks of two axes, (groups, tiles, query tile, key tile) each: (groups * tiles, queries, keys)."""
    rows, cols = rows[:, None, :, None, :, None, :, None], cols[None, :, None, :, None, :, None, :]
    return (rows & cols).flatten(6, 7).flatten(4, 5).flatten(0, 3)  # from (gy, gx, ty, tx, qy, qx, ky, kx)


def scatter_keys(tiles: Tensor, rows: AxisTiling, cols: AxisTiling) -> Tensor:
    """(..., tiles, tokens of a key tile, d) -> (..., Y, X, d), overlaps added: the adjoint of `gather_keys`.

    A key tile is cut into pieces no larger than a query tile; pieces of one kind never overlap, so a kind is one add.
    """
    x = tiles.unflatten(-2, (rows.keys, cols.keys)).unflatten(-4, (rows.tiles, cols.tiles))  # (..., ty, tx, ky, kx, d)
    pieces_y, pieces_x = -(-rows.keys // rows.tile), -(-cols.keys // cols.tile)
    grid = (rows.tiles + pieces_y - 1, rows.tile, cols.tiles + pieces_x - 1, cols.tile)
    total = x.new_zeros(*x.shape[:-5], *grid, x.shape[-1])
    by_tile = total.transpose(-3, -4)  # (..., grid_y, grid_x, tile, tile, d)
    for py in range(pieces_y):
        for px in range(pieces_x):
            top, left = py * rows.tile, px * cols.tile
            piece = x[..., top : top + rows.tile, left : left + cols.tile, :]
            place = by_tile[..., py : py + rows.tiles, px : px + cols.tiles, : piece.shape[-3], : piece.shape[-2], :]
            place += piece
    total = total.flatten(-3, -2).flatten(-4, -3)
    return total[..., rows.before :, cols.before :, :][..., : rows.length, : cols.length, :]
