"""ONNX files and torch.export programs: what they hold, and what is refused."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import foveate
from foveate.export import (
    DisagreementError,
    ExportError,
    MissingExtraError,
    export_onnx,
    export_program,
    real_images,
    verify,
)

WRITERS = pytest.mark.parametrize(("write", "name"), [(export_onnx, "net.onnx"), (export_program, "net.pt2")])
SIZE = (64, 96)


class Branching(nn.Module):
    """Asks its input a question that no graph can answer."""

    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@WRITERS
def test_files_name_no_source_of_this_machine(write, name, tmp_path):
    path = write(timm.create_model("van_b0", num_classes=5, depths=(1, 1, 1, 1)), tmp_path / name, img_size=64)
    held = path.read_bytes()
    assert b"stack_trace" not in held
    assert not [
        folder for module in (timm, torch, foveate) if (folder := os.path.dirname(module.__file__)).encode() in held
    ]


def test_a_free_batch_takes_every_batch_size(net, exported, images):
    assert verify(net, exported, images, batch_sizes=(1, 2, 5)).images == 8


def test_a_fixed_batch_takes_no_other(net, tmp_path, images):
    fixed = export_onnx(net, tmp_path / "one.onnx", img_size=SIZE, dynamic=())
    verify(net, fixed, images, batch_sizes=(1,))
    with pytest.raises(DisagreementError, match=r"does not run on a batch of \(2, 3, 64, 96\)"):
        verify(net, fixed, images, batch_sizes=(2,))


def test_the_onnx_graph_names_its_ends(net, tmp_path):
    import onnx

    graph = onnx.load(export_onnx(net, tmp_path / "net.onnx", img_size=SIZE, opset=18))
    sizes = [d.dim_param or d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    assert (graph.graph.input[0].name, sizes) == ("images", ["batch", 3, *SIZE])
    assert [output.name for output in graph.graph.output] == ["logits"]
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {18}


@WRITERS
def test_every_feature_map_is_an_output(write, name, tmp_path, images):
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 3))
    agreement = verify(net, write(net, tmp_path / name, img_size=SIZE), images)
    assert agreement.top1 is None and agreement.images == 4


def test_the_models_own_size_is_taken_when_none_is_given(net, tmp_path):
    wanted = net.pretrained_cfg["input_size"]
    verify(net, export_program(net, tmp_path / "net.pt2"), torch.randn(4, *wanted))


@WRITERS
def test_every_module_gets_its_own_mode_back(write, name, net, tmp_path):
    net.train()
    net.bn_frozen = net.get_submodule("layer1").eval()
    modes = {key: module.training for key, module in net.named_modules()}
    write(net, tmp_path / name, img_size=SIZE)
    assert {key: module.training for key, module in net.named_modules()} == modes


@WRITERS
def test_a_failing_export_leaves_the_older_file_and_nothing_else(write, name, tmp_path):
    out = tmp_path / name
    out.write_text("older")
    with pytest.raises(ExportError, match="torch could not export the model"):
        write(Branching(), out, example=torch.rand(2, 3, *SIZE))
    assert out.read_text() == "older" and os.listdir(tmp_path) == [name]


@WRITERS
def test_exporting_says_nothing(write, name, net, tmp_path, capfd, recwarn):
    write(net, tmp_path / name, img_size=SIZE)
    assert tuple(capfd.readouterr()) == ("", "") and list(recwarn) == []


def run_alone(path, shape) -> str:
    """The output's shape of a program, run in a process that has torch alone."""
    lonely = "import sys, torch; sys.modules.update(dict.fromkeys(('foveate', 'timm', 'torchvision'))); "
    run = f"print(*torch.export.load({str(path)!r}).module()(torch.zeros{tuple(shape)}).shape)"
    done = subprocess.run([sys.executable, "-c", lonely + run], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr[-2000:]


SHALLOW = {"depths": (1, 1, 1, 1)}
SLOW = {
    "nat_mini": SHALLOW,
    "biformer_tiny": SHALLOW,
    "biformer_stl_nchw": SHALLOW,
    "litv2_small": SHALLOW,
    "fv_davit_tiny": SHALLOW,
    "fv_davit_base_fl": SHALLOW,
    "agent_deit_tiny": {"depth": 2},
    "agent_pvt_tiny": SHALLOW,
    "agent_swin_tiny": SHALLOW,
    "agent_cswin_tiny": SHALLOW,
    "fv_halonet26t": {},
    "eca_resnet18": {},
    "ela_resnet18": {},
    "eca_mobilenet_v2": {},
}
EVERY_FAMILY = pytest.mark.parametrize(
    ("model", "kwargs"),
    [("van_b0", SHALLOW)] + [pytest.param(model, kwargs, marks=pytest.mark.slow) for model, kwargs in SLOW.items()],
)


@EVERY_FAMILY
def test_our_backbones_become_programs_that_run_without_us(model, kwargs, tmp_path):
    net = timm.create_model(model, num_classes=5, **kwargs).eval()
    program = export_program(net, tmp_path / "net.pt2", img_size=SIZE)
    verify(net, program, real_images(net, img_size=SIZE))
    assert run_alone(program, (2, 3, *SIZE)) == "2 5"


@EVERY_FAMILY
def test_our_backbones_become_onnx(model, kwargs, tmp_path):
    net = timm.create_model(model, num_classes=5, **kwargs).eval()
    agreement = verify(net, export_onnx(net, tmp_path / "net.onnx", img_size=SIZE), real_images(net, img_size=SIZE))
    assert agreement.largest_relative <= agreement.tolerance and agreement.images >= 3


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("net.pt", {}, r"net\.pt: wanted a file name that ends in \.onnx"),
        ("gone/net.onnx", {}, "the folder .*gone does not exist"),
        ("net.onnx", {"img_size": 64, "example": torch.zeros(2, 3, 8, 8)}, "give one of the two"),
        ("net.onnx", {"example": torch.zeros(1, 3, 8, 8)}, "two images or more"),
        ("net.onnx", {"example": torch.zeros(2, 5, 8, 8)}, r"does not run on an input of \(2, 5, 8, 8\)"),
    ],
)
def test_an_invalid_request_is_refused(out, options, message, net, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(net, tmp_path / out, **options)
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_is_refused(net, tmp_path):
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(net, tmp_path / "net.onnx")


@WRITERS
def test_half_precision_is_refused(write, name, net, tmp_path):
    with pytest.raises(ExportError, match=r"the model is in torch\.float16 on cpu"):
        write(net.half(), tmp_path / name)


def test_another_size_than_the_fixed_one_is_refused(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(ExportError, match=r"image size \(64, 96\), but the model requires \(224, 224\)"):
        export_program(net, tmp_path / "net.pt2", img_size=SIZE)


def test_missing_packages_name_the_command_that_helps(net, tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.export.files.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'onnx, onnxscript: pip install "foveate\[export\]"'):
        export_onnx(net, tmp_path / "net.onnx")


def test_a_model_beyond_the_limit_of_one_onnx_file_is_refused(tmp_path, monkeypatch, net):
    monkeypatch.setattr("foveate.export.graphs._ONNX_LIMIT_BYTES", 1000)
    with pytest.raises(ExportError, match=r"export a \.pt2 program"):
        export_onnx(net, tmp_path / "net.onnx")
