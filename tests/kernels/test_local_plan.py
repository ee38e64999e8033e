"""How local attention is cut: every owner in one tile, every pair in one step. No Triton needed."""

from dataclasses import replace
from itertools import product

import pytest

from foveate.attention_ops.halo import axis_window as halo_window
from foveate.attention_ops.neighborhood import axis_window
from foveate.kernels.local.plan import Axis, Pattern, launch_shape, make_plan

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
]


def seen_by(pattern, i, queries, keys):
    """The pairs (query, key) of one axis, by the tables of the ops' references."""
    if pattern.kind == "neighborhood":
        sizes = (pattern.keys[i], pattern.dilation[i], pattern.causal[i], pattern.stride[i])
        table, seen, _ = axis_window(queries, *sizes)
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
    assert plan.walked == walked and 16 <= plan.owners <= 64
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
