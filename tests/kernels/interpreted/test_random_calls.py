"""Random calls of the kernels agree with the papers' definitions, forward and backward."""

import pytest
from random_calls import MAKERS, Call, check, draw

from foveate.kernels import register  # noqa: F401  registers the ops

SEEDS = range(40)
FEW = 1  # calls of an op that a kernel runs
MANY = range(1000, 1300)
NONE = ("hilo_attention", "dense")  # of window_attention's kernels, and of torch's


def by_kernel(name: str, seeds: range) -> list[tuple[Call, str | None]]:
    """The calls among those of the seeds that a kernel runs, and what is wrong with each."""
    found = []
    for seed in seeds:
        call = draw(name, seed)
        if name == "large_kernel_attention":  # for inference
            call.needed = frozenset()
        try:
            found.append((call, check(call, "fused")))
        except NotImplementedError:  # the kernel says why
            continue
        if len(found) == FEW and seeds is SEEDS:
            break
    return found


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in NONE])
def test_random_calls(name):
    found = by_kernel(name, SEEDS)
    assert [wrong for _, wrong in found if wrong is not None] == []
    assert len(found) == FEW


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in NONE])
def test_hundreds_of_random_calls(name):
    found = by_kernel(name, MANY)
    assert [wrong for _, wrong in found if wrong is not None] == []
    assert len(found) > len(MANY) // 2
