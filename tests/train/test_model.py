"""The timm model inside MMEngine: it is built as asked, or not at all."""

import pytest
import timm
import torch
from torch.nn import functional as F

from foveate.train import TrainError, load_recipe
from foveate.train.losses import TopK, judge
from foveate.train.model import Classifier, build_net


def build(recipe, **options):
    return build_net(load_recipe(recipe, options))


def test_an_unknown_model_is_refused_with_close_names(make_recipe):
    with pytest.raises(TrainError, match=r"unknown model 'nat_minni'; did you mean nat_mini"):
        build(make_recipe(), **{"model.name": "nat_minni"})


@pytest.mark.parametrize(
    ("name", "typo", "meant"), [("nat_mini", "depth", "depths"), ("test_resnet", "stemtype", "stem_type")]
)
def test_an_unknown_model_keyword_is_refused_with_the_close_name(make_recipe, name, typo, meant):
    with pytest.raises(TrainError, match=rf"unknown key model.{typo}: {name} does not have .*; did you mean .*{meant}"):
        build(make_recipe(), **{"model.name": name, f"model.{typo}": (1, 1)})


def test_a_value_that_the_model_refuses_is_explained_in_one_line(make_recipe):
    with pytest.raises(TrainError, match="timm cannot build nat_mini: dims must be multiples of head_dim 32"):
        build(make_recipe(), **{"model.name": "nat_mini", "model.dims": (30, 60, 90, 120)})


def test_keywords_shape_the_model(make_recipe):
    small = {"model.name": "van_b0", "model.dims": (16, 32), "model.depths": (1, 1), "model.mlp_ratios": (2, 2)}
    net = build(
        make_recipe(),
        **small,
        **{"model.drop_path_rate": 0.3, "model.in_chans": 1, "data.mean": (0.1,), "data.std": (0.2,)},
    )
    assert net.num_features == 32 and net(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert any(getattr(m, "drop_prob", 0) == pytest.approx(0.3) for m in net.modules())


def test_the_model_knows_how_the_recipe_prepares_images(make_recipe):
    cfg = timm.data.resolve_model_data_config(
        build(make_recipe(), **{"data.crop_pct": 0.95, "data.mean": (0.1, 0.2, 0.3)})
    )
    assert (cfg["input_size"], cfg["crop_pct"], cfg["mean"]) == ((3, 16, 16), 0.95, (0.1, 0.2, 0.3))


@pytest.mark.parametrize("classes", [3, 7])
def test_fine_tuning_starts_from_the_file_and_from_its_head_where_the_classes_agree(make_recipe, tmp_path, classes):
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=classes)
    torch.save(source.state_dict(), tmp_path / "start.pth")
    net = build(make_recipe(), **{"model.checkpoint": str(tmp_path / "start.pth")})
    assert torch.equal(net.conv1[0].weight, source.conv1[0].weight)
    assert net.fc.weight.shape[0] == 3 and torch.equal(net.fc.weight, source.fc.weight[:3]) == (classes == 3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone."])
def test_fine_tuning_starts_from_a_file_whose_names_carry_a_prefix(make_recipe, tmp_path, prefix):
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=3)
    named = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": named}, tmp_path / "start.pth")
    net = build(make_recipe(), **{"model.checkpoint": str(tmp_path / "start.pth")})
    assert torch.equal(net.conv1[0].weight, source.conv1[0].weight)


def test_a_start_that_does_not_fit_is_refused(make_recipe, tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(TrainError, match=r"vit.pth does not fit test_resnet: it lacks conv1.0.weight"):
        build(make_recipe(), **{"model.checkpoint": str(tmp_path / "vit.pth")})
    with pytest.raises(TrainError, match=r"nowhere.pth does not exist"):
        build(make_recipe(), **{"model.checkpoint": "nowhere.pth"})
    (tmp_path / "half.pth").write_bytes(b"PK")
    with pytest.raises(TrainError, match=r"half.pth is truncated or damaged"):
        build(make_recipe(), **{"model.checkpoint": str(tmp_path / "half.pth")})


def test_mmengine_does_not_initialise_the_weights_again(make_recipe):
    recipe = load_recipe(make_recipe())
    model = Classifier(recipe, build_net(recipe))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_precision_is_that_of_the_recipe_while_training_and_while_validating(make_recipe):
    seen = []
    for precision in ("fp32", "bf16"):
        recipe = load_recipe(make_recipe(), {"precision": precision})
        model = Classifier(recipe, build_net(recipe))
        model.net.conv1[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        for mode in ("loss", "predict"):
            model(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), mode)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_hits_and_loss_are_counted_image_by_image():
    logits = torch.tensor([[9.0, 5, 4, 3, 2, 1], [9, 5, 4, 3, 2, 1], [9, 5, 4, 3, 2, 1]])
    targets = torch.tensor([0, 4, 5])
    rows = judge(logits, targets)
    assert rows[:, :2].tolist() == [[1, 1], [0, 1], [0, 0]]
    metric = TopK().compute_metrics(rows.tolist())
    assert metric["top1"] == pytest.approx(100 / 3) and metric["top5"] == pytest.approx(200 / 3)
    assert metric["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
