"""The measurements behind the kernels' constants, with a clock that runs each call once."""

import pytest
import torch

from foveate.benchmarks import retune
from foveate.benchmarks.gpu_first_hour.sweep import SMALL_LAYERS, Layer, Setting
from foveate.kernels.local import launch_plan, plan
from foveate.kernels.local.plan import Pattern

WINDOWS = Layer("window 4, 8x8", Pattern("block", (4, 4)), 8, 1, 16, True)
SETTINGS = (Setting((8, 8), (4, 16), 4), Setting((4, 8), (2, 16), 2))


def once(call) -> float:
    call()
    return 10.0


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(retune, "SETTINGS", {"neighborhood": SETTINGS, "block": SETTINGS[:1]})
    monkeypatch.setattr(retune, "STAGES", (1, 3))
    monkeypatch.setattr(retune, "KERNELS", ("forward", "dbias"))
    monkeypatch.setattr(retune, "CANDIDATES", {"OWNERS_OF_A_WARP": (16, 32)} | dict.fromkeys(
        ("ONE_PASS_PROGRAMS", "PROGRAMS", "TAPS_GRAD_PROGRAMS"), (2, 64)
    ))  # fmt: skip


def test_every_kernel_is_timed_in_every_setting_and_nothing_stays_changed(few):
    before = (plan.ONE_PASS_PROGRAMS, launch_plan.PROGRAMS, launch_plan.one_pass_shape)
    found = retune.Tuner([*SMALL_LAYERS, WINDOWS], 1, "cpu", torch.float16, once).run()
    retune.time_taps_gradients(found, 0, "cpu", torch.float16, lambda call: 1.0)
    assert found.left_out == [] and before == (plan.ONE_PASS_PROGRAMS, launch_plan.PROGRAMS, launch_plan.one_pass_shape)
    assert {one.group for one in found.tiles} == {
        f"{layer.name} {kernel}" for layer in (*SMALL_LAYERS, WINDOWS) for kernel in ("forward", "dbias")
    }
    assert set(found.values) == {"OWNERS_OF_A_WARP", "ONE_PASS_PROGRAMS", "PROGRAMS", "TAPS_GRAD_PROGRAMS"}
    assert all(len(times) == 2 for groups in found.values.values() for times in groups.values())
    assert set(found.values["ONE_PASS_PROGRAMS"]) == {WINDOWS.name}


def test_the_work_of_a_setting_is_that_of_its_plan(few):
    tensors = retune.Tensors(SMALL_LAYERS[0], 2, "meta", torch.float16)
    logits, loaded, owned = retune.work_of(tensors, "forward", Setting((8, 8), (4, 16), 4))
    assert owned == 2 * 4 * 64  # four tiles of 8x8 cover 9x9
    assert logits % (2 * 64 * 64) == 0 and logits >= 4 * owned
    assert loaded == logits / (64 * 64) * 128


def test_a_setting_with_other_results_or_that_does_not_run_is_left_out(few, monkeypatch):
    tuner = retune.Tuner(SMALL_LAYERS, 1, "cpu", torch.float16, once)
    tensors = retune.Tensors(SMALL_LAYERS[0], 1, "cpu", torch.float16)
    tensors.run("forward")
    other = [torch.zeros_like(t) for t in tensors.written("forward")]
    assert tuner._us("layer", SETTINGS[0], tensors, "forward", other) is None
    monkeypatch.setattr(tuner, "us", lambda call: 1 / 0)
    assert tuner._us("layer", SETTINGS[1], tensors, "forward", other) is None
    assert tuner.found.left_out == [
        "layer 8x8/4x16 w4 s3: other results", "layer 4x8/2x16 w2 s3: ZeroDivisionError",
    ]  # fmt: skip
