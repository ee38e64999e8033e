"""Every family against its official code, through the door that users' checkpoints take."""

import zlib
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from torch import nn

import foveate  # noqa: F401  (registers the models)
from foveate.backbones.van import OverlapPatchEmbed, VanAttention, VanBlock, VanMlp

FAST = ["nat__nat_mini", "dinat__dinat_s_tiny", "dinat__dinat_isotropic_small", "van__van_b0"]
SLOW = ["nat__nat_small", "dinat__dinat_mini", "dinat__dinat_tiny", "van__van_b1", "van__van_b3"]
every_golden = pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])


@pytest.fixture
def official(det, golden, tmp_path):
    """A function from a golden's name to its JSON, its logits, our model with the official weights, the key map."""

    def load(name):
        facts, logits = golden(name)
        weights = det.det_state_dict(facts["state_dict"], facts["mul"])
        torch.save(weights, tmp_path / "official.pth")
        overlay = {"file": str(tmp_path / "official.pth")}
        model = timm.create_model(facts["variant"], pretrained=True, pretrained_cfg_overlay=overlay).eval()
        ours = import_module(type(model).__module__).checkpoint_filter_fn(weights, model)
        theirs = {id(value): key for key, value in weights.items()}
        return facts, logits, model, {key: theirs[id(value)] for key, value in ours.items()}

    return load


@every_golden
def test_logits_stages_and_gradients_equal_the_official_ones(name, det, official):
    facts, logits, model, official_key = official(name)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    for given in facts["inputs"]:
        x = torch.from_numpy(det.det_input(given["shape"], given["seed"]))
        with torch.no_grad():
            out, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        expected = logits[given["name"]]
        assert np.abs(out.numpy() - expected).max() <= 5e-5 * expected.std(), given["name"]
        for i, stage in ((i, given["stages"].get(f"stage{i}")) for i in range(len(maps))):
            if stage is None:  # of the isotropic nets' layers, four are recorded
                continue
            ours = maps[i] if len(stage["shape"]) == 4 else maps[i].flatten(2).transpose(1, 2)
            assert list(ours.shape) == stage["shape"]
            assert np.abs(sample(ours, 64) - stage["samples"]).max() <= 5e-5 * stage["std"], (given["name"], i)
    check_gradients(model, facts, official_key, det)


def sample(tensor, count):
    flat = tensor.contiguous().flatten().numpy()
    return flat[np.linspace(0, flat.size - 1, count).astype(int)]


def check_gradients(model, facts, official_key, det):
    first = facts["inputs"][0]
    out = model(torch.from_numpy(det.det_input(first["shape"], first["seed"])))
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    for key, parameter in model.named_parameters():
        name, grad = official_key[key], parameter.grad
        expected = facts["grads"][name]
        assert abs(grad.double().norm() - expected["l2"]) <= 1e-4 * expected["l2"], name
        if "dot" in expected:
            probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{name}".encode())))
            assert abs((grad * probe).sum() - expected["dot"]) <= 1e-4 * expected["l2"], name
        else:
            assert np.abs(sample(grad, 4) - expected["samples"]).max() <= 1e-4 * float(grad.abs().max()), name


def van_key(key):
    return key.replace("dwconv.dwconv", "dwconv")


VAN_LAYERS = {
    "Attention": lambda c: VanAttention(c["d_model"]),
    "Mlp": lambda c: VanMlp(c["in_features"], c["hidden_features"], drop=0.0),
    "Block": lambda c: VanBlock(c["dim"], c["mlp_ratio"], layer_scale=1e-2, drop=0.0, drop_path=0.0),
    "OverlapPatchEmbed": lambda c: OverlapPatchEmbed(3, c["embed_dim"], c["patch_size"], c["stride"]),
}


def test_van_layers_equal_the_official_ones(det, golden, relative_error):
    cases, arrays = golden("module__van")
    tried = set()
    for name, case in cases.items():
        kind = case["ctor"]["cls"]
        if kind not in VAN_LAYERS:
            continue
        in_chans = case["input_shape"][1]
        layer = VAN_LAYERS[kind](case["ctor"])
        if kind == "OverlapPatchEmbed" and in_chans != 3:
            layer.proj = nn.Conv2d(in_chans, case["ctor"]["embed_dim"], 3, 2, 1)
        weights = det.det_state_dict(case["state_dict"])
        layer.load_state_dict({van_key(k): v for k, v in weights.items()})
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])).requires_grad_()
        out = layer.eval()(x)
        assert relative_error(out, arrays[f"{name}__out"]) < 1e-5, name
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        for key, parameter in layer.named_parameters():
            norm, _ = next(v for k, v in case["grads"].items() if van_key(k) == key)
            assert abs(parameter.grad.norm() - norm) <= 1e-4 * norm, (name, key)
        tried.add(kind)
    assert tried == set(VAN_LAYERS)
