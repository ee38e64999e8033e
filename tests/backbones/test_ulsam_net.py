"""Where the gates of ULSAM stand in MobileNets."""

import pytest
import timm
import torch

from foveate.attention_ops import SubspaceAttention

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def gates(model):
    return [name for name, module in model.named_modules() if isinstance(module, SubspaceAttention)]


def meta(name, **kwargs):
    return timm.create_model(name, device="meta", **kwargs)


def test_layers_are_counted_from_the_stem():
    assert gates(meta("ulsam_mobilenetv1", insert=(2, 14))) == ["blocks.0.0.ulsam", "blocks.4.1.ulsam"]
    assert gates(meta("ulsam_mobilenetv2", replace=(13, 14, 16, 17))) == [
        "blocks.4.1", "blocks.4.2", "blocks.5.1", "blocks.5.2"
    ]  # fmt: skip
    assert gates(meta("ulsam_mobilenetv2", insert=[17])) == ["blocks.5.2.ulsam"]


def test_either_list_alone_leaves_the_other_empty_and_none_gives_the_published_places():
    assert gates(meta("ulsam_mobilenetv1")) == gates(meta("ulsam_mobilenetv1", insert=None)) == ["blocks.3.5.ulsam"]
    assert gates(meta("ulsam_mobilenetv1", replace=(9,))) == ["blocks.3.2"]
    assert gates(meta("ulsam_mobilenetv2")) == ["blocks.4.2", "blocks.5.2"]
    assert gates(meta("ulsam_mobilenetv2", insert=(), replace=())) == []


# millions of parameters: the published counts
PUBLISHED = [
    ("ulsam_mobilenetv1", {"insert": (11,)}, 4.2),
    ("ulsam_mobilenetv1", {"replace": (9,)}, 3.9),
    ("ulsam_mobilenetv2", {"replace": (16, 17)}, 2.77),
    ("ulsam_mobilenetv2", {"replace": (13, 14, 16, 17)}, 2.54),
]


@pytest.mark.parametrize(("name", "places", "millions"), PUBLISHED)
def test_sizes_are_about_the_published_ones(name, places, millions):
    params = sum(p.numel() for p in meta(name, **places).parameters()) / 1e6
    assert abs(params - millions) < 0.12  # the paper's table counts other layers' biases and norms


def test_without_gates_the_networks_are_timms():
    for ours, theirs in (("ulsam_mobilenetv1", "mobilenetv1_100"), ("ulsam_mobilenetv2", "mobilenetv2_100")):
        torch.manual_seed(0)
        plain = timm.create_model(theirs, num_classes=5).eval()
        model = timm.create_model(ours, num_classes=5, insert=(), replace=()).eval()
        model.load_state_dict(plain.state_dict())
        torch.testing.assert_close(model(X), plain(X))


@pytest.mark.parametrize("name", ["ulsam_mobilenetv1", "ulsam_mobilenetv2"])
def test_an_inserted_gate_acts_on_the_output_of_its_layer(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, insert=(3,), replace=()).eval()
    stage, block = (1, 0)
    seen = {}
    gate = model.blocks[stage][block].ulsam
    gate.register_forward_hook(lambda _, args, out: seen.update(inside=args[0], out=out))
    model.blocks[stage][block].register_forward_hook(lambda _, args, out: seen.update(block=out))
    model(X)
    assert torch.equal(seen["block"], seen["out"]) and not torch.equal(seen["inside"], seen["out"])


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("ulsam_mobilenetv1", {"insert": (1,)}, r"insert, replace take layers 2 to 14 \(1: the stem\), got 1"),
        ("ulsam_mobilenetv2", {"replace": (19,)}, "take layers 2 to 18 .*, got 19"),
        ("ulsam_mobilenetv2", {"insert": (5,), "replace": (5,)}, "layer 5 is named twice"),
        ("ulsam_mobilenetv2", {"replace": (15,)}, "layer 15 cannot be replaced, it turns 96 channels into 160"),
        ("ulsam_mobilenetv1", {"insert": (12,), "groups": 7}, "groups must divide the 512 channels, got 7"),
        ("ulsam_mobilenetv1", {"drop_path_rate": 0.1}, "no residual branches; drop_path_rate must be 0, got 0.1"),
        ("ulsam_mobilenetv1", {"depths": (1, 2)}, "depths must have one entry per stage, 5"),
    ],
)
def test_places_that_do_not_fit_are_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        meta(name, **changes)


def test_features_and_pruning_end_at_a_gate_too():
    model = timm.create_model("ulsam_mobilenetv2", replace=(14, 17), features_only=True, out_indices=(3, 4)).eval()
    assert [tuple(x.shape[1:]) for x in model(X)] == [(96, 4, 4), (320, 2, 2)]
    whole = timm.create_model("ulsam_mobilenetv2", replace=(14,)).eval()
    assert whole.prune_intermediate_layers([5], extra_blocks=True) == [5]
    assert whole.num_features == 96
