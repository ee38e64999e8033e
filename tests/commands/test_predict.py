"""`foveate predict`: the same classes from a model and from its exported files; JSON lines; bad images are named."""

import json
import os

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.commands.predict import _as_json
from foveate.export import export_onnx
from foveate.export.formats import FORMATS, Format, Request, write_verified
from foveate.export.inputs import decode_image

ARCH = ["--checkpoint", "net.pth", "--model-arg", "num_classes=7"]
NAMES = tuple("abcdefg")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("pictures")
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40 + i, 50), color).save(f"pictures/{color}.png")


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(net.state_dict(), "net.pth")
    return net


def predict(*arguments: str, given: bytes | str | None = None):
    return CliRunner().invoke(app, ["predict", *arguments], input=given)


def lines(done) -> list[dict]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]


def wanted(net, *names: str) -> torch.Tensor:
    from pathlib import Path

    transform = create_transform(**resolve_data_config(model=net))
    batch = torch.stack([transform(decode_image(Path(name), 3)) for name in names])
    return net(batch).softmax(-1)


def test_a_models_classes_are_printed_best_first(net):
    found = lines(predict("test_resnet", "pictures", *ARCH, "--topk", "3"))
    files = [f"pictures/{name}.png" for name in ("blue", "green", "red")]
    assert [line["image"] for line in found] == files
    for line, row in zip(found, wanted(net, *files), strict=True):
        best = row.topk(3)
        assert [entry["index"] for entry in line["classes"]] == best.indices.tolist()
        assert [entry["probability"] for entry in line["classes"]] == pytest.approx(best.values.tolist(), rel=1e-3)


@pytest.mark.parametrize(
    "file_format",
    [Format.ONNX, Format.TORCH, Format.OPENVINO, Format.HUB, pytest.param(Format.AOTI, marks=pytest.mark.slow)],
)
def test_files_answer_as_their_model_does(file_format, net):
    out = f"net{FORMATS[file_format].suffix or ''}"
    from pathlib import Path

    write_verified(Request(net, Path(out), file_format, None, NAMES), torch.randn(4, 3, 160, 160), 1e-4)
    of_file, of_model = lines(predict(out, "pictures")), lines(predict("test_resnet", "pictures", *ARCH))
    for one, other in zip(of_file, of_model, strict=True):
        assert [entry["index"] for entry in one["classes"]] == [entry["index"] for entry in other["classes"]]
        for entry, twin in zip(one["classes"], other["classes"], strict=True):
            assert entry["probability"] == pytest.approx(twin["probability"], rel=1e-3)
    assert of_file[0]["classes"][0]["name"] == NAMES[of_file[0]["classes"][0]["index"]]


def test_a_fixed_batch_is_filled_up(net):
    export_onnx(net, "net.onnx", example=torch.randn(2, 3, 160, 160), dynamic=())
    found = lines(predict("net.onnx", "pictures"))
    assert len(found) == 3
    best = wanted(net, "pictures/red.png").topk(5)
    assert [entry["index"] for entry in found[2]["classes"]] == best.indices[0].tolist()


def test_the_fused_model_answers_alike(net):
    plain, fused = (lines(predict("test_resnet", "pictures", *ARCH, *more)) for more in ((), ("--fuse",)))
    assert [line["classes"][0]["index"] for line in plain] == [line["classes"][0]["index"] for line in fused]


def test_stdin_holds_an_image_or_names(net):
    with open("pictures/red.png", "rb") as file:
        one = lines(predict("test_resnet", "-", *ARCH, given=file.read()))
    by_name = lines(predict("test_resnet", "-", *ARCH, given="pictures/red.png\npictures/blue.png\n"))
    assert [line["image"] for line in one] == ["-"]
    assert [line["image"] for line in by_name] == ["pictures/red.png", "pictures/blue.png"]
    assert one[0]["classes"] == by_name[0]["classes"] or one[0]["classes"][0] == by_name[0]["classes"][0] | {
        "probability": pytest.approx(by_name[0]["classes"][0]["probability"], rel=1e-4)
    }


def test_names_of_classes_are_replaced(net):
    with open("names.txt", "w") as file:
        file.write("\n".join(f"class {i}" for i in range(7)) + "\n")
    found = lines(predict("test_resnet", "pictures/red.png", *ARCH, "--labels", "names.txt"))
    assert all(entry["name"] == f"class {entry['index']}" for entry in found[0]["classes"])


def test_imagenet_classes_have_names():
    found = lines(predict("test_resnet", "pictures/red.png", "--model-arg", "num_classes=1000"))
    assert all(entry["name"] for entry in found[0]["classes"])


def test_an_unreadable_image_is_named_and_the_others_answered(net):
    with open("pictures/broken.png", "wb") as file:
        file.write(b"no image")
    done = predict("test_resnet", "pictures", "missing.png", *ARCH)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and "2 of the images have no answer" in done.stderr
    assert [line["image"] for line in found if "error" in line] == ["pictures/broken.png", "missing.png"]
    assert sum("classes" in line for line in found) == 3


def test_a_name_that_is_no_unicode_is_escaped(net):
    name = os.fsdecode(b"pictures/caf\xe9.png")
    try:
        os.link("pictures/red.png", name)
    except OSError:
        pytest.skip("this file system has Unicode names only")
    found = lines(predict("test_resnet", name, "pictures/red.png", *ARCH))
    assert found[0]["image"] == name and found[0]["classes"] == found[1]["classes"]


@pytest.mark.parametrize(("encoding", "text"), [("ascii", '{"image": "\\u56f3"}'), ("utf-8", '{"image": "図"}')])
def test_every_output_holds_json(encoding, text):
    assert _as_json({"image": "図"}, encoding) == text


def test_names_on_stdin_are_those_of_windows_too(net):
    os.rename("pictures/red.png", "pictures/a\u2028b.png")
    given = "\ufeffpictures/a\u2028b.png\r\n\r\npictures/blue.png\r\n".encode()
    found = lines(predict("test_resnet", "-", *ARCH, given=given))
    assert [line["image"] for line in found] == ["pictures/a\u2028b.png", "pictures/blue.png"]


def test_images_behind_links_to_folders_are_found(net):
    os.mkdir("links")
    os.symlink("../pictures", "links/cat")
    found = lines(predict("test_resnet", "links", *ARCH))
    assert [line["image"] for line in found] == [f"links/cat/{name}.png" for name in ("blue", "green", "red")]


@pytest.mark.parametrize("arguments", [["pictures/red.png", "empty", "pictures/blue.png"], ["pictures", "empty"]])
def test_an_empty_folder_is_refused_before_any_answer(arguments, net):
    os.mkdir("empty")
    done = predict("test_resnet", *arguments, *ARCH)
    assert done.exit_code == 2 and "no image in empty" in done.stderr and done.stdout == ""


def test_logits_that_are_not_finite_are_no_answer(net):
    net.fc.bias.data[3] = float("nan")
    torch.save(net.state_dict(), "net.pth")
    done = predict("test_resnet", "pictures/red.png", *ARCH)
    assert done.exit_code == 1 and "1 of the images have no answer" in done.stderr
    assert json.loads(done.stdout) == {"image": "pictures/red.png", "error": "the model's logits are not finite"}


def test_a_name_too_long_for_a_file_is_answered_as_a_missing_one(net):
    done = predict("test_resnet", "x" * 300, "pictures/red.png", *ARCH)
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.exit_code == 1 and "File name too long" in first["error"] and "classes" in second
    assert predict("y" * 300, "pictures").stderr.splitlines()[-1].startswith("foveate predict: unknown model yyy")
    assert "y.onnx does not exist" in predict("y" * 300 + ".onnx", "pictures").stderr


def test_a_model_without_a_classifier_names_no_classes(net):
    export_onnx(timm.create_model("test_resnet", num_classes=0), "features.onnx")
    for model in (["features.onnx"], ["test_resnet", "--model-arg", "num_classes=0"]):
        done = predict(*model, "pictures")
        assert done.exit_code == 2 and f"{model[0]} has no classifier" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("suffix", [".xml", ".pt2", ".onnx"])
def test_a_file_of_another_kind_is_one_line(suffix, net):
    with open(f"other{suffix}", "wb") as file, open("net.pth", "rb") as weights:
        file.write(b"<svg></svg>" if suffix == ".xml" else weights.read())
    done = predict(f"other{suffix}", "pictures")
    assert done.exit_code == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"foveate predict: other{suffix} cannot be read: ") and "src/" not in line


def test_a_file_without_metadata_needs_a_model_to_be_like(net):
    import onnx

    export_onnx(net, "net.onnx")
    proto = onnx.load("net.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, "net.onnx")
    refused = predict("net.onnx", "pictures")
    assert refused.exit_code == 2 and "name its model with --like" in refused.stderr
    assert len(lines(predict("net.onnx", "pictures", "--like", "test_resnet"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nat_minii", "pictures"], "unknown model nat_minii"),
        (["gone.onnx", "pictures"], "gone.onnx does not exist"),
        (["net.engine", "pictures"], "unknown model net"),
        (["test_resnet", "empty"], "no image in empty"),
        (["test_resnet", "pictures", "--like", "test_resnet"], "has its own preprocessing"),
        (["test_resnet", "pictures", "--labels", "gone.txt"], "labels gone.txt"),
        (
            ["test_resnet", "pictures", "--labels", "short.txt", "--model-arg", "num_classes=7"],
            "2 class names are given",
        ),
        (["test_resnet", "-"], "stdin is empty"),
        (["damaged.onnx", "pictures"], "damaged.onnx cannot be read"),
        (["damaged.onnx", "pictures", "--fuse"], "--fuse: damaged.onnx is a file"),
        (["test_resnet", "pictures", "--img-size", "8192", "--batch", "65536"], "--batch"),
    ],
)
def test_a_mistake_prints_one_line(arguments, message):
    os.mkdir("empty")
    with open("damaged.onnx", "wb") as file, open("short.txt", "w") as short:
        file.write(b"onnx")
        short.write("a\nb\n")
    done = predict(*arguments)
    assert done.exit_code == 2, done.output
    last = done.stderr.splitlines()[-1]
    assert message in last and last.startswith("foveate predict: ")
    assert done.stdout == ""
