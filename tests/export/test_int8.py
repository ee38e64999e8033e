"""Int8 files: the weights are int8, the outputs stay close, and the report is of the same runtime."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import EVERY, OF_TIMMS_CLASSES, alive, size_of_images, small
from torch import nn
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.export import ExportError, export_onnx, open_file, quantize_onnx
from foveate.export.converters import write_aoti
from foveate.export.formats import FORMATS, Format, Request
from foveate.export.int8 import write_int8
from foveate.export.presets import PRESETS
from foveate.export.quantize import quantize_program
from foveate.export.simulate import OUTLIER_FREE, ActivationQuantizer, weight_grid

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


def calls_int8_products(package: Path) -> bool:
    """Whether the code of an AOTInductor package calls oneDNN's int8 convolutions: else they run in float32."""
    with zipfile.ZipFile(package) as files:
        return any(b"qconv" in files.read(name) for name in files.namelist())


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
    assert file_format is not Format.AOTI or calls_int8_products(out)
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


def onnx_weights(path):
    """The numbers that the int8 weights of a file stand for, and how many scales each has."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    held = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    return {node.input[0]: (held[node.input[0]], held[node.input[1]]) for node in nodes}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_finds_its_own_ranges(name, source, tmp_path, capsys):
    x = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0)) ** 3  # rare large numbers
    plain, wanted = open_file(quantize_onnx(source, tmp_path / "default.onnx", x)), open_file(source).run(x)[0]
    path = quantize_onnx(source, tmp_path / f"{name}.onnx", x, PRESETS[name])
    got = open_file(path).run(x)[0]
    assert capsys.readouterr().out == ""
    assert (got - wanted).square().mean().sqrt() < 0.6 * wanted.std()
    assert torch.equal(got, plain.run(x)[0]) == (name == "default")
    scales = [scale.size for value, scale in onnx_weights(path).values() if value.dtype == np.int8]
    assert scales and (max(scales) == 1) == (name == "outlier-free")


def test_the_outlier_free_preset_has_the_authors_ranges(tmp_path):
    """Weights by their largest number; activations by a moving average over batches of 8."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)).eval()
    source = export_onnx(model, tmp_path / "float32.onnx", example=torch.zeros(2, 3, 8, 8))
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 33)[:, None, None, None]
    path = quantize_onnx(source, tmp_path / "int8.onnx", x, PRESETS["outlier-free"])
    weights = onnx_weights(path)
    (_, scale), *others = [pair for pair in weights.values() if pair[0].dtype == np.int8]
    grid = weight_grid(model[0].weight.detach())
    assert others == [] and scale.item() == pytest.approx(grid.scale.item(), rel=1e-6)
    observer = ActivationQuantizer(OUTLIER_FREE)
    for batch in x.split(8):
        observer.observe(batch)
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    held = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images")
    assert held[first.input[1]].item() == pytest.approx(observer.grid.scale.item(), rel=1e-5)
    assert held[first.input[2]].item() == observer.grid.zero_point.item()


def float32_bytes(path) -> int:
    """Bytes of the float32 numbers that an ONNX file holds."""
    import onnx

    held = onnx.load(path).graph.initializer
    return 4 * sum(int(np.prod(entry.dims)) for entry in held if entry.data_type == onnx.TensorProto.FLOAT)


def test_files_hold_tables_of_positions_and_not_what_a_map_makes_of_them(tmp_path):
    """Of a bias for each distance, one for each pair of tokens; of a block of biases, one for each token of a map."""
    of_agents = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "agent_num": (49,) * 4, "img_size": 128}
    for name, kwargs in (("nat_mini", TINY | {"kernel_size": 3}), ("agent_deit_tiny", of_agents)):
        model = timm.create_model(name, num_classes=3, **kwargs).eval()
        source = export_onnx(model, tmp_path / "float32.onnx", img_size=128)
        int8 = quantize_onnx(source, tmp_path / "int8.onnx", torch.randn(8, 3, 128, 128))
        parameters = sum(p.numel() for p in (*model.parameters(), *model.buffers()))
        layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
        assert float32_bytes(source) < 4 * parameters + 2**14
        assert float32_bytes(int8) < 4 * (parameters - layers) + 2**14


class Biased(nn.Module):
    """A product of the images, plus a table that a small net makes of positions, as in MoH's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.positions = nn.Conv2d(3, 8, 1), nn.Linear(2, 8)
        self.register_buffer("places", torch.randn(64 * 64, 2))

    def forward(self, x):
        return self.conv(x) + self.positions(self.places).t().unflatten(1, (64, 64))


def test_what_no_image_changes_is_not_quantized(tmp_path):
    """A session computes it once; with quantized inputs it would do so for each batch."""
    import onnx

    x = torch.randn(8, 3, 64, 64)
    source = export_onnx(Biased().eval(), tmp_path / "float32.onnx", example=x[:2])
    nodes = onnx.load(quantize_onnx(source, tmp_path / "int8.onnx", x)).graph.node
    products = [node for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    assert {node.op_type: node.input[0] in dequantized for node in products} in (
        {"Conv": True, "Gemm": False},
        {"Conv": True, "MatMul": False},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EVERY if ":" not in n and n not in OF_TIMMS_CLASSES])  # these are too deep
def test_an_int8_onnx_file_of_every_family_holds_int8_weights_and_stays_close(name, tmp_path):
    model = alive(small(name))
    size = size_of_images(name)
    x = torch.randn(16, 3, *size, generator=torch.Generator().manual_seed(2))
    source = export_onnx(model, tmp_path / "float32.onnx", example=x[:2])
    path = quantize_onnx(source, tmp_path / "int8.onnx", x)
    got, wanted = open_file(path).run(x)[0], model(x).detach()
    assert 0 < (got - wanted).square().mean().sqrt() < 0.5 * wanted.std()
    held = sum(value.size for value, _ in onnx_weights(path).values() if value.dtype == np.int8)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert held >= 0.9 * sum(layer.weight.numel() for layer in layers)


@pytest.mark.slow
def test_torchao_takes_the_presets_that_it_can():
    model = net("van_b0", **{"dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2)})
    example, x = torch.zeros(2, 3, 64, 64), torch.randn(16, 3, 64, 64) ** 3
    outs = {}
    for name in ("default", "outlier-free"):
        program = quantize_program(model, example, x, dynamic=("batch",), preset=PRESETS[name])
        scales = [v for k, v in program.state_dict.items() if "scale" in k and v.numel() > 1]
        scales += [v for k, v in program.constants.items() if "scale" in k and getattr(v, "numel", int)() > 1]
        assert scales and all(bool((s == s[0]).all()) for s in scales) == (name == "outlier-free")
        outs[name] = program.module()(x[:4])
    assert not torch.equal(*outs.values())
    with pytest.raises(ExportError, match="torchao finds ranges by default or moving, not by percentile"):
        quantize_program(model, example, x, dynamic=("batch",), preset=PRESETS["percentile"])


class OverTokens(nn.Module):
    """A layer over the tokens of a map: what it takes is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.tokens, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(16, 16), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.tokens(self.proj(x).flatten(2).mT.contiguous().mT).mean(-1))


@pytest.mark.slow
def test_a_layer_over_tokens_is_an_int8_product_of_any_batch(tmp_path):
    torch.manual_seed(0)
    model, x, out = OverTokens().eval(), torch.randn(16, 3, 32, 32), tmp_path / "net.pt2"
    with torch.no_grad():
        write_aoti(quantize_program(model, x[:2], x, dynamic=("batch",)), out, None, int8=True)
        wanted = model(x)
    run = open_file(out).run
    for batch in (1, 5):
        assert 0 < (run(x[:batch])[0] - wanted[:batch]).square().mean().sqrt() < 0.1 * wanted.std()


def test_int8_products_convert_nothing_twice(tmp_path):
    """Convolutions write what the next one reads, and matrix products float32, which sums and softmax take."""
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    convs = [
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
    ]
    model, x = nn.Sequential(*convs, nn.Linear(8 * 13**2, 8), nn.Softmax(-1)), torch.randn(16, 3, 32, 32)
    source = export_onnx(model.eval(), tmp_path / "net.onnx", example=x[:2])
    graph = onnx.load(quantize_onnx(source, tmp_path / "int8.onnx", x)).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Conv") == 3 and not {"Clip", "Relu"} & set(kinds)
    assert kinds.count("QuantizeLinear") == 5  # the image, what each convolution writes, and that as rows
    makers = {name: node for node in graph.node for name in node.output}
    (softmax,) = (node for node in graph.node if node.op_type == "Softmax")
    assert makers[softmax.input[0]].op_type in ("Gemm", "MatMul", "Add")


class Stack(nn.Module):
    """Tokens of two heads, each multiplied by a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.matrices = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(2, 8, 5))

    def forward(self, x):
        return (self.proj(x).flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2) @ self.matrices).sum(1).mean(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stack_of_matrices_is_quantized_with_one_scale(preset, tmp_path):
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(16, 3, 32, 32)
    source = export_onnx(model, tmp_path / "net.onnx", example=x[:2])
    path = quantize_onnx(source, tmp_path / "int8.onnx", x, PRESETS[preset])
    got, wanted = open_file(path).run(x)[0], model(x).detach()
    assert 0 < (got - wanted).square().mean().sqrt() < 0.1 * wanted.std()
    assert any(value.shape == (2, 8, 5) and value.dtype == np.int8 for value, _ in onnx_weights(path).values())


class WithBiases(nn.Module):
    """Blocks that add a bias for each pair of tokens, gathered from a table by indices of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
        tokens = torch.arange(256)
        for block in range(3):
            self.register_buffer(f"index{block}", tokens[:, None] - tokens + 255)
            self.register_parameter(f"table{block}", nn.Parameter(torch.randn(511, 4)))

    def forward(self, x):
        x = self.proj(x).flatten(2).mT
        for block in range(3):
            bias = getattr(self, f"table{block}")[getattr(self, f"index{block}").flatten()]
            heads = bias.view(256, 256, 4).permute(2, 0, 1).softmax(-1) @ x.unflatten(-1, (4, 2)).transpose(1, 2)
            x = x + heads.transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


@pytest.mark.slow
def test_an_int8_package_stores_tables_and_not_what_is_gathered_from_them(tmp_path):
    torch.manual_seed(0)
    model, x, out = WithBiases().eval(), torch.randn(16, 3, 32, 32), tmp_path / "net.pt2"
    with torch.no_grad():
        write_aoti(quantize_program(model, x[:2], x, dynamic=("batch",)), out, None, int8=True)
        wanted = model(x)
    index, biases = model.index0.nbytes, 3 * 4 * 4 * 256**2
    assert index < out.stat().st_size < 2 * index < biases  # one index of three, no bias
    run = open_file(out).run
    for batch in (1, 5, 5):
        assert 0 < (run(x[:batch])[0] - wanted[:batch]).square().mean().sqrt() < 0.1 * wanted.std()
    with zipfile.ZipFile(out) as files:
        assert not any(entry.file_size for entry in files.infolist() if entry.filename.endswith(".cpp"))


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
    done = export(*arguments, "--model-arg", "depths=(1, 1, 1, 1)", "--quantizer", "outlier-free")
    assert done.exit_code == 0, done.output
    for fact in (
        "outlier-free",
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
        (["-o", "net.onnx", "--quantizer", "percentile"], "--quantizer: has no effect without --int8"),
        (
            ["-o", "net.onnx", "--int8", "--calibrate", ".", "--quantizer", "outlierfree"],
            "wanted one of default, outlier-free, percentile, got 'outlierfree'; did you mean outlier-free",
        ),
        (
            ["-o", "net.pt2", "--format", "aoti", "--int8", "--calibrate", ".", "--quantizer", "percentile"],
            "--quantizer percentile: torchao, which writes aoti, finds no ranges by percentile",
        ),
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
