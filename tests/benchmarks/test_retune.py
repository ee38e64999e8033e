"""Constants from synthetic timings, the text to paste, and a run without a GPU."""

import random
import subprocess
import sys

import pytest
import torch

from foveate.benchmarks._fit import MARGIN, Timed, fastest, fit_costs

MODULE = "foveate.benchmarks.retune"


def synthetic(program, step, noise=0.0, groups=4, settings=6):
    """Times that the model gives for random tiles, times a number of each group."""
    rng = random.Random(0)
    timed = []
    for group in range(groups):
        unit = rng.uniform(1e-4, 1e-3)
        for _ in range(settings):
            logits, loaded, owned = rng.uniform(1e5, 1e6), rng.uniform(2e3, 5e4), rng.uniform(1e2, 5e3)
            us = unit * (logits + step * loaded + program * owned) * (1 + rng.uniform(-noise, noise))
            timed.append(Timed(group, logits, loaded, owned, us))
    return timed


@pytest.mark.parametrize(("program", "step"), [(100, 7), (0, 0), (350, 21.5)])
def test_the_overheads_that_made_the_times_are_found(program, step):
    assert fit_costs(synthetic(program, step)) == (program, step)


def test_noise_moves_them_little():
    program, step = fit_costs(synthetic(100, 7, noise=0.02, groups=10, settings=12))
    assert abs(program - 100) <= 30 and abs(step - 7) <= 2


def test_slow_groups_count_no_more_than_fast_ones():
    timed = synthetic(100, 7)
    slow = [Timed("slow", t.logits, t.loaded, t.owned, 1000 * t.us) for t in timed if t.group == 0]
    assert fit_costs(timed + slow) == (100, 7)


@pytest.mark.parametrize("timed", [[], synthetic(1, 1, groups=3, settings=2)], ids=["none", "two of each"])
def test_too_few_times_are_refused(timed):
    with pytest.raises(ValueError, match="at least three timings of one layer and kernel"):
        fit_costs(timed)


def test_the_value_of_least_time_over_all_layers_is_taken():
    times = {"a": {1: 10.0, 2: 8.0, 3: 20.0}, "b": {1: 100.0, 2: 90.0, 3: 10.0}}
    assert fastest(times, 1) == 3  # twice as slow here, ten times as fast there
    assert fastest({"a": times["a"]}, 1) == 2


def test_a_small_gain_is_noise():
    assert fastest({"a": {1: 100.0, 2: 100.0 * (1 - MARGIN / 2)}}, 1) == 1
    assert fastest({"a": {1: 100.0, 2: 100.0 * (1 - 2 * MARGIN)}}, 1) == 2


def test_a_value_that_a_layer_cannot_run_is_not_taken():
    assert fastest({"a": {1: 10.0, 2: 1.0}, "b": {1: 10.0}}, 1) == 1


@pytest.mark.parametrize("times", [{}, {"a": {2: 1.0}}])
def test_without_a_time_for_the_value_in_use_nothing_is_chosen(times):
    with pytest.raises(ValueError, match="every group needs a time for the value in use, 1"):
        fastest(times, 1)


def test_without_a_gpu_it_is_one_line_and_code_2():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", MODULE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{MODULE}: needs an NVIDIA GPU, to measure the kernels on it; torch finds none\n"


def test_chosen_constants_are_python_that_names_known_constants():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from foveate.benchmarks import retune
    from foveate.kernels.local import launch_plan, plan

    found = retune.Timings(synthetic(100, 7), left_out=["a layer: OutOfResources"])
    found.values = {
        name: {"a layer": {v: 10.0 - (v == values[0]) for v in (*values, getattr(module, name, 16))}}
        for (name, values), module in zip(
            retune.CANDIDATES.items(), (launch_plan, plan, retune.launch, retune.gates_plan), strict=True
        )
        if name != "OWNERS_OF_A_WARP"
    }
    found.values["OWNERS_OF_A_WARP"] = {"a layer": {8: 9.0, 16: 10.0, 32: 9.5}}
    key = ("forward", 32, 2, False)
    found.stages = {key: {"a layer": {1: 5.0, 3: 10.0}}, ("dq", 32, 2, False): {"a layer": {3: 5.0, 2: 10.0}}}
    text = retune.as_python(retune.choose(found), found, "GPU      some card")
    made: dict = {}
    exec(text, made)
    assert (made["PROGRAM_OVERHEAD"], made["STEP_OVERHEAD"], made["ONE_PASS_PROGRAMS"]) == (100, 7, 384)
    assert (made["OWNERS_OF_A_WARP"], made["STAGES"]) == ({2: 8, 4: 8}, {key: 1})
    assert (made["PROGRAMS"], made["TAPS_GRAD_PROGRAMS"]) == (256, 256)
    for name, module in (("STAGES", plan), ("PROGRAM_OVERHEAD", plan), ("OWNERS_OF_A_WARP", launch_plan)):
        assert type(made[name]) in (type(getattr(module, name)), float)
    assert "# GPU      some card" in text and "OutOfResources" in text


def test_constants_that_are_pasted_change_the_launch(monkeypatch):
    from foveate.kernels.local import launch_plan, plan

    shape = ("dq", 32, 2, False)
    walked, stages = plan.launch_shape(*shape)
    monkeypatch.setitem(plan.STAGES, shape, stages + 1)
    monkeypatch.setitem(launch_plan.OWNERS_OF_A_WARP, 2, 32)
    assert plan.launch_shape(*shape) == (walked, stages + 1)
    assert (launch_plan.warps(64, 2), launch_plan.warps(64, 4)) == (2, 8)
