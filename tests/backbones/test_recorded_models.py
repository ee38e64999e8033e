"""Families whose weights are joined or renamed on the way, against recorded outputs of the official code."""

import math
import zlib
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from torch.func import functional_call

import foveate  # noqa: F401  (registers the models)

MODELS = ["kdgqa__vit_s_kdgqa_kv3", "kdgqa__vit_s_pgqa_kv3", "ninformer__cifar10"]
MODELS += ["ulsam__mv1_g4_pos12", "ulsam__mv1_g4_rep12", "ulsam__mv2_g4_rep14_17"]
TOLERANCE = 5e-5  # of the standard deviation
# Of the norm of a gradient, in float64: the recorded float32 has some ReLU6 on the other side of its corner
GRADIENT_TOLERANCE = {"ulsam__mv2_g4_rep14_17": 5e-4, "ulsam__mv1_g4_rep12": 3e-3}
FAST = ("ninformer__cifar10", "ulsam__mv1_g4_pos12", "ulsam__mv2_g4_rep14_17")
every_model = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)


def sampled(tensor, count):
    flat = tensor.detach().contiguous().flatten().double().numpy()
    return flat[np.linspace(0, flat.size - 1, count).astype(int)]


@pytest.fixture
def recorded_noise(det, monkeypatch):
    """Let torch.rand give the recorded draws: uniform numbers from normal ones, one more seed at every call."""

    def start():
        calls = iter(range(100, 10_000))

        def rand(*shape, dtype=torch.float32, **_):
            normal = torch.from_numpy(det.det_input(shape, next(calls))).double()
            return (0.5 * (1 + torch.erf(normal / math.sqrt(2)))).to(dtype)

        monkeypatch.setattr(torch, "rand", rand)

    return start


def built(facts, given, weights, tmp_path):
    torch.save(weights, tmp_path / "official.pth")
    keywords = {**facts["keywords"], **given["keywords"]}
    overlay = {"file": str(tmp_path / "official.pth"), "num_classes": facts["state_dict"][-1][1][0]}
    return timm.create_model(facts["variant"], pretrained=True, pretrained_cfg_overlay=overlay, **keywords).eval()


def outputs(model, x, modules):
    """The logits, and the outputs of named modules."""
    found, handles = {}, []
    for name in modules:
        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out)))
    with torch.no_grad():
        found["logits"] = model(x)
    for handle in handles:
        handle.remove()
    return found


@every_model
def test_logits_and_layers_equal_the_official_ones(name, det, golden, tmp_path, recorded_noise):
    facts, logits = golden(name)
    for given in facts["inputs"]:
        shapes = [[k, given_shape(k, s, given), d] for k, s, d in facts["state_dict"]]
        weights = det.det_state_dict(shapes, facts["mul"], facts["gain"])
        model = built(facts, given, weights, tmp_path)
        if not given["keywords"]:
            assert sum(p.numel() for p in model.parameters()) == facts["params"]
        x = torch.from_numpy(det.det_input(given["shape"], given["seed"]))
        for dtype in (torch.float32, torch.float64):  # where ReLUs near zero amplify rounding, the second decides
            recorded_noise()
            found = outputs(model.to(dtype), x.to(dtype), given["modules"])
            wrong = {key: by for key, by in differences(found, given, logits).items() if not by <= TOLERANCE}
            if not wrong:
                break
        assert wrong == {}, given["name"]


def given_shape(key, shape, given):
    """The shape of a weight at the size of an input: the position table of a ViT follows it."""
    size = given["keywords"].get("img_size")
    return shape if size is None or key != "pos_embed" else [1, size[0] // 16 * (size[1] // 16) + 1, shape[2]]


def differences(found, given, logits):
    out = logits[given["name"]]
    by = {"logits": np.abs(sampled(found["logits"], out.size) - out.ravel()).max() / out.std()}
    for key, layer in given["modules"].items():
        assert math.prod(found[key].shape) == math.prod(layer["shape"])
        by[key] = np.abs(sampled(found[key], len(layer["samples"])) - layer["samples"]).max() / layer["std"]
    return by


@every_model
def test_gradients_equal_the_official_ones(name, det, golden, tmp_path, recorded_noise):
    """Through the checkpoint filter: official weights are the leaves."""
    facts, _ = golden(name)
    first = facts["inputs"][0]
    weights = det.det_state_dict(facts["state_dict"], facts["mul"], facts["gain"])
    model = built(facts, first, weights, tmp_path)
    filter_fn = import_module(type(model).__module__).checkpoint_filter_fn
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, GRADIENT_TOLERANCE.get(name, 1e-4))):
        leaves = {k: w.detach().to(dtype, copy=True) if w.is_floating_point() else w for k, w in weights.items()}
        for key in facts["grads"]:
            leaves[key].requires_grad_()
        recorded_noise()
        x = torch.from_numpy(det.det_input(first["shape"], first["seed"])).to(dtype)
        out = functional_call(model.to(dtype), filter_fn(leaves, model), (x,))
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        wrong = wrong_gradients(leaves, facts["grads"], det, tolerance)
        if not wrong:
            break
    assert wrong == []


def wrong_gradients(leaves, expected, det, tolerance):
    wrong, largest = [], max(e["l2"] for e in expected.values())
    for name, e in expected.items():
        grad = leaves[name].grad.double()
        probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{name}".encode())))
        off = max(abs(grad.norm() - e["l2"]), abs((grad * probe).sum() - e["dot"]))
        if not off <= tolerance * e["l2"] + 1e-6 * largest:  # of biases that change nothing, rounding alone is recorded
            wrong.append((name, float(off), e["l2"]))
    return wrong
