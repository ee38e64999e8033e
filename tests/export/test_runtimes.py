"""Every format: written, verified and opened again, with its metadata; damaged files are refused in one line."""

import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from foveate.export import ExportError, MissingExtraError, open_file, real_images, verify
from foveate.export.errors import DisagreementError
from foveate.export.formats import FORMATS, Format, Request, check_output, write_verified
from foveate.export.metadata import KEY, Metadata, loads, metadata_of

SIZE = (64, 96)
NAMES = tuple(f"digit {i}" for i in range(7))
FAST = [Format.ONNX, Format.TORCH, Format.OPENVINO, Format.HUB]
SLOW = [Format.AOTI, Format.EXECUTORCH]
RUNTIMES = {
    Format.ONNX: "ONNX Runtime",
    Format.TORCH: "torch.export",
    Format.OPENVINO: "OpenVINO",
    Format.HUB: "PyTorch",
    Format.AOTI: "AOTInductor",
    Format.EXECUTORCH: "ExecuTorch",
}


def small_net():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=7).eval()


def written(file_format: Format, folder: Path) -> Path:
    out = folder / f"net{FORMATS[file_format].suffix or ''}"
    net = small_net()
    size = None if file_format is Format.HUB else SIZE
    agreement = write_verified(Request(net, out, file_format, size, NAMES), real_images(net, img_size=SIZE), 1e-4)
    assert agreement is not None and agreement.images >= 4
    return out


@pytest.fixture(scope="module", params=[*FAST, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def file(request, tmp_path_factory) -> tuple[Format, Path]:
    return request.param, written(request.param, tmp_path_factory.mktemp("files"))


def test_a_file_of_each_format_computes_what_the_model_computes(file):
    file_format, path = file
    opened = open_file(path)
    assert opened.runtime == RUNTIMES[file_format]
    net, x = small_net(), torch.randn(3, 3, *SIZE)
    torch.testing.assert_close(opened.run(x)[0], net(x), rtol=0, atol=1e-4 * net(x).std().item())


def test_images_of_another_size_are_refused(file):
    """A runtime that does not look would compute something of them."""
    file_format, path = file
    if file_format is Format.HUB:
        pytest.skip("takes any size")
    opened = open_file(path)
    for shape in ((1, 3, 96, 64), (2, 3, 32, 32), (1, 1, *SIZE)):
        with pytest.raises(Exception, match=r"."):
            opened.run(torch.randn(*shape))
    assert opened.run(torch.randn(2, 3, *SIZE))[0].shape == (2, 7)


def test_a_file_says_how_its_images_are_preprocessed(file):
    file_format, path = file
    found, wanted = open_file(path).metadata, metadata_of(small_net(), SIZE, labels=NAMES)
    if file_format is Format.HUB:  # the folder's config.json has the model's own size, and no class names
        found, wanted = (Metadata(**(vars(m) | {"input_size": (), "labels": None})) for m in (found, wanted))
    assert found == wanted


def test_the_folder_holds_nothing_else(file):
    file_format, path = file
    beside = {"net.bin"} if file_format is Format.OPENVINO else set()
    assert {entry.name for entry in path.parent.iterdir()} == {path.name} | beside


@pytest.mark.parametrize(
    "file_format", [Format.ONNX, Format.TORCH, pytest.param(Format.OPENVINO, marks=pytest.mark.slow)]
)
def test_a_truncated_file_is_refused_in_one_line(file_format, tmp_path):
    path = written(file_format, tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ExportError) as caught:
        open_file(path)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


def test_ir_without_its_weights_is_refused(tmp_path):
    path = written(Format.OPENVINO, tmp_path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        open_file(path)


@pytest.mark.slow
def test_a_file_of_another_model_is_refused(tmp_path):
    path = written(Format.OPENVINO, tmp_path)
    other = timm.create_model("test_resnet", num_classes=7).eval()
    with pytest.raises(DisagreementError, match="differs from the model"):
        verify(other, path, real_images(other, img_size=SIZE))


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2", "net.xml", "net.pte", "net.mlpackage"])
def test_a_missing_file_is_refused(name, tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        open_file(tmp_path / name)


@pytest.mark.slow
def test_a_file_that_differs_leaves_the_older_pair(tmp_path):
    path = written(Format.OPENVINO, tmp_path)
    before = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    net = small_net()
    with pytest.raises(DisagreementError):
        write_verified(Request(net, path, Format.OPENVINO, SIZE), real_images(net, img_size=SIZE), 0.0)
    assert (path.read_bytes(), path.with_suffix(".bin").read_bytes()) == before


def test_a_missing_runtime_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.export.files.find_spec", lambda name: None)
    for file_format, package in [(Format.OPENVINO, "openvino"), (Format.EXECUTORCH, "executorch")]:
        with pytest.raises(MissingExtraError, match=rf'{package}: pip install "foveate\[{package}\]"'):
            check_output(tmp_path / f"net{FORMATS[file_format].suffix}", file_format)


def test_the_extras_of_all_formats_exist():
    from configparser import ConfigParser

    import foveate

    config = ConfigParser()
    config.read(Path(foveate.__file__).parent / "setup.cfg")
    assert {entry.extra for entry in FORMATS.values()} <= set(config["options.extras_require"])


def test_metadata_is_read_strictly():
    whole = metadata_of(small_net(), SIZE, labels=NAMES)
    assert loads(whole.dumps()) == whole
    for damaged in ("", "[]", "{}", whole.dumps()[:-2], whole.dumps().replace("64", '"64"'), "[" * 10_000):
        with pytest.raises(ExportError, match="metadata is damaged"):
            loads(damaged)


def test_class_names_of_imagenet_are_known():
    names = metadata_of(timm.create_model("test_resnet", num_classes=1000)).labels
    assert len(names) == 1000 and names[0].startswith("tench")


def test_an_onnx_file_of_another_program_has_no_metadata(tmp_path):
    import onnx

    path = written(Format.ONNX, tmp_path)
    proto = onnx.load(path)
    assert [entry.key for entry in proto.metadata_props] == [KEY]
    del proto.metadata_props[:]
    onnx.save(proto, path)
    assert open_file(path).metadata is None


def test_a_program_without_metadata_opens(tmp_path):
    path = written(Format.TORCH, tmp_path)
    plain = tmp_path / "plain.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(plain, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(f"{KEY}.json"):
                target.writestr(entry, source.read(entry))
    assert open_file(plain).metadata is None
    shutil.copy(path, tmp_path / "copy.pt2")
    assert open_file(tmp_path / "copy.pt2").metadata is not None
