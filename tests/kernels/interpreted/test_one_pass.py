"""The backward pass in one kernel, in the interpreter: exact where tiles see only themselves, not taken elsewhere."""

from collections.abc import Iterator

import pytest
import torch
from local_cases import Case, errors, halos, na, results, windows

from foveate.kernels.local import launch as local
from foveate.kernels.local import launch_plan, plan

# Windows, one or several in a tile, some tiles overhanging; maps and dilation groups of one tile, also causal
CLOSED = [
    na((7, 7), (7, 7), table=True, heads=2),
    na((8, 5), (3, 4), causal=(True, False), table=True),
    na((15, 22), (3, 5), (2, 3), table=True),
    na((21, 14), (6, 7), (3, 2), dim=24),
    Case("window", (14, 21), {"window_size": (7, 7)}, table=True, heads=2),
    Case("window", (6, 10), {"window_size": (2, 2)}, table=True),
    Case("window", (9, 10), {"window_size": (3, 5)}, table=True, dim=20),
    Case("window", (12, 20), {"window_size": (4, 4)}),
    Case("window", (8, 32), {"window_size": (4, 16)}, table=True),
    Case("window", (3, 2), {"window_size": (1, 1)}),
    Case("circle", (7, 6), {"radius": 4}, heads=2),
    halos((6, 10), (4, 4), (0, 0), value_dim=24),
    na((7, 8), (5, 4), stride=(3, 2), table=True),
    windows((14, 21), (7, 7), (3, 4), table=True, heads=2),
    windows((6, 10), (2, 5), (1, 0), table=True),
    windows((6, 10), (2, 2), (1, 1), value_dim=24),
]
OPEN = [
    na((9, 7), (7, 7), table=True),
    na((11, 19), (4, 6), (1, 3)),
    Case("window", (12, 12), {"window_size": (12, 12)}, table=True),
    Case("circle", (7, 12), {"radius": 2}),
    halos((7, 8), (7, 8), (1, 0)),
    halos((8, 8), (8, 8), (0, 0), table=True),
    halos((8, 8), (8, 8), (0, 0), 2),
]
every_closed = pytest.mark.parametrize("case", CLOSED, ids=str)


@pytest.fixture
def one_pass(monkeypatch) -> Iterator[list[int]]:
    """Take the kernel for float32 too; the programs of every launch."""
    programs, plain = [], local.launch_one_pass
    monkeypatch.setattr(launch_plan, "one_pass_shape", lambda *_: 1)

    def note(launch, *arguments):
        programs.append(local.plan_one_pass("backward", launch.sizes)[0].grid[0])
        return plain(launch, *arguments)

    monkeypatch.setattr(local, "launch_one_pass", note)
    local.plan_one_pass.cache_clear()
    yield programs
    local.plan_one_pass.cache_clear()


@every_closed
def test_all_gradients_are_those_of_the_definition(case, one_pass):
    inputs = case.inputs(batch=2)
    exact = results(case, [x.double() for x in inputs], "reference")
    assert max(errors(results(case, inputs, "fused"), exact)) < 1e-5
    assert len(one_pass) == 1


@pytest.mark.parametrize("case", OPEN, ids=str)
def test_what_sees_other_tiles_takes_the_other_kernels(case, one_pass):
    inputs = case.inputs()
    exact = results(case, [x.double() for x in inputs], "reference")
    assert max(errors(results(case, inputs, "fused"), exact)) < 1e-5
    assert one_pass == []


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("case", [CLOSED[2], CLOSED[5]], ids=str)
def test_programs_share_the_tiles_of_all_images(case, programs, one_pass, monkeypatch):
    monkeypatch.setattr(plan, "ONE_PASS_PROGRAMS", programs)
    inputs = case.inputs(batch=3)
    exact = results(case, [x.double() for x in inputs], "reference")
    assert max(errors(results(case, inputs, "fused"), exact)) < 1e-5
    groups = case.heads * (6 if case.op == "neighborhood" else 1)
    assert one_pass[0] % groups == 0 and (one_pass[0] <= max(programs, groups))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CLOSED[0], CLOSED[5], CLOSED[6]], ids=str)
def test_16_bits_take_it_and_are_as_good_as_three_kernels(case, dtype, one_pass, monkeypatch):
    inputs = case.inputs(dtype, batch=2)
    exact = results(case, [x.double() for x in inputs], "reference")
    ours = errors(results(case, inputs, "fused"), exact)
    monkeypatch.setattr(launch_plan, "one_pass_shape", lambda *_: None)
    local.plan_one_pass.cache_clear()
    others = errors(results(case, inputs, "fused"), exact)
    assert len(one_pass) == 1
    for mine, theirs in zip(ours, others, strict=True):
        assert mine <= 1.5 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("case", [CLOSED[0], CLOSED[6]], ids=str)
def test_two_runs_give_the_same_bits(case, one_pass):
    first, second = (results(case, case.inputs(torch.bfloat16, batch=2), "fused") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", ["packed", "table"])
def test_only_what_is_asked_for_gets_a_gradient(wanted, one_pass):
    packed, table = CLOSED[4].inputs()
    leaves = {"packed": packed, "table": table}
    leaves[wanted].requires_grad_()
    grads = {}
    for impl in ("fused", "tiled"):
        leaves[wanted].grad = None
        CLOSED[4].call([packed, table], impl).square().sum().backward()
        grads[impl] = leaves[wanted].grad
    assert len(one_pass) == 1 and leaves["table" if wanted == "packed" else "packed"].grad is None
    torch.testing.assert_close(grads["fused"], grads["tiled"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [CLOSED[5], CLOSED[6]], ids=str)
def test_nothing_is_read_or_written_outside_the_tensors(case, one_pass, fenced, fenced_allocations):
    inputs = [fenced(x) for x in case.inputs(batch=2)]
    found = results(case, inputs, "fused")
    assert len(fenced_allocations) >= 4  # out, lse, the gradients of q, k and v, and the sums of the table
    exact = results(case, [x.double() for x in inputs], "reference")
    assert max(errors(found, exact)) < 1e-5
