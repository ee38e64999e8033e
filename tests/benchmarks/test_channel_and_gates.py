"""The benchmark of channel attention, LKA and the gates: its plain chains compute the same, and wrong ones are told."""

import pytest
import timm
import torch
from torch import nn

from foveate.backbones._layers import MapGELU
from foveate.benchmarks import channel_and_gates
from foveate.benchmarks.channel_and_gates import (
    CASES,
    channel_case,
    eca_case,
    ela_case,
    lka_case,
    main,
    measure_model,
    measure_ops,
)

SMALL = {
    "channel": lambda **like: channel_case(2, 6, 2, 8, **like),
    "ECA": lambda **like: eca_case(2, 12, 5, **like),
    "ELA": lambda **like: ela_case(2, 32, 6, **like),
    "LKA": lambda **like: lka_case(2, 12, 7, **like),
}


@pytest.mark.parametrize("kind", SMALL)
def test_the_plain_chain_computes_the_same_with_every_gradient(kind):
    torch.manual_seed(0)
    case = SMALL[kind](device="cpu", dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    results = []
    for form in (case.ours, case.plain):
        out = form(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_every_op_has_a_row():
    assert {name.split()[0] for name in CASES} == {"channel", "ECA", "ELA", "LKA"}


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(channel_and_gates, "channel_gate", lambda x, weight: x)
    monkeypatch.setattr(channel_and_gates, "CASES", {"ECA": lambda batch, **like: SMALL["ECA"](**like)})
    with pytest.raises(RuntimeError, match="the two implementations differ by"):
        measure_ops(1, 1, "cpu")


def test_a_report_says_command_machine_and_ratios(monkeypatch, tmp_path, capsys):
    cases = {f"{name} small": lambda batch, make=make, **like: make(**like) for name, make in SMALL.items()}
    monkeypatch.setattr(channel_and_gates, "CASES", cases)
    main(["--rounds", "1", "--out", str(tmp_path / "out.txt")])
    for text in ((tmp_path / "out.txt").read_text(), capsys.readouterr().out):
        assert all(name in text for name in cases) and "ratio" in text
    assert "python -m foveate.benchmarks.channel_and_gates" in (tmp_path / "out.txt").read_text()


@pytest.fixture
def small_van(monkeypatch):
    create, small = timm.create_model, {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_classes": 3}
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, **small))
    monkeypatch.setattr(channel_and_gates, "IMAGE_PX", 64)


def test_the_plain_model_runs_in_nchw_with_the_same_weights(small_van):
    nets = channel_and_gates.models("cpu")
    kinds = {type(m) for m in nets["plain"].modules()}
    assert nn.GELU in kinds and MapGELU not in kinds and not nets["plain"].channels_last
    assert nets["ours"].channels_last
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(nets["ours"](x), nets["plain"](x))


def test_the_whole_model_is_compared(small_van):
    assert measure_model(1, 1, "cpu").row_count == 1
