"""ViTs of gated, sparsified and reversed attention against their official code, through users' checkpoints."""

import re
import zlib
from importlib import import_module

import numpy as np
import pytest
import timm
import torch

import foveate
from foveate.export.outliers import inf_norms, kurtoses

FAST = ["sparsifiner__deit_t_k0.25_tok0.7", "sparsifiner__deit_t_k0.25_192x256", "dependencyvit__lite_tiny"]
FAST += ["outlierfree__vit_s16_cs0.003"]
SLOW = ["sparsifiner__deit_t_k0.25", "dependencyvit__tiny"]
SLOW += ["outlierfree__vit_s16_ga_mlp", "outlierfree__vit_s16_pln_ga_linear"]
every_golden = pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])


@pytest.fixture
def official(det, golden, tmp_path):
    """A function from a golden's name to its JSON, its arrays and our model with the official weights."""

    def load(name):
        facts, arrays = golden(name)
        weights = det.det_state_dict(facts["state_dict"], facts["mul"], facts["gain"])
        torch.save(weights, tmp_path / "official.pth")
        overlay = {"file": str(tmp_path / "official.pth")}
        model = timm.create_model(facts["variant"], pretrained=True, pretrained_cfg_overlay=overlay, **facts["args"])
        assert set(import_module(type(model).__module__).checkpoint_filter_fn(weights, model)) == set(weights)
        return facts, arrays, model.eval()

    return load


def image(det, given):
    return torch.from_numpy(det.det_input(given["shape"], given["seed"]))


def watched(model, names, x):
    """Return what modules of these names give, each its first tensor, and the logits."""
    found, handles = {}, []
    for name in names:
        kind, number = re.fullmatch(r"(\D+)(\d*)", name).groups()
        path = {"block": f"blocks.{number}", "attn": f"blocks.{number}.attn"}.get(kind, name)

        def keep(_, args, out, name=name):
            found[name] = out[0] if isinstance(out, tuple) else out

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        found["logits"] = model(x)
    for handle in handles:
        handle.remove()
    return found


def off_by(ours, theirs, std):
    flat = ours.contiguous().flatten().numpy()
    at = np.linspace(0, flat.size - 1, np.size(theirs)).astype(int)
    return np.abs(flat[at] - np.ravel(theirs)).max() / std


@every_golden
def test_logits_and_layers_equal_the_official_ones(name, det, official):
    facts, arrays, model = official(name)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    for given in facts["inputs"]:
        found = watched(model, given["stages"], image(det, given))
        assert off_by(found["logits"], arrays[given["name"]], arrays[given["name"]].std()) <= 5e-5, given["name"]
        for stage, wanted in given["stages"].items():
            assert found[stage].numel() == np.prod(wanted["shape"]), stage
            assert off_by(found[stage], wanted["samples"], wanted["std"]) <= 5e-5, (given["name"], stage)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_a_fused_model_gives_the_official_logits(name, det, official):
    facts, arrays, model = official(name)
    given = facts["inputs"][0]
    with torch.no_grad():
        out = foveate.fuse(model)(image(det, given))
    assert off_by(out, arrays[given["name"]], arrays[given["name"]].std()) <= 1e-4


@every_golden
def test_gradients_equal_the_official_ones(name, det, official):
    facts, _, model = official(name)
    out = model.train()(image(det, facts["inputs"][0]))
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    parameters = dict(model.named_parameters())
    for key, wanted in facts["grads"].items():
        grad = parameters[key].grad
        if wanted is None:  # no gradient flows through the choice of keys
            assert not grad.any(), key
        else:
            probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
            assert abs(grad.norm() - wanted["l2"]) <= 1e-4 * wanted["l2"], key
            assert abs((grad * probe).sum() - wanted["dot"]) <= 1e-4 * wanted["l2"], key
    assert facts["grads"].keys() in (set(), parameters.keys())


@pytest.mark.parametrize("name", [n for n in [*FAST, *SLOW] if n.startswith("sparsifiner") and "192" not in n])
def test_masks_equal_the_official_ones(name, det, official):
    facts, arrays, model = official(name)
    blocks = [0, 6, 11] if facts["args"].get("token_rate") is None else [0]  # ours drops tokens, theirs hides them
    inputs = {}
    for i in blocks:
        model.blocks[i].norm1.register_forward_hook(lambda _, args, out, i=i: inputs.__setitem__(i, out))
    with torch.no_grad():
        model(image(det, facts["inputs"][0]))
        for i in blocks:
            masks = model.blocks[i].attn.masks(inputs[i], (14, 14))[:1]
            theirs = np.unpackbits(arrays[f"mask_layer{i}"])[: masks.numel()].reshape(masks.shape)
            assert np.array_equal(masks.numpy(), theirs)


def test_outlier_metrics_equal_the_official_ones(det, official):
    facts, _, model = official("outlierfree__vit_s16_cs0.003")
    found = {}
    for key in facts["outliers"]:
        model.get_submodule(key).register_forward_hook(lambda _, args, out, key=key: found.__setitem__(key, out))
    with torch.no_grad():
        model(image(det, facts["inputs"][0]))
    for key, wanted in facts["outliers"].items():
        np.testing.assert_allclose(inf_norms(found[key]), wanted["inf_norm"], rtol=1e-4)
        np.testing.assert_allclose(kurtoses(found[key]), wanted["kurtosis"], rtol=1e-4)
