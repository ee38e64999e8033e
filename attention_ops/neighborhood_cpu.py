"""Neighborhood attention on tiles: the torch body for CPUs, compilers and exporters.

The map is cut into tiles of queries; one key tile covers the neighborhoods of all queries of a tile, a mask says which
key each query sees. Dilation groups become maps apart (a permuted view), so one plan serves every dilation.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiled_attention import TILES, TiledAttention, TileMask, TilePlan, cheapest_tiles
from .tiling import AxisTiling, outer_mask, pieces


def neighborhood_attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rpb: Tensor | None,
    is_causal: tuple[bool, bool],
    scale: float,
) -> Tensor:
    """Tiles of queries against the one key tile that covers their neighborhoods; dilation groups are maps apart."""
    size = (q.shape[1], q.shape[2])
    rows, cols = _cheapest_tiles(size, kernel_size, dilation)
    axes = tuple(zip(size, kernel_size, dilation, is_causal, (rows, cols), strict=True))
    small = size[0] * size[1] * rows.keys * cols.keys <= SMALL_MASK
    mask = (_cached_mask if small else _mask)(*axes, q.device)
    bias = None if rpb is None else _tile_bias(rpb, rows, cols, kernel_size)
    out = TiledAttention(mask, TilePlan(rows, cols, scale))(*(_to_groups(x, dilation) for x in (q, k, v)), bias)
    return _from_groups(out, size)


def neighborhood_attention_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rpb: Tensor | None,
    is_causal: tuple[bool, bool],
    scale: float,
) -> Tensor:
    """The same by differentiable operations, whose tables become part of a traced graph."""
    size = (q.shape[1], q.shape[2])
    rows, cols = plan_tiles(size, kernel_size, dilation)
    seen = tile_mask(size, kernel_size, dilation, is_causal, rows, cols, q.device)
    bias = None if rpb is None else _tile_bias(rpb, rows, cols, kernel_size)
    attend = TiledAttention(TileMask.of(seen), TilePlan(rows, cols, scale)).graph
    out = attend(*(_to_groups(x, dilation) for x in (q, k, v)), bias)
    return _from_groups(out, size)


def _to_groups(x: Tensor, dilation: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, dy, dx, ceil(H / dy), ceil(W / dx), d); a view where no group is short."""
    (dy, dx), (height, width) = dilation, x.shape[1:3]
    if (dy, dx) != (1, 1):
        x = F.pad(x, (0, 0, 0, 0, 0, pieces(width, dx) * dx - width, 0, pieces(height, dy) * dy - height))
    x = x.unflatten(2, (-1, dx)).unflatten(1, (-1, dy))  # (B, Y, dy, X, dx, heads, d)
    return x.permute(0, 5, 2, 4, 1, 3, 6)


def _from_groups(x: Tensor, size: tuple[int, int]) -> Tensor:
    x = x.permute(0, 4, 2, 5, 3, 1, 6)  # (B, Y, dy, X, dx, heads, d)
    return x.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


@lru_cache(maxsize=256)
def _axis_tiling(length: int, kernel: int, dilation: int, tile: int) -> AxisTiling:
    """The tightest key tile that covers the neighborhoods of `tile` queries, wherever the tile lies."""
    longest = pieces(length, dilation)
    if tile >= longest:
        return AxisTiling(longest, longest)
    before = after = 0
    for group_length in {(length - g + dilation - 1) // dilation for g in (0, dilation - 1)}:
        for rank in range(group_length):
            start = min(max(rank - kernel // 2, 0), group_length - kernel)
            first = rank // tile * tile
            before = max(before, first - start)
            after = max(after, start + kernel - first - tile)
    return AxisTiling(longest, tile, before, after)


def plan_tiles(
    size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[AxisTiling, AxisTiling]:
    """Choose the tiles of least estimated work; one tile for the whole map where that is cheapest.

    A traced size that is a symbol gets a tiling that is right for every length.
    """
    if all(isinstance(length, int) for length in size):
        return _cheapest_tiles(size, kernel_size, dilation)
    return tuple(
        AxisTiling(pieces(length, step), TILES[-1], kernel - 1, kernel - 1)
        for length, kernel, step in zip(size, kernel_size, dilation, strict=True)
    )


@lru_cache(maxsize=256)
def _cheapest_tiles(
    size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[AxisTiling, AxisTiling]:
    return cheapest_tiles(
        *(
            {_axis_tiling(length, kernel, step, tile) for tile in (*TILES, length)}
            for length, kernel, step in zip(size, kernel_size, dilation, strict=True)
        )
    )


def _axis_mask(length: int, kernel: int, dilation: int, causal: bool, axis: AxisTiling, device: torch.device) -> Tensor:
    """(dilation, tiles, tile, keys) bool: the keys of its tile that a query of each group sees; none past the end."""
    group = torch.arange(dilation, device=device)[:, None, None, None]
    first = torch.arange(axis.tiles, device=device)[:, None, None] * axis.tile
    query = first + torch.arange(axis.tile, device=device)[:, None]
    key = first - axis.before + torch.arange(axis.keys, device=device)
    group_length = (length - group + dilation - 1) // dilation
    start = (query - kernel // 2).clamp(min=0).minimum(group_length - kernel)
    seen = (key >= start) & (key < start + kernel)
    if causal:
        seen = seen & (key <= query)
    return seen & (query < group_length)


def tile_mask(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    is_causal: tuple[bool, bool],
    rows: AxisTiling,
    cols: AxisTiling,
    device: torch.device,
) -> Tensor:
    """(groups * tiles, query tokens, key tokens) bool, True where the query sees the key; False past the end."""
    axes = zip(size, kernel_size, dilation, is_causal, (rows, cols), strict=True)
    return outer_mask(*(_axis_mask(*axis, device) for axis in axes))


@lru_cache(maxsize=256)
def _cached_axis_mask(*key) -> Tensor:
    with torch.inference_mode(False):  # a mask first made during inference must serve training too
        return _axis_mask(*key)


# Elements of a mask that is kept whole: joining that of a 7x7 map takes a tenth of the time of the op. Masks of larger
# maps are joined at every call, from one table an axis: kept, they would take the memory of as many logits.
SMALL_MASK = 1 << 18


def _mask(rows: tuple, cols: tuple, device: torch.device) -> TileMask:
    return TileMask.of(outer_mask(*(_cached_axis_mask(*axis, device) for axis in (rows, cols))))


@lru_cache(maxsize=64)
def _cached_mask(*key) -> TileMask:
    with torch.inference_mode(False):
        return _mask(*key)


def _tile_bias(rpb: Tensor, rows: AxisTiling, cols: AxisTiling, kernel_size: tuple[int, int]) -> Tensor:
    """(heads, query tokens, key tokens): the table laid out over a tile. The same for every tile: only ranks count."""
    cells = []
    for axis, kernel in zip((rows, cols), kernel_size, strict=True):
        query = torch.arange(axis.tile, device=rpb.device)[:, None]
        key = torch.arange(axis.keys, device=rpb.device) - axis.before
        cells.append((key - query + kernel - 1).clamp(0, 2 * kernel - 2))  # clamped cells are masked
    bias = rpb[:, cells[0][:, None, :, None], cells[1][None, :, None, :]]  # (heads, qy, qx, ky, kx)
    return bias.flatten(3, 4).flatten(1, 2)
