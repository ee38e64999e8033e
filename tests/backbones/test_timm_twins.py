"""Where timm has the model too, under its own name: the same keys, the same results, and more image sizes."""

import pytest
import timm
import torch

import foveate
from foveate.backbones.fv_halonet import PUBLISHED_M

OURS = foveate.list_models("fv_*")
TWINS = [name.removeprefix("fv_") for name in OURS if timm.is_model(name.removeprefix("fv_"))]


def test_the_twins_are_known():
    davits = {f"davit_{size}" for size in ("tiny", "small", "base", "large", "huge", "giant", "base_fl", "huge_fl")}
    halonets = {"halonet_h1", "halonet26t", "halonet50ts", "sehalonet33ts", "eca_halonext26ts", "haloregnetz_b"}
    assert set(TWINS) == davits | halonets


@pytest.mark.parametrize("name", TWINS)
def test_keys_and_shapes_are_timms(name):
    ours, theirs = (timm.create_model(n, device="meta").state_dict() for n in (f"fv_{name}", name))
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize("name", TWINS)
def test_evaluation_settings_are_timms(name):
    ours, theirs = timm.create_model(f"fv_{name}", device="meta"), timm.create_model(name, device="meta")
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "num_classes", "first_conv", "classifier"):
        assert ours.pretrained_cfg[key] == theirs.pretrained_cfg[key], key


def randomised(name):
    """timm's model with every norm gain away from zero, where residual branches start."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if key.endswith("weight") else 0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("halonet26t", 256),
        ("halonet_h1", 256),
        pytest.param("eca_halonext26ts", 256, marks=pytest.mark.slow),
        pytest.param("haloregnetz_b", 224, marks=pytest.mark.slow),
        pytest.param("davit_tiny", 96, marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_are_timms_in_float64(name, size):
    theirs = randomised(name)
    ours = timm.create_model(f"fv_{name}", num_classes=5).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    outs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-11)
    for out in outs:
        out.square().sum().backward()
    for (key, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad - other.grad).norm() <= 1e-6 * other.grad.norm(), key


@pytest.mark.parametrize("number", range(8))
def test_halonets_have_the_papers_parameters(number):
    model = timm.create_model(f"fv_halonet_h{number}", device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED_M[number], abs=0.1)


@pytest.mark.parametrize("name", ["fv_halonet26t", "fv_haloregnetz_b", "fv_halonet_h0"])
def test_halonets_take_any_size(name):
    model = timm.create_model(name, num_classes=3).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, 75, 139), intermediates_only=True)
    for info, x in zip(model.feature_info, maps, strict=True):
        assert x.shape[1:] == (info["num_chs"], -(-75 // info["reduction"]), -(-139 // info["reduction"]))


def test_values_wider_than_queries_run():
    config = {"depths": (1, 1, 1, 1), "value_ratio": 2.5, "output_ratio": 2, "final_dim": 48, "num_classes": 3}
    model = timm.create_model("fv_halonet_h0", **config)
    assert model.stages[0][0].post_attn.weight.shape == (160,)
    out = model(torch.randn(2, 3, 64, 64))
    out.square().sum().backward()
    assert out.shape == (2, 3) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["fv_halonet_h0", "fv_halonet50ts"])
def test_block_and_halo_can_be_changed(name):
    model = timm.create_model(name, block_size=4, halo=1, device="meta")
    layers = [m for m in model.modules() if hasattr(m, "halo")]
    assert layers and all(m.block_size == [4, 4] and m.halo == [1, 1] for m in layers)


def test_davits_window_can_be_changed_under_the_same_weights():
    small = {"dims": (32, 64), "depths": (1, 1), "num_classes": 3}
    wide, narrow = (timm.create_model("fv_davit_tiny", window_size=w, **small).eval() for w in (6, 4))
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(1, 3, 60, 84)
    assert wide(x).shape == narrow(x).shape == (1, 3)
    assert not torch.allclose(wide(x), narrow(x))
