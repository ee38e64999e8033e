"""A fused model returns what the model returns, for any model, size and change of weights."""

import io
import pickle
import threading
from copy import deepcopy

import pytest
import timm
import torch
from fused import SIZE, SIZES, TIMM, UNNAMED, assert_same, images
from small_models import KINDS, alive, small
from torch import nn

import foveate
from foveate.benchmarks._timing import peak_tensor_bytes
from foveate.fusion import FuseError


@pytest.fixture(scope="module")
def van():
    return alive(small("van_b0", num_classes=5))


@pytest.mark.parametrize("name", KINDS)
def test_every_family_gives_its_own_output(name):
    """In float64 too, where no rounding changes a route: all rewrites but oneDNN's are the same there."""
    model = alive(small(name, num_classes=5))
    size = (2, 3, 64, 64) if "halo" in name else SIZE
    if not name.startswith("biformer"):
        assert_same(foveate.fuse(model, images(size)), model, images(size))
    double = deepcopy(model).double()
    assert_same(foveate.fuse(double, images(size, torch.float64)), double, images(size, torch.float64))


@pytest.mark.parametrize("name", [*TIMM, *UNNAMED])
def test_models_of_timm_give_their_own_output(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **TIMM.get(name, {}))
    model = model.eval() if name == "halonet26t" else alive(model)  # it takes no small images
    x = images((2, 3, *(SIZES.get(name, 64),) * 2))
    fused = foveate.fuse(model, x)
    assert_same(fused, model, x)
    report = fused.prepare(x)
    assert report.fused["convolution"] + report.fused["product"] > 0


def test_layers_merge_as_the_report_says(van):
    report = foveate.fuse(van, images()).prepare(images())
    layers = [module for module in van.modules() if isinstance(module, nn.Conv2d)]
    dilated = sum(layer.dilation != (1, 1) for layer in layers)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in van.modules())
    assert (report.fused["convolution by dilation groups"], report.fused["norm"]) == (dilated, norms)
    assert report.fused["convolution"] == len(layers) - dilated > dilated > 0
    assert "batch_norm" not in report.left and "gelu" not in report.left and report.left["layer_norm"] == 2
    assert "layer_norm" in report.reasons and str(report).startswith("Van: fused ") and report.table().row_count > 5


def test_sizes_and_batches_get_plans_of_their_own(van):
    fused = foveate.fuse(van, most_sizes=2)
    for size in ((1, 3, 32, 32), (3, 3, 32, 32), (2, 3, 45, 67), (1, 3, 32, 32)):
        assert_same(fused, van, images(size))
        assert len(fused._plans) <= 2


MEASURED: tuple[str, ...] = (
    "nat_mini",
    "biformer_tiny",
    "litv2_small",
    "fv_davit_tiny",
    "fv_halonet_h0",
    "eca_resnet18",
    "resnet50",
)
MEASURED += ("van_b0", "swin_tiny_patch4_window7_224", "convnext_atto", "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    "name", [n if n in MEASURED else pytest.param(n, marks=pytest.mark.slow) for n in (*KINDS, *TIMM)]
)
def test_a_fused_forward_pass_takes_no_more_memory(name):
    model = alive(small(name)) if name in KINDS else timm.create_model(name, **TIMM[name]).eval()
    px = SIZES.get(name, 64)
    # As the first convolution wants it: it copies other images, in eager mode inside oneDNN, where nothing counts it.
    x = images((2, 3, px, px)).contiguous(memory_format=torch.channels_last)
    fused = foveate.fuse(model, x)
    with torch.inference_mode():
        assert peak_tensor_bytes(lambda: fused(x)) <= peak_tensor_bytes(lambda: model(x))


def test_features_are_lists_as_before():
    model = alive(small("van_b0", features_only=True))
    with torch.no_grad():
        for out, wanted in zip(foveate.fuse(model, images())(images()), model(images()), strict=True):
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_changed_weights_are_seen(van):
    model = deepcopy(van)
    fused, x = foveate.fuse(model, images()), images()
    before = fused(x)
    with torch.no_grad():
        model.stages[0].blocks[0].mlp.fc1.weight.mul_(2)
    assert_same(fused, model, x)
    assert not torch.equal(fused(x), before)
    fused.load_state_dict(van.state_dict())
    assert torch.equal(fused(x), before) and fused.state_dict().keys() == van.state_dict().keys()
    model.head.fc = nn.Linear(16, 7)
    assert fused(x).shape == (2, 7)
    model.stem.norm.running_mean = model.stem.norm.running_mean + 1
    assert_same(fused, model, x)


def test_a_step_of_an_optimizer_on_the_model_is_seen(van):
    model = deepcopy(van)
    fused, x = foveate.fuse(model, images()), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert_same(fused, model, x)


def test_another_dtype_is_seen(van):
    fused = foveate.fuse(deepcopy(van), images())
    fused.to(torch.bfloat16)
    out = fused(images(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    wanted = van(images()).detach()
    assert (out.float() - wanted).norm() < 0.1 * (wanted - wanted.mean()).norm()
    double = deepcopy(van).double()
    assert_same(foveate.fuse(double), double, images(dtype=torch.float64))


def test_under_autocast_it_gives_what_the_model_gives(van):
    fused = foveate.fuse(van, images())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, wanted = fused(images()), van(images())
    assert out.dtype == wanted.dtype and (out - wanted).float().norm() < 0.1 * wanted.float().norm()


def test_fusing_leaves_the_model_as_it_was(van):
    before = {name: value.clone() for name, value in van.state_dict().items()}
    wanted = van(images())
    fused = foveate.fuse(van, images())
    fused(images())
    assert foveate.unfuse(fused) is van and torch.equal(van(images()), wanted)
    assert all(torch.equal(value, before[name]) for name, value in van.state_dict().items())


def test_what_a_fused_model_cannot_do_is_refused(van):
    fused = foveate.fuse(van, images())
    with pytest.raises(FuseError, match="is for inference"):
        fused.train()
    assert fused.eval() is fused and not fused.training
    with pytest.raises(FuseError, match="gives no gradients"):
        fused(images().requires_grad_())
    with pytest.raises(FuseError, match="fused already"):
        foveate.fuse(fused)
    with pytest.raises(FuseError, match="takes a fused model, got Van"):
        foveate.unfuse(van)
    with pytest.raises(FuseError, match=r"Van at \(1, 3, 4, 4\) cannot be captured: .*sides of at least"):
        fused(images((1, 3, 4, 4)))
    with pytest.raises(FuseError, match="takes a tensor on a CPU, got meta"):
        fused.prepare(torch.empty(SIZE, device="meta"))
    with pytest.raises(FuseError, match="in training mode"):
        foveate.fuse(deepcopy(van).train())


def test_hooks_are_refused_whenever_they_come(van):
    model = deepcopy(van)
    handle = model.stages[0].register_forward_hook(lambda *args: None)
    with pytest.raises(FuseError, match=r"stages\.0 has hooks"):
        foveate.fuse(model, images())
    handle.remove()
    fused = foveate.fuse(model, images())
    fused(images())
    model.stages[1].register_forward_pre_hook(lambda *args: None)
    with pytest.raises(FuseError, match=r"stages\.1 has hooks"):
        fused(images())


def test_a_model_that_cannot_be_captured_is_one_line():
    class Undecided(nn.Module):
        def forward(self, x):
            return x.relu() if x.sum() > 0 else x

    with pytest.raises(FuseError, match=r"Undecided at \(2, 3, 40, 56\) cannot be captured") as caught:
        foveate.fuse(Undecided().eval(), images())
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_it_is_copied_pickled_and_exported(van):
    fused, x = foveate.fuse(van, images()), images()
    wanted = fused(x)
    copy = deepcopy(fused)
    assert torch.equal(copy(x), wanted) and copy.model is not van
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), wanted)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)
    program = torch.export.export(fused, (x,)).module()
    torch.testing.assert_close(program(x), wanted, rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(fused, x)
    torch.testing.assert_close(traced(x), wanted, rtol=1e-4, atol=1e-4)


def test_two_threads_share_one_fused_model(van):
    fused, found, sizes = foveate.fuse(van), [], [(1, 3, 32, 32), (2, 3, 40, 40)] * 3
    wanted = [van(images(size)).detach() for size in sizes]

    def work(i):
        with torch.no_grad():
            found.append((i, fused(images(sizes[i]))))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(sizes)
    for i, out in found:
        torch.testing.assert_close(out, wanted[i], rtol=1e-4, atol=1e-4)


def test_it_runs_in_inference_mode_and_answers_for_the_model(van):
    with torch.inference_mode():
        fused = foveate.fuse(van, images())
        out = fused(images())
    torch.testing.assert_close(out.clone(), van(images()).detach(), rtol=1e-4, atol=1e-4)
    assert fused.num_classes == 5 and fused.feature_info == van.feature_info
    with pytest.raises(AttributeError):
        getattr(fused, "no_such_thing")  # noqa: B009


@pytest.mark.parametrize("name", ["van_b0", "eca_resnet18", "fv_davit_tiny"])
def test_without_onednns_calls_the_rest_is_still_right(name, monkeypatch):
    monkeypatch.setattr("foveate.attention_ops._onednn.works", lambda dtype: False)
    model = alive(small(name, num_classes=5))
    fused = foveate.fuse(model, images())
    assert not any("convolution" in what for what in fused.prepare(images()).fused)
    assert_same(fused, model, images())
