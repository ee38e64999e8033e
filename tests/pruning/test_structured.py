"""Whole structures: cutting them equals zeroing them, in every family, and what comes out is a timm model."""

import copy
import json

import pytest
import timm
import torch

from foveate.export import export_onnx, export_program, save_hub, verify
from foveate.pruning import GROUPS, PruningError, group_of_weights, plan

from .conftest import KINDS, SMALL

HEAVY = {"fv_halonet26t", "fv_sehalonet33ts", "fv_eca_halonext26ts", "fv_haloregnetz_b"}  # they have no smaller form
every_net = pytest.mark.parametrize("name", SMALL)


def but_heavy_ones_slowly(names):
    """Every model; the heavy ones are slow tests."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in names]
    return pytest.mark.parametrize("name", marked)


def cut_and_masked(net, structure, images, **kwargs):
    """(logits of the pruned model, logits of the masked model, the pruned model, the plan)."""
    px = images.shape[-1]
    p = plan(net, kwargs.pop("method", "random"), structure=structure, img_size=px, **{"ratio": 0.5} | kwargs)
    smaller, masked = p.cut(net), p.apply(copy.deepcopy(net))
    with torch.no_grad():
        return smaller(images), masked(images), smaller, p


@every_net
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_cutting_random_structures_equals_zeroing_them(name, seed, small, images):
    net, x = small(name), images(name)
    cut, zeroed, smaller, p = cut_and_masked(net, KINDS[name].split(), x, seed=seed)
    assert set(p.removed) == set(KINDS[name].split()) and all(gone > 0 for gone, _ in p.removed.values())
    torch.testing.assert_close(cut, zeroed, rtol=0, atol=1e-5 * max(1.0, zeroed.abs().max().item()))
    assert not torch.allclose(zeroed, net(x).detach(), rtol=1e-2)  # something was cut that mattered
    assert sum(q.numel() for q in smaller.parameters()) == p.counts.params_after < p.counts.params_before


@every_net
def test_what_a_family_cannot_lose_is_refused_with_a_reason(name, small):
    net = small(name)
    for kind in {"heads", "channels", "mlp", "conv", "width"} - set(KINDS[name].split()):
        with pytest.raises(PruningError, match=rf"structure '{kind}': .* has none that can be cut \(.+\)") as caught:
            plan(net, "magnitude", structure=[kind])
        where = str(caught.value).rpartition("(")[2].partition(":")[0]
        groups = {group for weight, group in group_of_weights(net, GROUPS, strict=False).items() if where in weight}
        assert kind == "width" or "attn" in where or groups <= {kind}, caught.value  # no layer of another kind


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("nat_mini", "conv", "it has no hidden channels in the module group conv"),
        ("nat_mini", "width", r"stem\.proj\.1: stem\.norm normalizes over these channels"),
        ("van_b0", "heads", "it declares no attention heads"),
        ("litv2_small", "channels", r"stages\.1\.blocks\.0\.attn: .* declares that its channels cannot be cut"),
        ("swin_tiny_patch4_window7_224", "conv", "it has no hidden channels in the module group conv"),
        ("eca_mobilenet_v2", "width", r"\S+: \S+ is not traceable"),
    ],
)
def test_the_reason_is_about_the_kind_that_was_requested(name, kind, reason, small):
    with pytest.raises(PruningError, match=rf"structure '{kind}': \w+ has none that can be cut \({reason}\)"):
        plan(small(name), "magnitude", structure=[kind])


def test_norms_and_tables_that_follow_a_cut_are_shown_as_dependent(small):
    p = plan(small("nat_mini"), "magnitude", structure=["heads"], img_size=40)
    assert p.groups["stages.0.blocks.0.attn.rpb"] == "dependent"
    assert set(p.groups.values()) == {"qkv", "prj", "dependent"}


def test_nearly_everything_can_go_but_one_of_each_layer_stays(small, images):
    net = small("nat_mini")
    cut, zeroed, smaller, _ = cut_and_masked(net, ["heads", "mlp"], images("nat_mini"), ratio=0.99, scope="layer")
    torch.testing.assert_close(cut, zeroed, rtol=0, atol=1e-5)
    assert [m.heads for m in smaller.modules() if hasattr(m, "heads")] == [1, 1, 1]
    hidden = [m.fc1.out_features for m in smaller.modules() if hasattr(m, "fc1")]
    assert hidden == [1, 2, 2]


def test_a_layer_whose_structures_are_all_the_weakest_keeps_its_best(small):
    net = small("nat_mini")
    with torch.no_grad():
        for name in ("qkv", "proj"):
            net.get_parameter(f"stages.1.blocks.0.attn.{name}.weight").mul_(1e-3)
    p = plan(net, "magnitude", 0.4, structure=["heads"], img_size=40)
    assert p.widths["stages.1.blocks.0.attn.heads"] == 1
    assert p.removed["heads"] == (8, 20)


def test_a_ratio_that_would_empty_a_layer_is_refused(small):
    with pytest.raises(PruningError, match=r"ratio 0\.95 asks for 19 of 20 heads, and one must stay in each of 3"):
        plan(small("nat_mini"), structure=["heads"], ratio=0.95, img_size=40)


def test_heads_become_uneven_and_tables_follow(small):
    net = small("nat_mini")
    smaller = plan(net, "random", 0.5, structure=["heads"], img_size=40, seed=1).cut(net)
    layers = [m for m in smaller.modules() if hasattr(m, "rpb")]
    assert len({m.heads for m in layers}) > 1
    assert all(m.rpb.shape[0] == m.heads and m.qkv.out_features == 3 * m.proj.in_features for m in layers)


def test_the_scale_of_the_logits_stays_that_of_the_full_head(small):
    net = small("nat_mini")
    smaller = plan(net, "random", 0.5, structure=["channels"], img_size=40).cut(net)
    layers = [m for m in smaller.modules() if hasattr(m, "rpb")]
    assert all(m.scale == 8**-0.5 and m.proj.in_features < 8 * m.heads for m in layers)


@but_heavy_ones_slowly(SMALL)
def test_a_pruned_net_can_be_pruned_again(name, small, images):
    net, x = small(name), images(name)
    kinds = KINDS[name].split()
    once = plan(net, "random", 0.3, structure=kinds, img_size=x.shape[-1]).cut(net)
    try:
        cut, zeroed, _, p = cut_and_masked(once, kinds, x, ratio=0.3, seed=5)
    except PruningError as error:
        assert "one must stay" in str(error)
        return
    torch.testing.assert_close(cut, zeroed, rtol=0, atol=1e-5 * max(1.0, zeroed.abs().max().item()))
    assert p.counts.params_before == sum(q.numel() for q in once.parameters()) > p.counts.params_after


OURS = [name for name in SMALL if not name.startswith(("test_", "swin", "davit"))]


@but_heavy_ones_slowly(OURS)
def test_timm_builds_the_pruned_net_from_plain_data(name, small, images):
    net, x = small(name), images(name)
    kinds = KINDS[name].split()
    smaller = plan(net, "random", 0.4, structure=kinds, img_size=x.shape[-1]).cut(net)
    widths = json.loads(json.dumps(smaller.widths))
    built = timm.create_model(name, **{"num_classes": 7} | SMALL[name], widths=widths).eval().to(x.dtype)
    assert str(built) == str(smaller)
    built.load_state_dict(smaller.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(built(x), smaller(x), rtol=0, atol=0)
    features = timm.create_model(name, **{"num_classes": 7} | SMALL[name], widths=widths, features_only=True)
    features.eval().to(x.dtype)
    with torch.no_grad():
        maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    built.reset_classifier(3)
    assert built(x).shape == (2, 3)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_timms_own_nets_come_back_from_a_saved_folder(name, small, images, tmp_path):
    net, x = small(name), images(name)
    once = plan(net, "random", 0.3, structure=KINDS[name].split(), img_size=x.shape[-1]).cut(net)
    for i, smaller in enumerate((once, plan(once, "random", 0.2, structure=KINDS[name].split()[-1:]).cut(once))):
        folder = save_hub(smaller, tmp_path / str(i))
        back = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(back(x), smaller.eval()(x), rtol=0, atol=0)
            maps = features(x)
        assert type(back) is type(net) and [m.shape[1] for m in maps] == features.feature_info.channels()
        wider = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).eval()
        assert wider(x).shape == (2, 3)


def test_the_name_for_narrowed_nets_wants_to_know_of_what():
    with pytest.raises(ValueError, match="narrowed: wants of="):
        timm.create_model("narrowed")


@pytest.mark.parametrize("name", ["nat_mini", pytest.param("fv_halonet_h0", marks=pytest.mark.slow)])
def test_pruned_nets_are_exported(name, small, images, tmp_path):
    net, x = small(name), images(name)
    smaller = plan(net, "random", 0.4, structure=KINDS[name].split(), img_size=x.shape[-1]).cut(net)
    for export, file in ((export_onnx, "net.onnx"), (export_program, "net.pt2")):
        written = export(smaller, tmp_path / file, example=x)
        assert verify(smaller, written, torch.cat([x, x])).top1 == 1


def test_every_parameter_of_a_pruned_net_learns(small, images):
    net = small("nat_mini")
    smaller = plan(net, structure=["heads", "channels", "mlp"], img_size=40).cut(net).train()
    smaller(images("nat_mini")).square().sum().backward()
    assert [n for n, p in smaller.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_net_itself_stays_as_it_is(small):
    net = small("nat_mini")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan(net, structure=["heads", "mlp"], img_size=40).cut(net)
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and len(before) == len(after)


def test_the_score_of_a_head_is_the_sum_over_its_weights(small):
    net = small("nat_mini")
    p = plan(net, "magnitude", 1 / 3, structure=["heads"], scope="layer", img_size=40)
    for name in ("stages.0.blocks.0.attn", "stages.1.blocks.1.attn"):
        module = net.get_submodule(name)
        rows = module.qkv.weight.double().abs().view(3, module.heads, -1).sum((0, 2))
        columns = module.proj.weight.double().abs().view(-1, module.heads, 8).sum((0, 2))
        weakest = (rows + columns).argsort()[: round(module.heads / 3)]
        kept = p.cuts[f"{name}.rpb"][0].tolist()
        assert sorted(set(range(module.heads)) - set(kept)) == sorted(weakest.tolist())


def test_widths_of_another_net_are_refused():
    with pytest.raises(ValueError, match=r"has no module stages\.9"):
        timm.create_model("nat_mini", widths={"shapes": {"stages.9.blocks.0.mlp.fc1.weight": [3, 64]}})
    with pytest.raises(ValueError, match="cannot be cut to"):
        timm.create_model("nat_mini", widths={"shapes": {"stages.0.blocks.0.mlp.fc1.weight": [300, 64]}})
    with pytest.raises(ValueError, match="unknown 'shape'"):
        timm.create_model("nat_mini", widths={"shape": {}})


@pytest.mark.parametrize("changes", [{"routing": "learned"}, {"qk_dims": (8, 16)}, {"qk_dims": (4, 8)}])
@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_heads_that_a_layer_mixes_or_of_two_widths_are_not_cut(changes, kind):
    sizes = {"dims": (16, 32), "depths": (1, 1), "head_dim": 8, "regions": 3, "num_classes": 3}
    net = timm.create_model("biformer_tiny", **sizes, topks=(2, 3), **changes)
    with pytest.raises(PruningError, match="BiFormer has none that can be cut"):
        plan(net, "magnitude", 0.5, structure=[kind], img_size=48)
    assert plan(net, "magnitude", 0.5, structure=["mlp"], img_size=48).removed
