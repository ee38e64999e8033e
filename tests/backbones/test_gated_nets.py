"""ECA-Net and ELA: kernels and places of the gates, and the published checkpoint of MobileNetV2."""

import pytest
import timm
import torch
from torch import nn

from foveate.attention_ops import EfficientChannelAttention, EfficientLocalAttention

KERNELS = {
    "eca_resnet18": (3, 5, 7, 7),
    "eca_resnet34": (3, 3, 5, 7),
    "eca_resnet50": (3, 5, 5, 7),
    "eca_resnet101": (3, 3, 5, 7),
    "eca_resnet152": (3, 3, 5, 7),
}
PARAMS = {"eca_resnet50": 25_557_112, "eca_resnet101": 44_549_317, "eca_resnet152": 60_193_042}
PARAMS |= {"eca_resnet34": 21_797_744, "eca_mobilenet_v2": 3_504_911}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_the_published_ones(name):
    model = timm.create_model(name, device="meta")
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert tuple(stage[-1].se.conv.kernel_size[0] for stage in stages) == KERNELS[name]


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts_are_the_official_ones(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMS[name]


def test_mobilenets_kernels_follow_the_published_checkpoint_or_the_repository():
    published = timm.create_model("eca_mobilenet_v2", device="meta")
    repository = timm.create_model("eca_mobilenet_v2", wide_from=96, device="meta")
    sizes = [
        [g.conv.kernel_size[0] for g in m.modules() if isinstance(g, EfficientChannelAttention)]
        for m in (published, repository)
    ]
    assert sizes[0] == [1] * 6 + [3] * 11
    assert sizes[1] == [1] * 10 + [3] * 7


@pytest.mark.parametrize("changes", [{"kernel_sizes": (3, 4, 5, 7)}, {"kernel_sizes": (3, 5)}, {"depths": (1, 2)}])
def test_configs_that_contradict_themselves_are_refused(changes):
    with pytest.raises(ValueError, match=r"kernel_sizes must be odd|must have one entry per stage, 4"):
        timm.create_model("eca_resnet18", **changes)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenet_v2"])
def test_official_files_load_in_either_wrapper(name, wrap, det, golden, tmp_path):
    golden_name = {"eca_resnet18": "official_eca_resnet18_k3577", "eca_mobilenet_v2": "official_eca_mobilenet_v2_ckpt"}
    weights = det.det_state_dict(golden(f"ecanet__{golden_name[name]}")[0]["state_dict"])
    torch.save(wrap(weights), tmp_path / "official.pth.tar")
    overlay = {"file": str(tmp_path / "official.pth.tar")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    ours = {tuple(v.flatten()[:8].tolist()) for v in model.state_dict().values() if v.dim() > 1}
    assert ours == {tuple(v.flatten()[:8].tolist()) for v in weights.values() if v.dim() > 1}


@pytest.mark.parametrize(
    ("name", "changes"), [("eca_resnet18", {"kernel_sizes": (3, 3, 3, 3)}), ("eca_mobilenet_v2", {"wide_from": 96})]
)
def test_weights_of_other_kernels_are_refused(name, changes, tmp_path):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "other.pth")
    overlay = {"file": str(tmp_path / "other.pth")}
    with pytest.raises(ValueError, match=r"not a checkpoint of this model: it has .*conv\.weight"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **changes)


@pytest.mark.parametrize("name", ["ela_resnet18_t", "ela_resnet50_l", "ela_mobilenet_v2_s"])
def test_gates_sit_where_the_authors_put_them(name):
    model = timm.create_model(name, device="meta")
    gates = {key: m for key, m in model.named_modules() if isinstance(m, EfficientLocalAttention)}
    if "resnet" in name:
        blocks = [model.layer1[0], model.layer4[-1]]
        assert [block.se.conv.in_channels for block in blocks] == [64, 512]  # of a bottleneck: the inner width
        assert len(gates) == {"18": 8, "50": 16}[name[10:12]]
    else:
        assert len(gates) == 16 and not any(key.startswith("blocks.0.") for key in gates)
        assert all(gate.conv.in_channels % 6 == 0 for gate in gates.values())  # the expanded width


@pytest.mark.parametrize("name", ["ela_resnet18", "ela_resnet50", "ela_mobilenet_v2"])
@pytest.mark.parametrize("variant", ["t", "b", "s", "l"])
def test_a_name_without_a_letter_takes_the_variant_by_keyword(name, variant):
    with torch.device("meta"):
        bare, lettered = timm.create_model(name, ela_variant=variant), timm.create_model(f"{name}_{variant}")
        usual = timm.create_model(name)
    assert str(bare) == str(lettered)
    assert (str(usual) == str(lettered)) == (variant == ("l" if name == "ela_mobilenet_v2" else "b"))


@pytest.mark.parametrize("name", ["ela_resnet18_b", "ela_resnet50_b", "ela_mobilenet_v2_b"])
def test_ela_residual_changes_the_result_and_no_key(name):
    torch.manual_seed(0)
    plain, residual = (timm.create_model(name, ela_residual=r, num_classes=3).eval() for r in (False, True))
    residual.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert not torch.allclose(plain(x), residual(x))


def test_an_ela_bottleneck_of_open_gates_is_timms_bottleneck():
    torch.manual_seed(0)
    ours = timm.create_model("ela_resnet50_b", num_classes=3).eval()
    theirs = timm.create_model("resnet50", num_classes=3).eval()
    for module in ours.modules():
        if isinstance(module, EfficientLocalAttention):
            nn.init.zeros_(module.norm.weight)
            nn.init.constant_(module.norm.bias, 30.0)  # sigmoid(30) is 1 in float32
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if ".se." not in k})
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))
