"""How local attention is cut: every owner in one tile, every pair in one step. No Triton needed."""

from dataclasses import replace
from itertools import product

import pytest

from foveate.attention_ops.halo import axis_window as halo_window
from foveate.attention_ops.neighborhood import axis_window
from foveate.kernels.local.launch_plan import Sizes, full_precision, plan_launch
from foveate.kernels.local.plan import (
    Axis,
    Pattern,
    launch_shape,
    make_plan,
    one_pass_plan,
    share_images,
    stages_of,
)

CASES = [  # pattern, queries, keys; both axes differ, so that a swap shows
    (Pattern("neighborhood", (7, 3)), (56, 14), (56, 14)),
    (Pattern("neighborhood", (6, 13), causal=(True, False)), (11, 19), (11, 19)),
    (Pattern("neighborhood", (2, 7), dilation=(1, 2), causal=(True, True)), (30, 41), (30, 41)),
    (Pattern("neighborhood", (3, 4), dilation=(4, 3)), (30, 14), (30, 14)),
    (Pattern("neighborhood", (25, 2)), (33, 7), (33, 7)),
    (Pattern("neighborhood", (6, 9), stride=(5, 2), dilation=(2, 1)), (37, 24), (37, 24)),
    (Pattern("neighborhood", (4, 7), stride=(3, 7), causal=(True, True)), (26, 40), (26, 40)),
    (Pattern("block", (7, 12)), (21, 24), (21, 24)),
    (Pattern("block", (4, 2)), (12, 10), (12, 10)),
    (Pattern("block", (40, 5)), (40, 15), (40, 15)),
    (Pattern("block", (8, 7), (3, 2)), (16, 21), (16, 21)),
    (Pattern("block", (8, 4), (3, 5), (2, 2)), (7, 5), (13, 9)),
    (Pattern("circle", (4, 9), (3, 8)), (17, 30), (17, 30)),
    (Pattern("block", (7, 12), shift=(3, 5)), (21, 24), (21, 24)),
    (Pattern("block", (4, 2), shift=(0, 1)), (12, 10), (12, 10)),
    (Pattern("block", (40, 5), shift=(39, 4)), (40, 15), (40, 15)),
]


def seen_by(pattern, i, queries, keys):
    """The pairs (query, key) of one axis, by the tables of the ops' references."""
    if pattern.kind == "neighborhood":
        sizes = (pattern.keys[i], pattern.dilation[i], pattern.causal[i], pattern.stride[i])
        table, seen, _ = axis_window(queries, *sizes)
    elif pattern.shift != (0, 0):
        window_of = [(x - pattern.shift[i]) // pattern.keys[i] for x in range(queries)]
        return {(q, k) for q, k in product(range(queries), repeat=2) if window_of[q] == window_of[k]}
    elif pattern.kind == "block":
        table, seen, _ = halo_window(queries, keys, pattern.keys[i], pattern.reach[i], pattern.stride[i])
    else:
        return {(q, k) for q, k in product(range(queries), range(keys)) if abs(q - k) <= pattern.reach[i]}
    return {(q, int(k)) for q in range(queries) for k, ok in zip(table[q], seen[q], strict=True) if ok}


BY_BLOCK = [(*case, by_block) for case in CASES for by_block in (False, True)[: 1 + (case[0].kind == "block")]]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("walked", [32, 64])
@pytest.mark.parametrize(("pattern", "queries", "keys", "by_block"), BY_BLOCK, ids=str)
def test_every_pair_is_met_once(pattern, queries, keys, by_block, walked, inverse):
    plan = make_plan(pattern, queries, keys, walked, inverse=inverse, by_block=by_block)
    assert plan.walked in (walked, max(walked // 2, 32)) and 32 <= plan.owners <= 64
    for i, axis in enumerate((plan.rows, plan.cols)):
        owners, others = (keys[i], queries[i]) if inverse else (queries[i], keys[i])
        met = []
        for group in range(pattern.dilation[i]):
            in_group, walkable = (len(range(group, n, pattern.dilation[i])) for n in (owners, others))
            owned = []
            for tile in range(axis.tiles(in_group)):
                _, low, high = axis.owned(tile, in_group)
                owned += range(low, high)
                if low >= high:
                    continue
                first, last = axis.walked(tile, in_group, walkable)
                visits = -(-(last - first) // axis.walk_step) * axis.walk_split
                assert visits <= axis.walks
                tokens = []
                for step in range(visits):
                    width = min(axis.walk, axis.walk_step - step % axis.walk_split * axis.walk)
                    tokens += range(first + axis.walk_offset(step), first + axis.walk_offset(step) + width)
                for owner in range(low, high):
                    begin, end = axis.interval(owner, walkable)
                    assert first <= begin < end <= last
                    step = pattern.dilation[i]
                    met += [(owner * step + group, t * step + group) for t in tokens if begin <= t < end]
            assert owned == list(range(in_group))
        pairs = [(t, owner) if inverse else (owner, t) for owner, t in met if 0 <= t < others]
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == seen_by(pattern, i, queries[i], keys[i])


@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("kernel", range(1, 10))
def test_the_interval_of_a_key_is_that_of_the_queries_that_see_it(kernel, causal):
    for stride, length in product(range(1, kernel + 1), range(kernel, 25)):
        axis = Axis("neighborhood", kernel, 0, 1, causal, inverse=False, tile=4, stride=stride)
        pairs = neighborhood_pairs(length, kernel, stride, causal)
        seen = [[k for q, k in pairs if q == x] for x in range(length)]
        seers = [[q for q, k in pairs if k == x] for x in range(length)]
        assert [list(range(*axis.interval(x, length))) for x in range(length)] == seen
        inverse = replace(axis, inverse=True)
        assert [list(range(*inverse.interval(x, length))) for x in range(length)] == seers
        assert all(abs(q - k) < kernel for q, k in pairs)  # a bias table has a cell for every pair


def neighborhood_pairs(length, kernel, stride, causal):
    """(query, key) of one axis: the windows of leaders, by the words of the definition."""
    pairs = []
    for query in range(length):
        first = query - query % stride
        if causal:
            leader = min(first + stride - 1, length - 1)
            keys = range(max(leader - (kernel - 1), 0), query + 1)
        else:
            leader = min(first + stride // 2, length - 1)
            keys = range(kernel)
            while keys[-1] < length - 1 and keys[kernel // 2] < leader:
                keys = range(keys[0] + 1, keys[-1] + 2)
        pairs += [(query, key) for key in keys]
    return pairs


@pytest.mark.parametrize(
    ("pattern", "size", "logits"),
    [  # computed per query, of which the pattern needs kernel ** 2, window ** 2, (block + 2 * halo) ** 2
        (Pattern("neighborhood", (7, 7)), (56, 56), 256),
        (Pattern("neighborhood", (7, 7), dilation=(8, 8)), (56, 56), 84),
        (Pattern("block", (7, 7)), (56, 56), 84),
        (Pattern("block", (4, 4)), (56, 56), 64),
        (Pattern("block", (2, 2)), (56, 56), 64),
        (Pattern("block", (8, 8), (3, 3)), (64, 64), 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_the_work_per_token_is_what_it_was(pattern, size, logits, inverse):
    plan = make_plan(pattern, size, size, 64, inverse=inverse, by_block=False)
    tiles = 1
    for i, axis in enumerate((plan.rows, plan.cols)):
        tiles *= axis.tiles(-(-size[i] // pattern.dilation[i])) * pattern.dilation[i]
    computed = tiles * plan.owners * plan.steps * plan.walked / (size[0] * size[1])
    assert computed <= 1.3 * logits


def test_small_head_dims_walk_over_more_tokens():
    assert launch_shape("dkv", 128, 2, extra=False)[0] < launch_shape("dkv", 32, 2, extra=False)[0]
    assert launch_shape("forward", 32, 4, extra=False)[0] < launch_shape("forward", 32, 2, extra=False)[0]


CLOSED = [  # pattern, map: tiles that see themselves and nothing else
    (Pattern("neighborhood", (7, 7)), (7, 7)),
    (Pattern("neighborhood", (3, 4), causal=(True, False)), (8, 5)),
    (Pattern("neighborhood", (3, 5), dilation=(2, 3)), (15, 22)),
    (Pattern("neighborhood", (5, 4), stride=(3, 2)), (7, 8)),
    (Pattern("block", (7, 7)), (14, 21)),
    (Pattern("block", (2, 2)), (6, 10)),
    (Pattern("block", (3, 5)), (9, 10)),
    (Pattern("block", (4, 16)), (8, 32)),
    (Pattern("circle", (9, 3), (8, 2)), (7, 6)),
    (Pattern("block", (7, 3), shift=(4, 2)), (14, 21)),
    (Pattern("block", (2, 2), shift=(1, 0)), (6, 10)),
]


@pytest.mark.parametrize(("pattern", "size"), CLOSED, ids=str)
def test_one_pass_takes_tiles_that_see_only_themselves(pattern, size):
    plan = one_pass_plan(pattern, size)
    assert (plan.rows.tile, plan.cols.tile) == (plan.rows.walk, plan.cols.walk)
    for i, axis in enumerate((plan.rows, plan.cols)):
        step = pattern.dilation[i]
        home = {}
        for group in range(step):
            in_group = len(range(group, size[i], step))
            for tile in range(axis.tiles(in_group)):
                start, low, high = axis.owned(tile, in_group)
                assert (
                    start == low or start < low == 0
                )  # a tile begins with what it owns, and so do the tokens it walks over
                home |= {x * step + group: (group, tile) for x in range(low, high)}
        assert sorted(home) == list(range(size[i]))
        assert all(home[query] == home[key] for query, key in seen_by(pattern, i, size[i], size[i]))


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        (Pattern("neighborhood", (7, 7)), (9, 7)),
        (Pattern("neighborhood", (3, 3), dilation=(1, 3)), (7, 30)),
        (Pattern("block", (12, 12)), (12, 12)),
        (Pattern("block", (4, 4), (1, 0)), (4, 4)),
        (Pattern("block", (4, 4), stride=(2, 2)), (4, 4)),
        (Pattern("circle", (2, 2), (1, 1)), (7, 12)),
    ],
    ids=str,
)
def test_one_pass_refuses_what_sees_other_tiles(pattern, size):
    assert one_pass_plan(pattern, size) is None


@pytest.mark.parametrize(("units", "others"), [(1, 1), (128, 16), (8192, 3), (7, 6000), (1000, 7)])
def test_programs_share_units_evenly(units, others):
    shares = share_images(units, others)
    lengths = [len(range(share, units, shares)) for share in range(shares)]
    assert 1 <= shares <= units and max(lengths) - min(lengths) <= 1
    assert shares * others < 1536 + others


@pytest.mark.parametrize(
    ("kernel", "dim", "pattern", "tables", "precision"),
    [
        ("forward", 64, Pattern("neighborhood", (7, 7)), False, "tf32x3"),
        ("forward", 32, Pattern("neighborhood", (7, 7)), False, "ieee"),  # tiles of 32 owners
        ("dkv", 32, Pattern("block", (8, 8), (3, 3)), False, "tf32x3"),
        ("dkv", 32, Pattern("block", (8, 8), (3, 3)), True, "ieee"),
        ("dbias", 64, Pattern("block", (8, 8)), False, "ieee"),
    ],
)
def test_float32_keeps_its_digits_on_tensor_cores_of_sm_90_where_they_are_faster(
    kernel, dim, pattern, tables, precision
):
    assert [full_precision(capability) for capability in ((0, 0), (8, 0), (9, 0), (12, 0))] == [
        *("ieee", "ieee", "tf32x3", "ieee")
    ]
    for allowed, found in (("tf32x3", precision), ("ieee", "ieee"), ("tf32", "tf32")):
        sizes = Sizes(pattern, (56, 56), (56, 56), 8, 2, dim, dim, 4, allowed, kernel == "dbias", tables)
        assert plan_launch(kernel, sizes).constants["PRECISION"] == found


def test_a_loop_of_one_turn_is_not_pipelined():
    window, neighborhood = (
        make_plan(pattern, (56, 56), (56, 56), 64, inverse=False, by_block=False)
        for pattern in (Pattern("block", (7, 7)), Pattern("neighborhood", (7, 7)))
    )
    assert [stages_of("forward", plan, 3, extra=False) for plan in (window, neighborhood)] == [1, 3]
    assert stages_of("forward", window, 3, extra=True) == 3  # a bias is copied through shared memory
    assert stages_of("dbias", window, 3, extra=False) == 3  # it walks over images
