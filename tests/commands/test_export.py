"""`foveate export`: one table on success; one line, its exit code and no file on failure."""

import os

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from foveate._errors import RequestError
from foveate.commands._options import parse_options
from foveate.commands.main import app

SMALL = ["--img-size", "64", "--model-arg", "num_classes=7"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def export(*arguments: str):
    return CliRunner().invoke(app, ["export", *arguments])


def test_onnx_is_written_and_reported():
    done = export("test_resnet", "-o", "net.onnx", *SMALL)
    assert done.exit_code == 0, done.output
    assert os.listdir() == ["net.onnx"]
    for fact in ("net.onnx", "MB", "batch x 3 x 64 x 64", "max. difference", "100%", "random: neither"):
        assert fact in done.stdout


def test_a_checkpoint_and_a_folder_of_images_are_used():
    net = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(net.state_dict(), "weights.pth")
    os.mkdir("pictures")
    Image.new("RGB", (40, 50), "red").save("pictures/a.png")
    done = export(
        "test_resnet",
        "-o",
        "net.pt2",
        "--format",
        "torch",
        "--checkpoint",
        "weights.pth",
        "--images",
        "pictures",
        *SMALL,
    )
    assert done.exit_code == 0, done.output
    assert "weights.pth" in done.stdout
    program = torch.export.load("net.pt2").module()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(program(x), net(x))


def test_a_hub_folder_is_written_and_can_be_exported_again():
    assert export("test_resnet", "-o", "hub", "--format", "hub", *SMALL).exit_code == 0
    done = export("local-dir:hub", "-o", "net.onnx")
    assert done.exit_code == 0, done.output
    assert "batch x 3 x 64 x 64" in done.stdout and "local-dir:hub" in done.stdout


def test_dynamic_leaves_the_named_dimensions_free():
    done = export("test_resnet", "-o", "net.pt2", "--format", "torch", "--dynamic", "batch,size", *SMALL)
    assert done.exit_code == 0, done.output
    assert "batch x 3 x height x width" in done.stdout
    assert torch.export.load("net.pt2").module()(torch.randn(3, 3, 70, 45)).shape == (3, 7)
    fixed = export("test_resnet", "-o", "one.pt2", "--format", "torch", "--dynamic", "none", *SMALL)
    assert fixed.exit_code == 0 and "1 x 3 x 64 x 64" in fixed.stdout, fixed.output
    with pytest.raises(AssertionError, match="Guard failed"):
        torch.export.load("one.pt2").module()(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "net.onnx", "--dynamic", "width"], "--dynamic takes batch, size or none, got width"),
        (["-o", "hub", "--format", "hub", "--dynamic", "size"], "a hub folder takes any batch and size"),
        (["-o", "net.onnx", "--dynamic", "size", "--int8", "--calibrate", "."], "leaves the batch free"),
    ],
)
def test_dimensions_that_a_file_cannot_leave_free_are_refused(arguments, message):
    done = export("test_resnet", *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert os.listdir() == []


def test_a_model_of_fixed_size_is_built_at_the_size_asked_for():
    done = export("test_vit", "-o", "net.pt2", "--format", "torch", "--img-size", "96")
    assert done.exit_code == 0, done.output
    assert "batch x 3 x 96 x 96" in done.stdout


def test_a_file_that_differs_is_not_put_in_place():
    done = export("test_resnet", "-o", "net.onnx", "--tolerance", "0", *SMALL)
    assert done.exit_code == 1
    assert done.stderr.startswith("foveate export: net.onnx differs from the model by")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5O", "-o", "net.onnx"], "unknown model resnet5O; did you mean"),
        (["test_resnet", "-o", "net.pt"], "wanted a file name that ends in .onnx"),
        (["test_resnet", "-o", "net.onnx", "--checkpoint", "none.pth"], "checkpoint none.pth does not exist"),
        (["test_resnet", "-o", "net.onnx", "--images", "none"], "no image in none"),
        (["test_resnet", "-o", "net.onnx", "--model-arg", "depth"], "--model-arg wants key=value, got 'depth'"),
        (["test_vit", "-o", "net.onnx", "--img-size", "100"], "does not run on an input of (2, 3, 100, 100)"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(arguments, message):
    done = export(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert os.listdir() == [] and done.stdout == ""


def test_a_full_disk_prints_one_line_and_leaves_nothing(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveate._files.os.replace", full)
    done = export("test_resnet", "-o", "hub", "--format", "hub", *SMALL)
    assert (done.exit_code, done.stderr) == (2, "foveate export: [Errno 28] No space left on device: 'hub'\n")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(1, 2)", (1, 2)),
        ("0.5", 0.5),
        ("avg", "avg"),
        ("False", False),
        ("false", False),
        ("none", None),
        ("a=b", "a=b"),
    ],
)
def test_model_arguments_are_literals_or_text(text, value):
    assert parse_options([f"key={text}"], "--model-arg") == {"key": value}


def test_a_model_argument_without_a_name_is_refused():
    with pytest.raises(RequestError, match="wants key=value, got '=3'"):
        parse_options(["=3"], "--model-arg")


@pytest.mark.parametrize("file_format", ["onnx", "torch", "openvino", "hub"])
def test_class_names_of_another_number_of_classes_are_refused(file_format):
    with open("names.txt", "w") as file:
        file.write("a\nb\n")
    suffix = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml", "hub": ""}[file_format]
    done = export("test_resnet", "-o", f"net{suffix}", "--format", file_format, "--labels", "names.txt", *SMALL)
    assert done.exit_code == 2 and "2 class names are given, the model has" in done.stderr, done.output
    assert os.listdir() == ["names.txt"]


def test_the_size_is_that_of_the_written_file():
    with open("net.bin", "wb") as file:
        file.write(bytes(9_000_000))
    done = export("test_resnet", "-o", "net.pt2", "--format", "torch", *SMALL)
    assert f"{os.path.getsize('net.pt2') / 1e6:.2f} MB" in done.stdout, done.output
