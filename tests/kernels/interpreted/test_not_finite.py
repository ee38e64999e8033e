"""A NaN in a key or value reaches the queries of tiles that see it, and no others."""

import pytest
import torch
from local_cases import Case, na, windows
from torch import Tensor

from foveate.kernels.local import launch as local
from foveate.kernels.local.plan import Pattern

CASES = [
    na((30, 20), (3, 3)),
    na((21, 18), (3, 5), (2, 1)),
    windows((8, 20), (4, 4), (1, 3)),
    Case("circle", (9, 19), {"radius": 3}),
]


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_nan_reaches_no_query_of_a_tile_that_does_not_see_it(case, which):
    (packed,), place = case.inputs(), (5, 3)
    before, (q, k, v) = case.call([packed], "fused"), packed.clone().unbind(3)
    (k if which == "key" else v)[0, place[0], place[1]] = torch.nan
    pattern = patterns(case)
    plan = local.Launch(q, k, v, pattern, 1.0, False, False).of("forward").plan
    reached = [tokens_reached(*a) for a in zip((plan.rows, plan.cols), case.size, pattern.dilation, place, strict=True)]
    after = case.call([torch.stack([q, k, v], 3)], "fused")
    far = ~(reached[0][:, None] & reached[1])
    assert far.any() and torch.equal(after[:, far], before[:, far]) and after.isnan().any()


def patterns(case: Case) -> Pattern:
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "launch_forward", lambda launch, *_: caught.append(launch.pattern))
        case.call(case.inputs(), "fused")
    return caught[0]


def tokens_reached(axis, length: int, dilation: int, place: int) -> Tensor:
    """The queries of one axis in tiles with a query that sees the key at a place."""
    reached, in_group = torch.zeros(length, dtype=torch.bool), len(range(place % dilation, length, dilation))
    for tile in range(axis.tiles(in_group)):
        _, low, high = axis.owned(tile, in_group)
        if any(
            first <= place // dilation < last for first, last in (axis.interval(x, in_group) for x in range(low, high))
        ):
            reached[torch.arange(low, high) * dilation + place % dilation] = True
    return reached
