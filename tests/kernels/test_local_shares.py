"""How the bias gradient's work is shared out: every (image, tile) pair once, tiles of a slot alike. No Triton."""

from itertools import product

import pytest

from foveate.kernels.local.plan import Pattern, make_plan, one_pass_plan
from foveate.kernels.local.shares import distances, groups_of, share_out

CASES = [  # pattern, map
    (Pattern("neighborhood", (7, 7)), (56, 56)),
    (Pattern("neighborhood", (7, 3)), (200, 304)),
    (Pattern("neighborhood", (13, 9)), (13, 14)),
    (Pattern("neighborhood", (25, 2)), (33, 7)),
    (Pattern("neighborhood", (41, 40)), (170, 41)),
    (Pattern("neighborhood", (6, 13), causal=(True, False)), (61, 79)),
    (Pattern("neighborhood", (3, 4), dilation=(4, 3)), (130, 44)),
    (Pattern("neighborhood", (7, 9), dilation=(2, 3), stride=(5, 2)), (137, 94)),
    (Pattern("neighborhood", (7, 7), stride=(3, 7), causal=(True, True)), (66, 140)),
    (Pattern("block", (7, 12)), (21, 96)),
    (Pattern("block", (4, 2)), (12, 100)),
    (Pattern("block", (40, 5)), (80, 15)),
    (Pattern("block", (12, 7), shift=(5, 3)), (24, 70)),
    (Pattern("block", (2, 20), shift=(1, 0)), (30, 60)),
]
every_case = pytest.mark.parametrize(("pattern", "size"), CASES, ids=str)


def plan_of(pattern, size, inverse=False):
    return make_plan(pattern, size, size, 64, inverse=inverse, by_block=False)


@pytest.mark.parametrize("works", [1, 9, 40, 10_000])
@pytest.mark.parametrize("images", [1, 5])
@every_case
def test_every_tile_of_every_image_is_met_once(pattern, size, images, works):
    plan = plan_of(pattern, size)
    shares = share_out(pattern, plan, size, images, works)
    assert 1 <= shares.images <= images
    for i, (axis, classes) in enumerate(((plan.rows, shares.rows), (plan.cols, shares.cols))):
        groups = [len(range(g, size[i], pattern.dilation[i])) for g in range(pattern.dilation[i])]
        assert sorted(groups, reverse=True) == [
            n for count, n in groups_of(size[i], pattern.dilation[i]) for _ in range(count)
        ]
        for (count, length), slots in zip(groups_of(size[i], pattern.dilation[i]), classes, strict=True):
            tiles = [list(slots.of(slot)) for slot in range(slots.total)]
            assert sorted(tile for slot in tiles for tile in slot) == list(range(axis.tiles(length) if count else 0))
            found = distances(axis, length, length) if count else []
            assert all(len({found[tile] for tile in slot}) == 1 for slot in tiles)


@pytest.mark.parametrize("works", [32, 128])
def test_as_many_programs_as_asked_for_share_large_maps_evenly(works):
    pattern, size = CASES[1]
    plan = plan_of(pattern, size)
    shares = share_out(pattern, plan, size, 4, works)
    assert works / 2 < shares.works <= works
    longest = [max(len(slots.of(slot)) for slot in range(slots.total)) for slots, _ in (shares.rows, shares.cols)]
    tiles = plan.rows.tiles(size[0]) * plan.cols.tiles(size[1])
    assert longest[0] * longest[1] <= 2.5 * tiles / works


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@every_case
def test_walked_tokens_lie_no_further_from_owners_than_the_layout_of_biases_reaches(pattern, size, inverse):
    plan = plan_of(pattern, size, inverse)
    for i, axis in enumerate((plan.rows, plan.cols)):
        for count, length in groups_of(size[i], pattern.dilation[i]):
            found = distances(axis, length, length) if count else []
            if pattern.kind == "block":
                assert found == [-(tile % axis.split) * axis.tile for tile in range(len(found))]
                continue
            for distance, m, step, n in product(
                set(found), (0, axis.tile - 1), (0, axis.walks - 1), (0, axis.walk - 1)
            ):
                line = distance - m + axis.walk_offset(step) + n + axis.lead
                assert 0 <= line < axis.lines and 0 <= line - n < axis.shifts


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        (Pattern("neighborhood", (7, 7)), (7, 7)),
        (Pattern("neighborhood", (3, 4), causal=(True, False)), (8, 5)),
        (Pattern("neighborhood", (3, 5), dilation=(2, 3), stride=(2, 3)), (15, 22)),
        (Pattern("block", (7, 3), shift=(2, 1)), (14, 21)),
    ],
    ids=str,
)
def test_tiles_that_see_only_themselves_walk_from_their_start(pattern, size):
    plan = one_pass_plan(pattern, size)
    for i, axis in enumerate((plan.rows, plan.cols)):
        assert {d for count, n in groups_of(size[i], pattern.dilation[i]) if count for d in distances(axis, n, n)} == {
            0
        }
