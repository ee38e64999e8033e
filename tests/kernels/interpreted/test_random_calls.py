"""Random calls of the kernels agree with the papers' definitions, forward and backward."""

from collections.abc import Iterable

import pytest
from random_calls import MAKERS, Call, check, draw

from foveate.attention_ops._op import OPS, Impl
from foveate.kernels import register  # noqa: F401  registers the ops

FEW = 1  # calls of an op that a kernel runs
SEEDS = range(40)
SMALL = 20  # of the seeds: those of the smaller calls
MANY = range(1000, 1300)
LEAST = 100  # of them a kernel runs: the others have masks or biases that it does not take, or float64
OF_OTHERS = ("hilo_attention",)  # runs window_attention's kernels
WITH_KERNELS = [name for name in MAKERS if Impl.FUSED in OPS[name].bodies and name not in OF_OTHERS]


def by_kernel(calls: Iterable[Call], most: int) -> list[tuple[Call, str | None]]:
    """The first of the calls that a kernel runs, and what is wrong with each."""
    found = []
    for call in calls:
        try:
            found.append((call, check(call, "fused")))
        except NotImplementedError:  # the kernel says why
            continue
        if len(found) == most:
            break
    return found


def work(call: Call) -> int:
    """Tokens times heads, as a measure of the programs of a call."""
    return next(iter(call.tensors.values()))[..., 0].numel()


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_random_calls(name):
    calls = sorted((draw(name, seed) for seed in SEEDS), key=work)[:SMALL]
    found = by_kernel(sorted(calls, key=work, reverse=True), FEW)
    assert [wrong for _, wrong in found if wrong is not None] == []
    assert len(found) == FEW


@pytest.mark.parametrize("seed", [1012, 1133, 1163])
def test_owners_past_the_map_read_no_partial_sum(seed):
    """The map has fewer tokens than a tile, so that the walk over keys ends before the owners of the tile do."""
    assert check(draw("window_attention_lse", seed), "fused") is None


def test_tiles_past_a_short_dilation_group_read_no_bias():
    """7 columns in 3 groups: tiles of two columns, of which the groups of 2 columns have one and that of 3 has two."""
    assert check(draw("neighborhood_attention", 1033), "fused") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_hundreds_of_random_calls(name):
    found = by_kernel((draw(name, seed) for seed in MANY), len(MANY))
    assert [wrong for _, wrong in found if wrong is not None] == []
    assert len(found) >= LEAST
