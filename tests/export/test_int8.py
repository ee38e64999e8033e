"""Int8 files: the weights are int8, the outputs stay close, and the report is of the same runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.export import ExportError, export_onnx, open_file, quantize_onnx
from foveate.export.formats import FORMATS, Format, Request
from foveate.export.int8 import write_int8

CLASSES = ("ant", "bee", "cow")
TINY = {"dims": (32, 64), "depths": (1, 1)}
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_classes": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(4):
            pixels = rng.integers(0, 80, (40, 50, 3)) + 80 * number
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def net(name: str = "van_b0", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL | kwargs).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small model as float32 ONNX file, for images of 64 px."""
    model = net("nat_mini", **TINY)
    return export_onnx(model, tmp_path_factory.mktemp("float32") / "net.onnx", img_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", [Format.ONNX, Format.OPENVINO, Format.AOTI])
def test_an_int8_file_holds_int8_weights_and_stays_close(file_format, pictures, tmp_path):
    from foveate.export import real_images

    model, out = net(), tmp_path / f"net{FORMATS[file_format].suffix}"
    observed = real_images(model, pictures, count=24, img_size=64)
    report = write_int8(Request(model, out, file_format, 64, CLASSES), observed, pictures)
    assert report.megabytes[1] < 0.5 * report.megabytes[0]
    assert 0 < report.difference < 0.2 and report.agreement > 0.9  # 0: nothing was quantized
    assert report.labelled == 12 and report.top1 is not None and min(report.ms) > 0
    opened = open_file(out)
    assert opened.runtime == report.runtime and opened.metadata.labels == CLASSES
    got, wanted = opened.run(observed[:5])[0], model(observed[:5])
    assert (got - wanted).square().mean().sqrt() < 0.2 * wanted.std()


def test_weights_are_int8_in_the_graph(source, tmp_path):
    import onnx

    graph = onnx.load(quantize_onnx(source, tmp_path / "int8.onnx", torch.randn(8, 3, 64, 64))).graph
    kinds = [node.op_type for node in graph.node]
    assert "QuantizeLinear" in kinds and "DequantizeLinear" in kinds
    held = sum(np.prod(entry.dims) for entry in graph.initializer if entry.data_type == onnx.TensorProto.INT8)
    layers = [m for m in net("nat_mini", **TINY).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert held >= sum(layer.weight.numel() for layer in layers)


def test_calibration_decides_the_ranges(source, tmp_path):
    x = torch.randn(8, 3, 64, 64)
    right, narrow = (open_file(quantize_onnx(source, tmp_path / f"{s}.onnx", s * x)).run(x)[0] for s in (1.0, 0.02))
    wanted = open_file(source).run(x)[0]
    assert (narrow - wanted).abs().max() > 3 * (right - wanted).abs().max()


def export(*arguments: str):
    return CliRunner().invoke(app, ["export", "van_b0", "--model-arg", "num_classes=3", *arguments])


@pytest.mark.slow
def test_the_command_prints_both(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "-o",
        "net.onnx",
        "--int8",
        "--calibrate",
        str(pictures),
        "--images",
        str(pictures),
        "--img-size",
        "64",
    ]
    done = export(*arguments, "--model-arg", "depths=(1, 1, 1, 1)")
    assert done.exit_code == 0, done.output
    for fact in (
        "top-1, float32 and int8",
        "of 12 images",
        "ms, float32 and int8",
        "MB, float32 and int8",
        "ONNX Runtime",
    ):
        assert fact in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "net.onnx", "--int8"], "give --calibrate"),
        (["-o", "net.onnx", "--calibrate", "."], "--calibrate: has no effect without --int8"),
        (
            ["-o", "net.pte", "--format", "executorch", "--int8", "--calibrate", "."],
            "wanted one of onnx, aoti, openvino",
        ),
        (["-o", "net.onnx", "--int8", "--calibrate", "."], r"no image in \."),
        (
            ["-o", "net.pt2", "--format", "aoti", "--int8", "--calibrate", ".", "--dynamic", "batch,size"],
            "got --dynamic",
        ),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    done = export(*arguments)
    assert done.exit_code == 2 and re.search(message, done.stderr), done.output
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_graph_that_cannot_be_calibrated_is_one_error(source, tmp_path):
    with pytest.raises(ExportError, match="could not export"):
        quantize_onnx(source, tmp_path / "int8.onnx", torch.randn(2, 3, 32, 32))
