"""The routed attention benchmark: its gathering form computes the same, and wrong results are not timed."""

import pytest
import timm
import torch

from foveate.attention_ops import BiLevelRoutingAttention
from foveate.benchmarks import routed_attention
from foveate.benchmarks.routed_attention import LARGE, SHAPES, GatheringAttention, _cells, calls, cut, join, main

SMALL = (14, 21, 2, 3)


def test_joining_undoes_cutting():
    x = torch.randn(2, 6, 12, 3)
    assert torch.equal(join(cut(x, (2, 3)), (6, 12), (2, 3)), x)
    assert torch.equal(cut(x, (2, 3))[:, 1], x[:, :2, 3:6].flatten(1, 2))  # regions are row-major


def test_both_forms_agree_with_every_gradient():
    forms, leaves = calls(SMALL, 2, "cpu")
    grads = []
    for call in forms.values():
        inputs = [leaf.requires_grad_() for leaf in leaves]
        grads.append(torch.autograd.grad(call().square().sum(), inputs))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_the_layer_of_the_whole_model_agrees():
    torch.manual_seed(0)
    ours, x = BiLevelRoutingAttention(32, 2, regions=3, topk=2), torch.randn(2, 6, 9, 32)
    torch.testing.assert_close(GatheringAttention(ours)(x), ours(x), rtol=1e-4, atol=1e-5)


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(routed_attention, "gather_attention", lambda q, k, v, routes, heads, scale: q)
    with pytest.raises(AssertionError, match="not close"):
        _cells(SMALL, 1, 1, "cpu")


def test_the_papers_maps_and_a_large_image_are_in_the_table():
    assert {shape[:3] for shape in SHAPES} >= {(56, 56, 2), (28, 28, 4), (14, 14, 8)}
    assert {1, 4, 16} == {topk for rows, _, _, topk in SHAPES if rows == 56} and LARGE in SHAPES


def test_a_report_says_command_machine_and_ratios(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(routed_attention, "SHAPES", [SMALL])
    main(["--batch", "1", "--rounds", "1", "--out", str(tmp_path / "out.txt")])
    for text in ((tmp_path / "out.txt").read_text(), capsys.readouterr().out):
        assert "14x21, 2, 3" in text and "ratio" in text and "memory" in text
    assert "python -m foveate.benchmarks.routed_attention" in (tmp_path / "out.txt").read_text()


def test_the_whole_model_is_compared_with_its_gathering_twin(monkeypatch, capsys):
    create = timm.create_model
    small = {"dims": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "num_classes": 3}
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, **small))
    monkeypatch.setattr(routed_attention, "IMAGE_SIZES", (224,))
    main(["model", "--batch", "1", "--rounds", "1"])
    assert "BiFormer-T" in capsys.readouterr().out
    nets = routed_attention.models("cpu")
    kinds = {name: {type(m) for m in net.modules()} for name, net in nets.items()}
    assert GatheringAttention in kinds["gather"] and GatheringAttention not in kinds["ours"]
