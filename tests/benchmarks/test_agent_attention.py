"""The agent attention benchmark: its forms compute the same as the official layers, and wrong results are not timed."""

import pytest
import timm
import torch

from foveate.attention_ops import AgentAttention
from foveate.benchmarks import agent_attention
from foveate.benchmarks.agent_attention import AuthorsForm, _cells, authors_model, layers, main, op_calls

SMALL = ((5, 6), 1, 2, 8, 9)
ON_TOKENS = ("swin_24_h3_a16_11", "deit_48_h3_a49_14", "deit_32_h2_a25_9")


@pytest.mark.parametrize("name", ON_TOKENS)
@pytest.mark.parametrize("sdpa", [False, True])
def test_the_authors_form_equals_the_official_layer(name, sdpa, det, golden, relative_error):
    cases, arrays = golden("module__agent")
    case, c = cases["cases"][name], cases["cases"][name]["ctor"]
    prefix = int(c["cls"].startswith("agent_deit"))
    size = (c["window"],) * 2 if prefix else tuple(c["window_size"])
    layer = AgentAttention(c["dim"], c["num_heads"], map_size=size, agents=c["agent_num"], prefix_tokens=prefix)
    layer.load_state_dict(det.det_state_dict(case["state_dict"], case["mul"], case["gain"]))
    x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
    assert relative_error(AuthorsForm(layer, sdpa)(x, size), arrays[f"{name}__out"]) < 1e-5


def test_all_forms_agree():
    calls = op_calls(SMALL, 2)
    for call in calls.values():
        torch.testing.assert_close(call(), calls["ours"](), rtol=1e-4, atol=1e-5)
    forms, x = layers(SMALL, 2)
    for form in forms.values():
        torch.testing.assert_close(form(x), forms["ours"](x), rtol=1e-4, atol=1e-5)


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(agent_attention, "with_sdpa", lambda few, k, v, q, to, of: q)
    with pytest.raises(AssertionError):
        _cells(SMALL, 1, 1)


def test_a_model_in_the_authors_form_gives_the_logits_of_ours(monkeypatch):
    create = timm.create_model
    small = {"dims": (16, 32), "depths": (1, 1), "heads": (2, 4), "agent_num": (4, 9), "attn_type": "AA"}
    small |= {"img_size": 64, "num_classes": 3, "mlp_ratios": (2, 2), "agent_sr_ratios": "11", "sr_ratios": "11"}
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, **small))
    theirs = authors_model("agent_pvt_tiny")
    torch.manual_seed(0)
    ours, x = timm.create_model("agent_pvt_tiny").eval(), torch.randn(2, 3, 64, 64)
    assert sum(isinstance(m, AuthorsForm) for m in theirs.modules()) == 2
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


def test_a_report_says_command_machine_and_ratios(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(agent_attention, "SHAPES", {"small": SMALL})
    main(["--batch", "1", "--rounds", "1", "--out", str(tmp_path / "out.txt")])
    for text in ((tmp_path / "out.txt").read_text(), capsys.readouterr().out):
        assert "small" in text and "authors / fused" in text
    assert "python -m foveate.benchmarks.agent_attention" in (tmp_path / "out.txt").read_text()
