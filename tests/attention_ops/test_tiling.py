"""Tiles cover the map, and scattering is the adjoint of gathering."""

import pytest
import torch

from foveate.attention_ops.neighborhood_cpu import Neighborhood
from foveate.attention_ops.tile_plan import TILES, tile_plan
from foveate.attention_ops.tiling import cut_axis, gather_keys, merge_queries, scatter_keys, split_queries

# (rows, columns): one tile, exact tiles, overhanging tiles, key tiles shorter and several times longer than a tile
PAIRS = [
    (cut_axis(6, 6), cut_axis(5, 5)),
    (cut_axis(12, 4, 2, 2), cut_axis(9, 3)),
    (cut_axis(10, 4, 3, 3), cut_axis(11, 8, 1, 2)),
    (cut_axis(7, 2, 5, 4), cut_axis(13, 5, 0, 12)),
]


@pytest.mark.parametrize(("rows", "cols"), PAIRS)
def test_merging_undoes_splitting(rows, cols):
    x = torch.randn(2, 3, rows.length, cols.length, 4)
    tiles = split_queries(x, rows, cols)
    assert tiles.shape == (2, 3, rows.tiles * cols.tiles, rows.tile * cols.tile, 4)
    assert torch.equal(merge_queries(tiles, rows, cols), x)


@pytest.mark.parametrize(("rows", "cols"), PAIRS)
def test_a_key_tile_holds_the_map_around_its_query_tile(rows, cols):
    x = torch.randn(2, rows.length, cols.length, 1)
    tiles = gather_keys(x, rows, cols).view(2, rows.tiles, cols.tiles, rows.keys, cols.keys)
    for i in range(rows.tiles):
        for j in range(cols.tiles):
            for a in range(rows.keys):
                for b in range(cols.keys):
                    y, z = i * rows.tile - rows.before + a, j * cols.tile - cols.before + b
                    inside = 0 <= y < rows.length and 0 <= z < cols.length
                    expected = x[:, y, z, 0] if inside else torch.zeros(2)
                    assert torch.equal(tiles[:, i, j, a, b], expected)


@pytest.mark.parametrize(("rows", "cols"), PAIRS)
def test_scattering_is_the_adjoint_of_gathering(rows, cols):
    x = torch.randn(2, rows.length, cols.length, 3, dtype=torch.float64)
    gathered = gather_keys(x, rows, cols)
    y = torch.randn_like(gathered)
    torch.testing.assert_close((gathered * y).sum(), (x * scatter_keys(y, rows, cols)).sum())


def plan(size, kernel_size, dilation):
    return tile_plan(Neighborhood(kernel_size, dilation, (False, False)), size)


def test_large_maps_are_cut_and_small_ones_are_not():
    rows, cols, *_ = plan((56, 70), (7, 7), (1, 1))
    assert rows.tile in TILES and cols.tile in TILES
    rows, cols, *_ = plan((7, 14), (7, 7), (1, 2))
    assert rows.tiles == cols.tiles == 1


@pytest.mark.parametrize("length", range(7, 40))
@pytest.mark.parametrize(("kernel", "dilation"), [(7, 1), (4, 1), (3, 2), (2, 3), (5, 1)])
def test_every_neighborhood_lies_inside_its_key_tile(length, kernel, dilation):
    if length < kernel * dilation:
        length += kernel * dilation
    rows, *_ = plan((length, length), (kernel, kernel), (dilation, dilation))
    for position in range(length):
        line = range(position % dilation, length, dilation)
        rank = position // dilation
        start = min(max(rank - kernel // 2, 0), len(line) - kernel)
        first = rank // rows.tile * rows.tile
        assert first - rows.before <= start and start + kernel <= first + rows.tile + rows.after
