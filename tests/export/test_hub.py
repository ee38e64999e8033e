"""timm's hub layout: what is saved comes back, or is not saved."""

import json
import os
import stat

import pytest
import timm
import torch

from foveate.export import ExportError, load_model, save_hub, verify


def test_a_saved_model_comes_back(net, tmp_path, images):
    folder = save_hub(net, tmp_path / "hub")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    back = load_model(f"local-dir:{folder}")
    assert torch.equal(back(images), net(images))
    assert verify(net, folder, images).largest_absolute == 0


def test_keyword_overrides_come_back(tmp_path):
    net = timm.create_model("nat_mini", depths=(1, 1, 1, 1), num_classes=3, in_chans=1).eval()
    folder = save_hub(net, tmp_path / "hub")
    assert json.loads((folder / "config.json").read_text())["model_args"]["depths"] == [1, 1, 1, 1]
    back = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 1, 64, 96)
    assert torch.equal(back(x), net(x))


def test_overrides_can_be_overridden_once_more(net, tmp_path):
    folder = save_hub(net, tmp_path / "hub")
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2).num_classes == 2


def test_the_image_size_is_saved_with_the_preprocessing(net, tmp_path):
    folder = save_hub(net, tmp_path / "hub", img_size=192)
    assert timm.create_model(f"local-dir:{folder}").pretrained_cfg["input_size"] == (3, 192, 192)


def test_channels_last_weights_are_saved(net, tmp_path, images):
    folder = save_hub(net.to(memory_format=torch.channels_last), tmp_path / "hub")
    assert net.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    verify(net, folder, images)


def test_both_files_may_be_read_by_the_same_people(net, tmp_path):
    folder = save_hub(net, tmp_path / "hub")
    modes = {stat.S_IMODE(os.stat(folder / name).st_mode) for name in os.listdir(folder)}
    assert len(modes) == 1


def test_a_model_that_would_not_come_back_is_not_saved(net, tmp_path):
    net.layer1 = torch.nn.Identity()
    with pytest.raises(ExportError, match="cannot be loaded from its files"):
        save_hub(net, tmp_path / "hub")
    assert os.listdir(tmp_path) == []


def test_a_taken_folder_is_left_alone(net, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an empty folder"):
        save_hub(net, tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_an_empty_folder_is_filled(net, tmp_path):
    (tmp_path / "hub").mkdir()
    assert len(os.listdir(save_hub(net, tmp_path / "hub"))) == 2


def test_a_module_that_timm_did_not_make_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"Linear was not made by timm\.create_model"):
        save_hub(torch.nn.Linear(2, 2), tmp_path / "hub")
