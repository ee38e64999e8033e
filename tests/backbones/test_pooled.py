"""Attention pooling in place of the global pooling of any classifier."""

from typing import Any

import pytest
import timm
import torch
from small_models import ONE_SIZE, SMALL, alive, small

import foveate
from foveate.backbones.pooled import pool_with

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
KWARGS = {"lama": {"heads": 2}, "gaam": {"heads": 4, "gaussians": 2}}
THEIRS = ("resnet18", "test_efficientnet", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "regnetx_002")
OPTIONS = {"swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1)}}
NO_POOL: Any = "mean"
OPTIONS |= {"test_vit": {"img_size": 64}}


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def check(model, pool):
    before = model(X).detach()
    pool_with(model, pool, **KWARGS[pool])
    out = model(X)
    assert out.shape == before.shape and out.isfinite().all()
    assert not torch.allclose(out, before, rtol=1e-3, atol=1e-3)
    model.train()(X).square().sum().backward()
    pools = [p for name, p in model.named_parameters() if "pool" in name]
    assert pools and all(p.grad is not None and p.grad.isfinite().all() for p in pools)
    assert any(p.grad.any() for p in pools)


@pytest.mark.parametrize("pool", KWARGS)
@pytest.mark.parametrize("name", [name for name in SMALL if name != "agent_deit_tiny"])
def test_every_family_can_pool_by_attention(name, pool):
    check(alive(small(name, num_classes=5)), pool)


def test_a_head_of_its_own_is_refused():
    with pytest.raises(ValueError, match="pool_with: AgentDeit has no global pooling that can be replaced"):
        pool_with(small("agent_deit_tiny"), "lama", heads=2)


@pytest.mark.parametrize("pool", KWARGS)
@pytest.mark.parametrize("name", THEIRS)
def test_models_of_timm_too(name, pool):
    torch.manual_seed(0)
    check(timm.create_model(name, num_classes=5, **OPTIONS.get(name, {})).eval(), pool)


def test_the_pool_is_used_on_the_last_map():
    model = alive(small("nat_mini", num_classes=5))
    pool_with(model, "gaam", heads=4)
    maps = model.forward_features(X)
    pooled = model.head.global_pool.pool(maps.flatten(1, 2))
    torch.testing.assert_close(model(X), model.head.fc(pooled))


def test_the_class_token_is_not_pooled():
    model = timm.create_model("test_vit", img_size=64, num_classes=5).eval()
    pool_with(model, "lama", heads=2)
    seen = []
    model.attn_pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(X)
    assert seen[0].shape[1] == model.patch_embed.num_patches


def test_the_builder_makes_trains_and_saves_such_models(tmp_path):
    model = timm.create_model(
        "pooled", of="ninformer", pool="lama", heads=2, num_classes=5, **ONE_SIZE["ninformer"]
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(foveate.fuse(model, x)(x), model(x), rtol=1e-3, atol=1e-4)


def test_another_classifier_keeps_the_pool_or_raises():
    model = pool_with(small("nat_mini", num_classes=5), "lama", heads=2).eval()
    model.reset_classifier(7)
    assert model(X).shape == (2, 7) and type(model.head.global_pool.pool).__name__ == "LamaPool"
    with pytest.raises(AssertionError, match="Invalid pool type: lama"):
        pool_with(small("eca_mobilenet_v2"), "lama").reset_classifier(7)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: pool_with(small("nat_mini"), NO_POOL),
            r"pool must be one of \['lama', 'gaam'\], got 'mean'",
        ),
        (lambda: pool_with(small("nat_mini", global_pool=""), "lama"), "Nat does not pool"),
        (
            lambda: pool_with(timm.create_model("resnet18", global_pool="catavgmax"), "lama"),
            "'catavgmax' pooling joins",
        ),
        (lambda: pool_with(torch.nn.Linear(2, 2), "lama"), "Linear has no global pooling that can be replaced"),
        (lambda: timm.create_model("pooled", of="no_such_net"), "of= wants a timm model name, got 'no_such_net'"),
        (
            lambda: timm.create_model("pooled", of="resnet18", features_only=True),
            "is a classifier; for features use resnet18",
        ),
    ],
)
def test_what_cannot_be_pooled_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
