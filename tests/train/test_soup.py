"""Averages of checkpoints: exact means, strict about what is averaged, and checkpoints themselves."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from foveate.train import TrainError, evaluate, load_net, train
from foveate.train.checkpoints import net_weights, read_checkpoint
from foveate.train.soup import average_checkpoints, update_statistics, write_soup


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """Two runs of one model with different seeds: their best checkpoints."""
    found = []
    for seed in (0, 1):
        recipe = {
            "model": {"name": "test_resnet", "num_classes": 3},
            "data": {"root": str(images), "img_size": 32, "workers": 0},
            "optimizer": {"lr": 1e-3}, "schedule": {"epochs": 1}, "batch_size": 4, "seed": seed,
        }  # fmt: skip
        found.append(train(recipe, work_dir=tmp_path_factory.mktemp("run") / "run", device="cpu").best_checkpoint)
    return found


def weights(path):
    return net_weights(read_checkpoint(path))


def test_the_average_is_exact_and_a_checkpoint_of_the_first_recipe(runs, images, tmp_path):
    out = write_soup(average_checkpoints([*runs, runs[1]]), tmp_path / "soup.pth")
    (a, b), found = map(weights, runs), weights(out)
    for key, value in found.items():
        wanted = ((a[key].double() + 2 * b[key].double()) / 3).float() if value.is_floating_point() else b[key]
        assert torch.equal(value, wanted) and value.dtype == a[key].dtype, key
    meta = read_checkpoint(out)["meta"]
    assert meta["recipe"]["seed"] == 0 and meta["best"] is None and len(meta["soup"]) == 3
    assert load_net(out).pretrained_cfg["label_names"] == ("ant", "bee", "cow")
    assert evaluate(out, data=images, device="cpu").images == 9


def test_the_average_of_weights_is_weights(runs, tmp_path):
    files = []
    for i, path in enumerate(runs):
        files.append(tmp_path / f"{i}.pth")
        torch.save(load_net(path).state_dict(), files[-1])
    out = write_soup(average_checkpoints(files), tmp_path / "soup.safetensors")
    both = write_soup(average_checkpoints(runs), tmp_path / "both.safetensors")
    assert all(torch.equal(value, load_file(both)[key]) for key, value in load_file(out).items())
    with pytest.raises(TrainError, match="got both"):
        average_checkpoints([files[0], runs[0]])
    with pytest.raises(TrainError, match="wanted checkpoints of foveate train, which know their data"):
        update_statistics(average_checkpoints(files), None)


def test_statistics_of_batchnorm_are_measured_again(runs, images):
    soup = average_checkpoints(runs)
    measured = update_statistics(soup, images, device="cpu")
    for key, value in measured["state_dict"].items():
        statistic = key.endswith(("running_mean", "running_var"))
        assert torch.equal(value, soup["state_dict"][key]) != statistic, key
    again = update_statistics(soup, images, device="cpu")
    assert all(torch.equal(value, again["state_dict"][key]) for key, value in measured["state_dict"].items())
    fewer = update_statistics(soup, images, batches=1, device="cpu")["state_dict"]
    assert fewer["net.bn1.num_batches_tracked"] == 1 and measured["state_dict"]["net.bn1.num_batches_tracked"] == 6


def test_checkpoints_that_do_not_go_together_are_refused(runs, tmp_path):
    other = tmp_path / "other.pth"
    for net, message in [
        (timm.create_model("test_resnet", num_classes=4), r"are of different models: fc\.(weight|bias) is"),
        (timm.create_model("test_vit", num_classes=3), "are of different models: only one of them has"),
    ]:
        torch.save(net.state_dict(), other)
        torch.save(load_net(runs[0]).state_dict(), tmp_path / "first.pth")
        with pytest.raises(TrainError, match=message):
            average_checkpoints([tmp_path / "first.pth", other])
    broken = load_net(runs[0]).state_dict()
    broken["fc.bias"][0] = float("nan")
    torch.save(broken, other)
    with pytest.raises(TrainError, match=r"other.pth: fc.bias has values that are not finite"):
        average_checkpoints([tmp_path / "first.pth", other])
    with pytest.raises(TrainError, match="wanted at least two checkpoints to average, got 1"):
        average_checkpoints(runs[:1])
    with pytest.raises(TrainError, match=r"none.pth does not exist"):
        average_checkpoints([runs[0], tmp_path / "none.pth"])
    classes = read_checkpoint(runs[1])
    classes["meta"]["classes"] = ["ant", "bee", "dog"]
    torch.save(classes, other)
    with pytest.raises(TrainError, match="were trained on different classes"):
        average_checkpoints([runs[0], other])
    for out, message in (
        (tmp_path / "a.bin", "ends in .pth or .safetensors"),
        (tmp_path / "no/a.pth", "does not exist"),
    ):
        with pytest.raises(TrainError, match=message):
            write_soup({"state_dict": {}}, out)


def test_adapters_are_not_averaged(runs, tmp_path):
    state = read_checkpoint(runs[0])
    state["state_dict"] = {f"{key[:-6]}.lora_A.default.weight": value for key, value in state["state_dict"].items()}
    torch.save(state, tmp_path / "lora.pth")
    with pytest.raises(TrainError, match="holds LoRA adapters, whose products do not average"):
        average_checkpoints([tmp_path / "lora.pth", runs[0]])
