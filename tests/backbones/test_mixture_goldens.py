"""Flowformer and MoH-ViT against their official code, through the door that users' checkpoints take.

MoH is compared in float64: which heads a token takes is discontinuous, and rounding in float32 may choose others.
"""

import zlib
from importlib import import_module

import numpy as np
import pytest
import timm
import torch

from foveate.attention_ops import load_balance_loss

MOH = ["moh__moh_transnext_small_75", "moh__moh_transnext_base_50"]
FLOW = "flowformer__flowformer_cv_96_tiny"


@pytest.fixture
def official(det, golden, tmp_path):
    """A function from a golden's name, and keywords, to its JSON, its logits, our model, and the official keys."""

    def load(name, **keywords):
        facts, logits = golden(name)
        weights = det.det_state_dict(facts["state_dict"], facts["mul"])
        torch.save({"model": weights}, tmp_path / "official.pth")
        overlay = {"file": str(tmp_path / "official.pth")}
        keywords = {**facts["kwargs"], **keywords}
        model = timm.create_model(facts["variant"], pretrained=True, pretrained_cfg_overlay=overlay, **keywords).eval()
        names = import_module(type(model).__module__)._our_key
        return facts, logits, model, {names(key): key for key in weights}

    return load


def check_input(model, facts_of_input, logits, det, dtype, tolerance):
    x = torch.from_numpy(det.det_input(facts_of_input["shape"], facts_of_input["seed"])).to(dtype)
    with torch.no_grad():
        out, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
    wanted = logits[facts_of_input["name"]]
    assert np.abs(out.numpy() - wanted).max() <= tolerance * wanted.std(), facts_of_input["name"]
    for i, ours in enumerate(maps):
        stage = facts_of_input["stages"][f"stage{i}"]
        flat = ours.permute(0, 2, 3, 1).flatten().numpy()  # recorded as tokens
        picked = flat[np.linspace(0, flat.size - 1, len(stage["samples"])).astype(int)]
        assert np.abs(picked - stage["samples"]).max() <= 5e-5 * stage["std"], (facts_of_input["name"], i)


def check_gradients(model, facts, keys, det, dtype):
    given = facts["inputs"][0]
    out = model(torch.from_numpy(det.det_input(given["shape"], given["seed"])).to(dtype))
    (out * torch.from_numpy(det.det_input(out.shape, 7)).to(dtype)).mean().backward()
    wrong = []
    for key, parameter in model.named_parameters():
        name = keys[key]
        if name not in facts["grads"]:
            continue
        recorded, grad = facts["grads"][name], parameter.grad.double()
        shape = next(shape for key, shape, _ in facts["state_dict"] if key == name)
        probe = torch.from_numpy(det.det_input(shape, zlib.crc32(f"grad:{name}".encode()))).double().view_as(grad)
        off = max(abs(float(grad.norm()) - recorded["l2"]), abs(float((grad * probe).sum()) - recorded["dot"]))
        if not off <= 1e-4 * recorded["l2"]:
            wrong.append((name, off / recorded["l2"]))
    assert wrong == []


def test_flowformer_equals_the_official_code_with_every_gradient(det, official):
    facts, logits, model, keys = official(FLOW)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    check_input(model, facts["inputs"][0], logits, det, torch.float32, 5e-5)
    check_gradients(model, facts, keys, det, torch.float32)


def case(name, index, slow=True):
    marks = pytest.mark.slow if slow else ()
    return pytest.param(name, index, marks=marks, id=f"{name}-{index}")


@pytest.mark.parametrize(
    ("name", "index"),
    [case(MOH[0], 0, slow=False), *(case(MOH[0], i) for i in (1, 2, 3)), *(case(MOH[1], i) for i in (0, 1, 2))],
)
def test_moh_equals_the_official_code_in_float64_at_every_recorded_size(name, index, det, official, golden):
    given = golden(name)[0]["inputs"][index]
    facts, logits, model, _ = official(name, **given["kwargs"])
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    check_input(model.double(), given, logits, det, torch.float64, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", MOH)
def test_gradients_and_balance_of_moh_equal_the_official_ones(name, det, official):
    facts, _, model, keys = official(name)
    check_gradients(model.double().train(), facts, keys, det, torch.float64)
    wanted = sum(facts["load_balance"]["l_aux"]) / len(facts["load_balance"]["l_aux"])
    assert abs(float(load_balance_loss(model)) / wanted - 1) < 1e-5
