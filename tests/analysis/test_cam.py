"""Grad-CAM against its formula, on every family, and gradients that stay as they are."""

import cv2
import numpy as np
import pytest
import timm
import torch
from small_models import SMALL, alive, small

from foveate._errors import RequestError
from foveate.analysis import grad_cam

X = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
PLAIN_VIT = {"img_size": (32, 48), "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def by_formula(model, module, to_map, image, target, size=None) -> np.ndarray:
    """Means of the gradient weigh the channels; ReLU, scaled to 0..1, enlarged, as the package does."""
    kept = []
    handle = module.register_forward_hook(lambda _, args, out: kept.append(out))
    image = image.clone().requires_grad_()
    score = model(image)[0, target]
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    features, gradient = to_map(kept[0])[0].detach(), to_map(gradient)[0]
    cam = (gradient.mean((1, 2), keepdim=True) * features).sum(0).relu().numpy()
    for _ in range(2):  # the package scales each layer's map, and their mean
        cam = cam - cam.min()
        cam = cam / (1e-7 + cam.max())
        cam = cv2.resize(cam, (size or image.shape[-2:])[::-1])
    return cam


@pytest.mark.parametrize(
    ("name", "module", "to_map"),
    [
        ("nat_mini", "stages.1", lambda x: x.permute(0, 3, 1, 2)),
        ("van_b0", "stages.1", lambda x: x),
        ("eca_resnet18", "layer4", lambda x: x),
        ("gqa_vit_tiny", "blocks.1.norm1", lambda x: x[:, 1:].transpose(1, 2).unflatten(2, (4, 6))),
    ],
)
def test_grad_cam_equals_its_formula(name, module, to_map):
    model = alive(small(name, num_classes=5))
    view = grad_cam(model, X, target=3)
    expected = by_formula(model, model.get_submodule(module), to_map, X, 3)
    assert (view.layer, view.branch, view.axes, view.cell) == (module, "class 3", ("y", "x"), (1.0, 1.0))
    np.testing.assert_allclose(view.values[0], expected, rtol=0, atol=1e-4)


def test_a_map_of_padded_patches_is_cut_off_at_the_image():
    model, image = alive(small("gqa_vit_tiny", num_classes=5)), torch.randn(1, 3, 30, 50)  # padded to 32 x 56
    view = grad_cam(model, image, target=3)
    tokens = model.get_submodule("blocks.1.norm1")
    padded = by_formula(model, tokens, lambda x: x[:, 1:].transpose(1, 2).unflatten(2, (4, 7)), image, 3, size=(32, 56))
    np.testing.assert_allclose(view.values[0], padded[:30, :50], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_a_grad_cam(name):
    model = alive(small(name))
    view = grad_cam(model, X)
    target = int(model(X).argmax())
    assert view.branch == f"class {target}" and view.values.shape == (1, 32, 48)
    assert 0 <= view.values.min() and view.values.max() <= 1 + 1e-6 and view.values.isfinite().all()


def test_gradients_and_modes_stay_as_they_are():
    model = alive(small("nat_mini", num_classes=5)).train()
    model(X).sum().backward()
    first = next(model.parameters())
    before = first.grad.clone()
    grad_cam(model, X, 0)
    assert torch.equal(first.grad, before) and first.requires_grad and model.training


def test_timms_vits_too():
    view = grad_cam(timm.create_model("vit_tiny_patch16_224", **PLAIN_VIT).eval(), X, 1)
    assert view.layer == "blocks.1.norm1" and view.values.std() > 0


def test_a_class_that_is_not_there_is_refused():
    model = alive(small("nat_mini", num_classes=5))
    with pytest.raises(RequestError, match="the model has classes 0 to 4, got 5"):
        grad_cam(model, X, 5)
    with pytest.raises(RequestError, match="wanted a classifier with logits"):
        grad_cam(timm.create_model("nat_mini", features_only=True, dims=(16, 32), depths=(1, 1), head_dim=8), X)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("foveate.analysis.cam.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r'needs grad-cam: pip install "foveate\[look\]"'):
        grad_cam(alive(small("nat_mini")), X)
