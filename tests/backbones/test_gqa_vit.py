"""Grouped-query ViTs: conversion from multi-head ViTs, sizes, and grouping per image or per batch."""

import pytest
import timm
import torch
from small_models import small

from foveate.backbones.gqa_vit import GqaConfig, checkpoint_filter_fn

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 6, "num_classes": 5}


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    torch.nn.init.normal_(model.norm.weight, 1, 0.5)
    return model


def converted(tmp_path, weights, **kwargs):
    torch.save(weights, tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth"), "num_classes": 5}
    return small("gqa_vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def test_with_as_many_key_heads_the_converted_model_is_the_vit(tmp_path):
    """The final norm and the classifier too, which the authors' loader leaves behind."""
    theirs = vit()
    ours = converted(tmp_path, theirs.state_dict(), kv_heads=6, num_classes=5)
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


def test_keys_and_values_become_means_of_their_group(tmp_path):
    theirs = vit()
    ours = converted(tmp_path, theirs.state_dict(), num_classes=5)
    k = theirs.blocks[1].attn.qkv.weight.detach().unflatten(0, (3, 6, 4))[1]
    torch.testing.assert_close(ours.blocks[1].attn.k.weight.detach()[4:8], (k[2] + k[3]) / 2)
    assert torch.equal(ours.norm.weight, theirs.norm.weight)


def test_another_number_of_classes_keeps_everything_but_the_classifier(tmp_path):
    theirs = vit()
    ours = converted(tmp_path, theirs.state_dict(), num_classes=7)
    assert ours(X).shape == (3, 7) and torch.equal(ours.norm.weight, theirs.norm.weight)


def test_the_position_table_is_resampled_at_load_and_at_run(tmp_path):
    theirs = vit()
    ours = converted(tmp_path, theirs.state_dict(), num_classes=5, kv_heads=6, img_size=(48, 64))
    assert ours.pos_embed.shape == (1, 6 * 8 + 1, 24)
    images = torch.randn(1, 3, 48, 64)
    running = converted(tmp_path, theirs.state_dict(), num_classes=5, kv_heads=6)
    torch.testing.assert_close(ours(images), running(images), rtol=1e-4, atol=1e-5)
    assert running(torch.randn(1, 3, 45, 71)).shape == (1, 5)  # padded to whole patches


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = vit().state_dict()
    with pytest.raises(ValueError, match=r"weights of 6 heads are averaged .* wants kv_heads that divides 6"):
        converted(tmp_path, weights, kv_heads=4, allocation="key_norm", num_classes=5)
    weights["blocks.0.ls1.gamma"] = torch.ones(24)
    with pytest.raises(ValueError, match=r"not a checkpoint of this model: it has an unknown blocks.0.ls1.gamma"):
        converted(tmp_path, weights, num_classes=5)


def test_the_authors_cache_loads_and_may_be_missing():
    model = small("gqa_vit_tiny", allocation="ema", num_classes=5)
    weights = {k.replace("groups.cache", "cache"): v for k, v in model.state_dict().items()}
    weights = {k: v + 3 if k.endswith("cache") else v for k, v in weights.items() if "groups." not in k}
    loaded = checkpoint_filter_fn(weights, model)
    assert loaded["blocks.1.attn.groups.cache"].tolist() == [3, 3, 3] and int(loaded["blocks.0.attn.groups.step"]) == 0


def test_images_are_grouped_alone_unless_per_batch():
    alone = small("gqa_vit_tiny", allocation="key_norm").eval()
    for block in alone.blocks:
        torch.nn.init.normal_(block.attn.k.weight)
    together = small("gqa_vit_tiny", allocation="key_norm", per_batch=True).eval()
    together.load_state_dict(alone.state_dict())
    torch.testing.assert_close(alone(X)[:1], alone(X[:1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together(X)[:1], together(X[:1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("allocation", ["uniform", "key_norm", "ema", "difference", "noise"])
def test_every_rule_trains_exports_and_takes_images_without_content(allocation):
    model = small("gqa_vit_tiny", allocation=allocation, num_classes=4).train()
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if allocation != "noise":
        torch.testing.assert_close(program.module()(X[:2]), model(X[:2]), rtol=1e-4, atol=1e-5)


def test_no_number_is_read_by_the_host():
    """On the meta device there are none to read."""
    for allocation in ("key_norm", "ema", "difference"):
        with torch.device("meta"):
            model = small("gqa_vit_tiny", allocation=allocation, per_batch=True, num_classes=4).train()
            assert model(torch.empty(2, 3, 32, 32)).shape == (2, 4)


def test_noise_is_new_at_every_call_in_eval_mode_too():
    model = small("gqa_vit_tiny", allocation="noise").eval()
    assert not torch.equal(model(X), model(X))


@pytest.mark.parametrize(("name", "params"), [("tiny", None), ("small", 20_276_584), ("base", None), ("large", None)])
def test_variants(name, params):
    model = timm.create_model(f"gqa_vit_{name}", device="meta")
    attention = model.blocks[0].attn
    vit = timm.create_model(f"vit_{name}_patch16_224", device="meta")
    assert (model.embed_dim, len(model.blocks), attention.heads) == (
        vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads
    )  # fmt: skip
    assert attention.kv_heads == {"tiny": 1, "small": 3, "base": 3, "large": 4}[name]
    count = sum(p.numel() for p in model.parameters())
    assert params is None or count == params
    with pytest.raises(ValueError, match="kv_heads must be 1 to num_heads"):
        GqaConfig(num_heads=2, kv_heads=3)
