"""NiNformer: one size, its block, and the contract at that size (most tests of small models change the size)."""

import pytest
import timm
import torch
from small_models import ONE_SIZE, alive
from torch import nn

import foveate

SMALL = ONE_SIZE["ninformer"]
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("ninformer", **{"num_classes": 5, **SMALL, **kwargs})


@pytest.mark.parametrize("size", [(64, 64), (32, 36), (28, 28), (33, 32)])
def test_images_of_another_number_of_patches_are_refused_in_one_line(size):
    words = f"takes images of 64 patches of 4x4 px, got {size[0]}x{size[1]} px; make a model for another size"
    for call in (small(), small().forward_features, small(features_only=True)):
        with pytest.raises(ValueError, match=words) as error:
            call(torch.zeros(1, 3, *size))
        assert "\n" not in str(error.value)


def test_img_size_chooses_the_size():
    model = small(img_size=(16, 64)).eval()
    assert model(torch.randn(2, 3, 16, 64)).shape == (2, 5) and model(X).shape == (3, 5)  # as many patches
    assert small(img_size=48)(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    assert small(img_size=48, patch_size=8)(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    for wrong in (30, (32, 30), 0):
        with pytest.raises(ValueError, match="img_size must be a multiple of patch_size 4, got"):
            small(img_size=wrong)


def test_the_block_is_a_gated_mixer_between_two_uses_of_one_norm():
    block = alive(small()).stages[0].blocks[0]
    x = torch.randn(2, 8, 8, 16)
    tokens = x.flatten(1, 2)
    n = block.norm(tokens)
    tokens = tokens + block.proj(n) * block.mixer(n)
    tokens = tokens + block.mlp(block.norm(tokens))
    torch.testing.assert_close(block(x), tokens.unflatten(1, (8, 8)))


def test_recorded_layers_are_those_inside(det, golden):
    facts, arrays = golden("module__ninformer")
    case = facts["cases"]["nin_block"]
    model = timm.create_model("ninformer", dims=(32,), depths=(1,), hidden_dim=48, img_size=16, num_classes=0).eval()
    weights = {f"model.0.{k}": v for k, v in det.det_state_dict(case["state_dict"]).items()}
    from foveate.backbones.ninformer import _our_key

    ours = {_our_key(k).removeprefix("stages.0.blocks.0."): v for k, v in weights.items()}
    block = model.stages[0].blocks[0]
    block.load_state_dict(ours)
    x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
    out = block(x.unflatten(1, (4, 4))).flatten(1, 2)
    torch.testing.assert_close(out, torch.from_numpy(arrays["nin_block__out"]), rtol=1e-4, atol=1e-5)
    mixer = facts["cases"]["mgu_16"]
    state = det.det_state_dict(mixer["state_dict"])
    mlps = small(dims=(32,), depths=(1,), hidden_dim=24, img_size=16).stages[0].blocks[0].eval()
    mapped = {_our_key(f"model.0.mgu.{k}").removeprefix("stages.0.blocks.0."): v for k, v in state.items()}
    mlps.load_state_dict(mapped, strict=False)
    x = torch.from_numpy(det.det_input(mixer["input_shape"], mixer["input_seed"]))
    torch.testing.assert_close(
        mlps.proj(x) * mlps.mixer(x), torch.from_numpy(arrays["mgu_16__out"]), rtol=1e-4, atol=1e-5
    )


def test_every_drop_rate_has_an_effect_in_training():
    for rate in ("drop_rate", "drop_path_rate", "proj_drop_rate"):
        model = small(**{rate: 0.5})
        many = X.repeat(6, 1, 1, 1)
        assert not torch.equal(model.train()(many), model(many)), rate
        assert torch.equal(model.eval()(X), model(X)), rate


def test_a_training_step_lowers_the_loss():
    model, y = small().train(), torch.arange(3)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(X), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad.any() for p in model.parameters())


def test_hooks_act_on_every_module():
    model = alive(small())
    before = model(X).detach()
    for path, module in model.named_modules():
        if path and not isinstance(module, nn.Identity | nn.Dropout):
            handle = module.register_forward_hook(lambda _, __, out: out + out.abs().mean() * torch.sin(out))
            assert (model(X).detach() - before).abs().max() > 1e-4 * before.std(), path
            handle.remove()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_scripts_traces_exports_fuses_and_makes_the_round_trip_to_the_hub(tmp_path):
    model = alive(small())
    expected = model(X).detach()
    torch.testing.assert_close(torch.jit.script(model)(X), expected)
    torch.testing.assert_close(torch.jit.trace(model, X)(X), expected)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(X[:2]), expected[:2], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(foveate.fuse(model, X)(X), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(X), expected)


def test_features_are_maps_of_the_last_blocks():
    model = timm.create_model("ninformer", features_only=True).eval()
    assert [tuple(x.shape) for x in model(X)] == [(3, 256, 8, 8)] * 4
    assert model.feature_info.reduction() == [4] * 4


def test_configs_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="dims must be equal"):
        small(dims=(16, 24))
    with pytest.raises(TypeError, match="hiden_dim"):
        small(hiden_dim=3)
    with pytest.raises(TypeError, match="tokens"):
        small(tokens=3)
