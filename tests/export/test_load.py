"""Models come with exactly the weights that were asked for, or not at all."""

import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from foveate.export import ExportError, load_model


def torch_file(state, path: Path) -> Path:
    torch.save(state, path)
    return path


def wrapped(state, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


def mmengine_checkpoint(state) -> dict:
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([0.5, 0.25], [1, 1])
    return {
        "meta": {"epoch": 3},
        "state_dict": wrapped(state, "backbone."),
        "message_hub": {"log_scalars": {"loss": history}},
    }


LAYOUTS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "ema": lambda state: {"model": {k: v * 0 for k, v in state.items()}, "model_ema": state},
    "ddp": lambda state: wrapped(state, "module."),
    "wrapper": lambda state: wrapped(state, "backbone."),
    "mmengine": mmengine_checkpoint,
}


def assert_same_weights(model, state) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert [key for key in state if not torch.equal(own[key], state[key])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_every_layout_is_loaded(layout, net, tmp_path):
    file = torch_file(LAYOUTS[layout](net.state_dict()), tmp_path / "net.pth")
    model = load_model("test_resnet", file, num_classes=7)
    assert_same_weights(model, net.state_dict())
    assert not model.training


@pytest.mark.parametrize("options", [{}, {"features_only": True}], ids=["whole", "features"])
def test_of_a_biformer_training_file_the_weights_of_the_published_accuracy_are_taken(options, tmp_path):
    net = timm.create_model("biformer_tiny", num_classes=7, depths=(1, 1, 1, 1))
    state = net.state_dict()
    average = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    file = torch_file({"model": state, "model_ema": average}, tmp_path / "net.pth")
    loaded = load_model("biformer_tiny", file, num_classes=7, depths=(1, 1, 1, 1), **options)
    loaded = getattr(loaded, "model", loaded)  # features_only wraps
    key = "stages.0.blocks.0.attn.qkv.weight"
    assert torch.equal(loaded.state_dict()[key], state[key])


def test_safetensors_are_loaded(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    assert_same_weights(load_model("test_resnet", tmp_path / "net.safetensors", num_classes=7), net.state_dict())


def test_the_configuration_holds_no_weights_afterwards(net, tmp_path):
    model = load_model("test_resnet", torch_file(net.state_dict(), tmp_path / "net.pth"), num_classes=7)
    assert "state_dict" not in model.pretrained_cfg and model.pretrained_cfg["num_classes"] == 7


def convnext_authors_name(key: str) -> str:
    key = key.replace("stem.", "downsample_layers.0.").replace("blocks.", "").replace("conv_dw", "dwconv")
    key = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key).replace("mlp.fc", "pwconv")
    return key.replace("head.norm", "norm").replace("head.fc", "head")


def test_the_official_layout_goes_through_the_familys_filter(tmp_path):
    net = timm.create_model("test_convnext")
    official = {convnext_authors_name(key): value for key, value in net.state_dict().items()}
    assert not official.keys() & {"stem.0.weight", "head.fc.weight"}
    assert_same_weights(load_model("test_convnext", torch_file(official, tmp_path / "net.pth")), net.state_dict())


def test_feature_backbones_take_a_checkpoint_of_the_whole_model(net, tmp_path):
    file = torch_file(net.state_dict(), tmp_path / "net.pth")
    features = load_model("test_resnet", file, num_classes=7, features_only=True)
    assert torch.equal(features.state_dict()["layer4.0.conv1.weight"], net.state_dict()["layer4.0.conv1.weight"])


@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}], ids=["whole", "features"])
def test_a_checkpoint_of_another_model_is_refused_with_its_keys(kwargs, net, tmp_path):
    file = torch_file(net.state_dict(), tmp_path / "net.pth")
    message = r"net\.pth cannot be loaded into test_vit: it lacks cls_token, pos_embed.* and \d+ more; it has conv1\.0"
    with pytest.raises(ExportError, match=message):
        load_model("test_vit", file, **kwargs)


def test_another_number_of_classes_is_refused_with_the_remedy(net, tmp_path):
    file = torch_file(net.state_dict(), tmp_path / "net.pth")
    message = r"fc\.weight \[7, \d+\] in the file, \[1000, \d+\] wanted.*; for its 7 classes pass num_classes"
    with pytest.raises(ExportError, match=message):
        load_model("test_resnet", file)


def cut(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2)
    return path


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_truncated_checkpoint_is_refused(name, net, tmp_path):
    save = torch.save if name.endswith("pth") else save_file
    save(net.state_dict(), tmp_path / name)
    with pytest.raises(ExportError, match=rf"{name} is truncated or damaged, or not a checkpoint"):
        load_model("test_resnet", cut(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, r"holds no state dict: .* got epoch \(int\)"),
        ({}, "got nothing"),
        ([1, 2], "holds no state dict: .* got a list"),
    ],
)
def test_a_file_without_tensors_is_refused(content, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        load_model("test_resnet", torch_file(content, tmp_path / "net.pth"))


class Burglar:
    def __init__(self, loot: Path) -> None:
        self.loot = loot

    def __reduce__(self):
        return os.mkdir, (str(self.loot),)


def test_a_checkpoint_that_brings_code_is_refused_and_not_run(net, tmp_path):
    file = torch_file({"state_dict": net.state_dict(), "extra": Burglar(tmp_path / "loot")}, tmp_path / "net.pth")
    with pytest.raises(ExportError, match=r"needs more than tensors \(.*mkdir\), which could run code"):
        load_model("test_resnet", file)
    assert not (tmp_path / "loot").exists()


def test_code_beside_mmengines_log_is_refused_too(net, tmp_path):
    content = mmengine_checkpoint(net.state_dict()) | {"extra": Burglar(tmp_path / "loot")}
    with pytest.raises(ExportError, match="which could run code"):
        load_model("test_resnet", torch_file(content, tmp_path / "net.pth"), num_classes=7)
    assert not (tmp_path / "loot").exists()


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet5O", {}, "unknown model resnet5O; did you mean resnet50"),
        ("qqqqqqqqq", {}, r"unknown model qqqqqqqqq; see timm\.list_models"),
        ("resnet50.a1_in1q", {}, r"unknown weights a1_in1q of resnet50; known: .*a1_in1k"),
        ("./net", {}, "has no source prefix but looks like"),
        ("local-dir:/nowhere", {}, r"/nowhere holds no config\.json"),
        ("test_resnet", {"windows": 3}, r"test_resnet cannot be built with {'windows': 3}: .*windows"),
        ("test_resnet", {"checkpoint": "/nowhere.pth"}, r"checkpoint /nowhere\.pth does not exist"),
        ("test_resnet", {"checkpoint": "/"}, "is a folder; name the model local-dir:/"),
        ("test_resnet", {"checkpoint": "/nowhere.pth", "pretrained": True}, "not both"),
    ],
)
def test_a_mistake_is_named(name, kwargs, message):
    with pytest.raises(ExportError, match=message):
        load_model(name, **kwargs)
