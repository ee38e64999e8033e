"""Dual cross-attention around ViTs of timm."""

from typing import Any

import pytest
import timm
import torch

from foveate.attention_ops.local_queries import local_queries, rollout_row
from foveate.backbones.dcal import Dcal, run_block

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL: dict[str, Any] = {"of": "vit_tiny_patch16_224", **VIT, "num_classes": 5, "local_share": 0.25}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> Dcal:
    torch.manual_seed(0)
    model: Any = timm.create_model("dcal", **{**SMALL, **kwargs})
    torch.nn.init.normal_(model.head.weight)
    return model


def test_the_output_is_the_log_of_the_mean_probability_of_both_branches():
    model = small().eval()
    branches = model.branches(X)
    assert set(branches) == {"sa", "glca"}
    mean = (branches["sa"].softmax(-1) + branches["glca"].softmax(-1)) / 2
    torch.testing.assert_close(model(X), mean.log())
    torch.testing.assert_close(model(X).exp().sum(-1), torch.ones(3))


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"qk_norm": True, "init_values": 0.5}, {"pre_norm": True}])
def test_the_branch_of_self_attention_is_the_vit(options):
    model = small(**options).eval()
    torch.testing.assert_close(model.branches(X)["sa"], model.net(X), rtol=1e-4, atol=1e-5)


def test_local_queries_are_those_of_the_rollout():
    model = small().eval()
    tokens, layers = model._embed(X), []
    for block in model.net.blocks:
        tokens, q, k = run_block(block, tokens, None)
        layers.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
    last, importance = model.tokens(X)
    torch.testing.assert_close(importance, rollout_row(reversed(layers)), rtol=1e-4, atol=1e-6)
    seen = []
    model.local.attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(X)
    picked = local_queries(importance, 0.25)
    assert seen[0].shape == (3, 5, 24) and picked.shape == (3, 5)
    normed = model.local.norm1(last)
    torch.testing.assert_close(seen[0], normed.gather(1, picked[..., None].expand(-1, -1, 24)), rtol=1e-4, atol=1e-5)


def test_an_image_paired_with_itself_gives_the_vits_logits_and_another_one_changes_them():
    model = small().eval()
    own, other = torch.arange(3), torch.tensor([1, 2, 0])
    torch.testing.assert_close(model.paired_logits(X, own), model.net(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.paired_logits(X, other), model.net(X), rtol=1e-3, atol=1e-3)


def test_training_keeps_the_logits_of_all_branches_when_asked():
    model = small().train()
    model(X)
    assert model.branch_logits == {}
    model.keeps_branches = True
    model(X)
    assert {name: tuple(t.shape) for name, t in model.branch_logits.items()} == dict.fromkeys(
        ("sa", "glca", "pwca"), (3, 5)
    )
    model.branch_logits = {}
    model.eval()(X)
    assert model.branch_logits == {}


def test_weights_of_a_vit_are_those_of_the_vit_inside(tmp_path):
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=7)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth"), "num_classes": 7}
    model = small(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.net.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert torch.equal(model.net.norm.weight, vit.norm.weight) and model(X).shape == (3, 5)
    same = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert torch.equal(same.net.head.weight, vit.head.weight)


def test_it_exports_and_makes_the_round_trip_to_the_hub(tmp_path):
    model = small().eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(X[:2]), model(X[:2]), rtol=1e-4, atol=1e-5)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(X), model(X))


def test_reset_classifier_gives_both_branches_new_ones():
    model = small().eval()
    model.reset_classifier(9)
    assert model(X).shape == (3, 9) and model.net.head.out_features == 9
    assert set(model.no_weight_decay()) <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("of", "options", "words"),
    [
        ("", {}, "of= wants the name of a plain ViT of timm, got ''"),
        ("resnet18", {}, "wants a plain ViT of timm .*, got ResNet"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "and this ViT has none"),
        ("vit_base_patch16_rope_224", {"depth": 1}, "got "),
        ("vit_tiny_patch16_224", {"features_only": True}, "is a classifier; for features use vit_tiny_patch16_224"),
    ],
)
def test_what_is_no_vit_with_a_class_token_is_refused(of, options, words):
    with pytest.raises(ValueError, match=f"dcal: .*{words}"):
        timm.create_model("dcal", of=of, **options)
