"""Every command that takes an image size takes a number or HEIGHTxWIDTH."""

import json
import os
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from foveate.commands._options import parse_size
from foveate.commands.main import app
from foveate.export import open_file

GROUP: Any = typer.main.get_command(app)
WITH_SIZE = sorted(
    name for name, command in GROUP.commands.items() if any("--img-size" in option.opts for option in command.params)
)
NET = ["test_resnet", "--model-arg", "num_classes=3"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for color in ("red", "green", "blue"):
            os.makedirs(f"data/{split}/{color}")
            for i in range(3):
                noise = torch.randint(0, 60, (50, 70, 3), generator=generator, dtype=torch.uint8)
                noise[..., ("red", "green", "blue").index(color)] += 150
                Image.fromarray(noise.numpy()).save(f"data/{split}/{color}/{i}.png")


def foveate(*arguments: str):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.mark.parametrize(
    ("text", "size"), [("224", 224), ("224x320", (224, 320)), ("64X48", (64, 48)), (" 8 x 8192 ", (8, 8192))]
)
def test_a_size_is_a_number_or_two_sides(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("command", WITH_SIZE)
@pytest.mark.parametrize("text", ["0", "8193", "64y", "64x", "64x0", "1x2x3", "-64", "6.4", "9" * 6, "", "64,96"])
def test_any_other_size_is_refused_in_one_line(command, text):
    done = CliRunner().invoke(app, [command, "--img-size", text])
    (line,) = done.stderr.splitlines()
    wanted = "wanted px from 1 to 8192: a number, or HEIGHTxWIDTH such as 224x320, got "
    assert done.exit_code == 2 and line.startswith(f"foveate {command}: Invalid value for '--img-size': {wanted}")


def test_the_commands_are_these():
    assert WITH_SIZE == ["demo", "export", "look", "outliers", "predict", "probe", "prune", "validate"]


@pytest.mark.parametrize("model", ["test_resnet", "vit_tiny_patch16_224"])
def test_a_rectangular_program_is_exported_and_asked(model):
    few = [] if model == "test_resnet" else ["--model-arg", "depth=1", "--model-arg", "img_size=(32,48)"]
    out = ["-o", "net.pt2", "--format", "torch", "--images", "data"]
    arguments = [model, "--model-arg", "num_classes=3", *few, "--img-size", "32x48"]
    assert "batch x 3 x 32 x 48" in foveate("export", *arguments, *out)
    assert open_file("net.pt2").metadata.input_size == (3, 32, 48)
    assert len(foveate("predict", "net.pt2", "data/val").splitlines()) == 9


def test_a_model_of_fixed_size_is_built_for_the_size_that_is_given():
    torch.manual_seed(0)
    lines = foveate("predict", "test_vit", "data/val/red", "--img-size", "32x64").splitlines()
    assert len([json.loads(line)["classes"] for line in lines if line.startswith("{")]) == 3


def test_a_hub_folder_keeps_a_rectangle():
    foveate("export", *NET, "--img-size", "32x48", "-o", "hub", "--format", "hub", "--images", "data")
    assert open_file("hub").metadata.input_size == (3, 32, 48)
    assert "3 x 32 x 48" in foveate("validate", "hub", "--data", "data", "--workers", "0")
    assert "3 x 64 x 40" in foveate("validate", "hub", "--data", "data", "--workers", "0", "--img-size", "64x40")


def test_pruning_and_outliers_take_rectangles():
    foveate("prune", *NET, "-o", "out", "--img-size", "32x48", "--ratio", "0.3")
    with open("out/plan.json") as file:
        assert json.load(file)["counts"]["input_size"] == [3, 32, 48]
    assert "18 images" in foveate("outliers", "test_resnet", "--data", "data", "--img-size", "32x48")


@pytest.mark.slow
def test_a_demo_on_rectangles():
    pytest.importorskip("matplotlib")
    options = ["--model", "test_resnet", "--img-size", "32x48", "--epochs", "1", "--out", "mine"]
    foveate("demo", "--images", "data", *options)
    assert open_file("mine/model.onnx").metadata.input_size == (3, 32, 48)
    with open("mine/summary.json") as file:
        assert json.load(file)["img_size"] == [32, 48]
