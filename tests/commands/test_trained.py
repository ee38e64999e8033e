"""Commands on a checkpoint of `foveate train`: the recipe inside tells everything, and timm measures the same."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.export import load_model
from foveate.train import read_scalars, train

NET = {"name": "nat_mini", "dims": (16, 32), "depths": (1, 1), "head_dim": 8, "kernel_size": 3, "num_classes": 3}
PREPROCESSING = {"img_size": 40, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 0.9, "workers": 0}


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    recipe = {
        "model": NET, "data": {"root": str(images), "interpolation": "bilinear", **PREPROCESSING},
        "optimizer": {"lr": 3e-3}, "schedule": {"epochs": 2}, "batch_size": 4,
    }  # fmt: skip
    return train(recipe, work_dir=tmp_path_factory.mktemp("trained") / "run", device="cpu")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def foveate(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def succeed(*words) -> str:
    done = foveate(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def refused(message: str, *words) -> None:
    done = foveate(*words)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output


TIMM = """
import json, sys
import timm, torch
from timm.data import ImageDataset, create_transform, resolve_data_config
if sys.argv[3] == "ours":
    import foveate  # registers the architecture
net = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
transform = create_transform(**resolve_data_config({}, model=net))
images = ImageDataset(sys.argv[2], transform=transform)
batch, targets = zip(*(images[i] for i in range(len(images))))
with torch.inference_mode():
    logits = net(torch.stack(batch))
hits = (logits.argmax(1) == torch.tensor(targets)).float().mean().item()
loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).item()
cfg = net.pretrained_cfg
texts = [cfg.get(key) for key in ("label_names", "license", "origin_url", "tag", "description")]
print(json.dumps([100 * hits, loss, net.num_classes, *texts, "foveate" in sys.modules]))
"""


@pytest.mark.parametrize("owner", ["ours", "timms"])
def test_timm_measures_in_another_process_what_training_recorded(run, images, tmp_path, owner):
    if owner == "timms":
        recipe = {
            "model": {"name": "test_resnet", "num_classes": 3}, "data": {"root": str(images), **PREPROCESSING},
            "optimizer": {"lr": 3e-3}, "schedule": {"epochs": 1}, "batch_size": 4,
        }  # fmt: skip
        run = train(recipe, work_dir=tmp_path / "run", device="cpu")
    succeed("export", "--checkpoint", run.last_checkpoint, "--format", "hub", "-o", "hub", "--images", images / "val")
    words = [sys.executable, "-c", TIMM, "hub", str(images / "val"), owner]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    top1, loss, classes, labels, license_, origin, tag, description, ours = json.loads(done.stdout)
    record = read_scalars(run.log)[-1]
    assert top1 == pytest.approx(record["val_top1"], abs=1e-4) and loss == pytest.approx(record["val_loss"], rel=1e-4)
    assert (classes, labels) == (3, ["ant", "bee", "cow"])
    assert (license_, origin, tag) == ("unknown", None, None) and "trained by foveate" in description
    assert ours == (owner == "ours")


def test_the_hub_folder_states_the_license_that_is_given(run, images):
    hub = ("export", run.best_checkpoint, "--format", "hub", "--images", images / "val")
    succeed(*hub, "-o", "hub", "--license", "cc-by-4.0")
    config = json.loads(Path("hub/config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert (cfg["license"], config["architecture"], config["num_classes"]) == ("cc-by-4.0", "nat_mini", 3)
    assert cfg["input_size"] == [3, 40, 40] and cfg["mean"] == [0.4, 0.5, 0.6] and cfg["crop_pct"] == 0.9
    assert cfg["interpolation"] == "bilinear" and config["model_args"]["dims"] == [16, 32]
    refused(
        "--license: has no effect without --format hub",
        "export",
        run.best_checkpoint,
        "-o",
        "a.onnx",
        "--license",
        "mit",
    )


def test_class_names_can_be_replaced_in_a_hub_folder(run, images):
    Path("names.txt").write_text("one\ntwo\nthree\n")
    hub = ("export", run.best_checkpoint, "--format", "hub", "--images", images / "val", "--labels", "names.txt")
    succeed(*hub, "-o", "hub")
    assert load_model("local-dir:hub").pretrained_cfg["label_names"] == ["one", "two", "three"]
    Path("names.txt").write_text("one\n")
    refused("1 class names are given, the model has 3 classes", *hub, "-o", "other")


def test_an_exported_file_has_the_size_and_the_classes_of_the_recipe(run, images):
    said = succeed("export", "--checkpoint", run.best_checkpoint, "-o", "net.onnx", "--images", images / "val")
    assert "batch x 3 x 40 x 40" in said and str(run.best_checkpoint) in said
    lines = [json.loads(line) for line in succeed("predict", "net.onnx", images / "val" / "bee").splitlines()]
    same = [json.loads(line) for line in succeed("predict", run.best_checkpoint, images / "val" / "bee").splitlines()]
    for one, other in zip(lines, same, strict=True):
        assert [entry["name"] for entry in one["classes"]] == [entry["name"] for entry in other["classes"]]
    assert {entry["name"] for entry in lines[0]["classes"]} == {"ant", "bee", "cow"}


def test_a_checkpoint_is_converted_and_the_arguments_of_before_still_work(run):
    succeed("convert", run.best_checkpoint, "-o", "a.safetensors", "--verify", run.best_checkpoint)
    arguments = [word for key, value in NET.items() if key != "name" for word in ("--model-arg", f"{key}={value}")]
    succeed("convert", "nat_mini", "--checkpoint", run.best_checkpoint, "-o", "b.safetensors", *arguments)
    a, b = (load_file(name) for name in ("a.safetensors", "b.safetensors"))
    assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
    succeed("convert", "nat_mini", "--checkpoint", "a.safetensors", *arguments, "--verify", run.best_checkpoint)


def test_what_contradicts_the_recipe_inside_is_refused(run):
    best = run.best_checkpoint
    for message, *words in [
        ("is a checkpoint of nat_mini, not of van_b0", "van_b0", "--checkpoint", best),
        ("was trained with num_classes=3", "--checkpoint", best, "--model-arg", "num_classes=5"),
        ("was trained without layer_scale", "--checkpoint", best, "--model-arg", "layer_scale=1.0"),
        ("or --pretrained, not both", "--checkpoint", best, "--pretrained"),
        ("wanted the name of a model, or --checkpoint",),
        ("none.pth does not exist", "--checkpoint", "none.pth"),
    ]:
        refused(message, "export", *words, "-o", "net.onnx")
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "plain.pth")
    refused(
        "does not say which model it holds (only checkpoints of foveate train do): name it",
        "export",
        "--checkpoint",
        "plain.pth",
        "-o",
        "net.onnx",
    )
    refused("give the model's name, and --checkpoint plain.pth", "export", "plain.pth", "-o", "net.onnx")


@pytest.mark.parametrize("form", ["checkpoint", "hub", "weights"])
def test_validate_takes_checkpoints_hub_folders_and_weights(run, images, form):
    if form == "hub":
        succeed("convert", run.last_checkpoint, "-o", "hub")
        words = ["hub"]
    elif form == "weights":
        torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, "net.pth")
        words = ["test_resnet", "--checkpoint", "net.pth", "--model-arg", "num_classes=3", "--img-size", "32"]
    else:
        words = [run.last_checkpoint]
    said = succeed("validate", *words, "--data", images, "--workers", 0, "--per-class", "classes.csv")
    rows = list(csv.DictReader(open("classes.csv")))
    assert [row["images"] for row in rows] == ["3", "3", "3"] and "9 in 3 classes" in said
    if form != "weights":
        assert f"{read_scalars(run.log)[-1]['val_top1']:.3f} %" in said and rows[0]["name"] == "ant"


def test_validate_refuses_and_reports(run, images):
    refused("--data: wanted the folder of the images", "validate", run.best_checkpoint)
    refused("wanted weights: give --checkpoint or --pretrained", "validate", "nat_mini", "--data", images)
    refused("--per-class no/a.csv: the folder no does not exist",
            "validate", run.best_checkpoint, "--data", images, "--per-class", "no/a.csv")  # fmt: skip
    (Path("data") / "ant").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Path("data/ant", name).write_bytes((images / "val" / "ant" / "0.png").read_bytes() if name == "a.png" else b"")
    done = foveate("validate", run.best_checkpoint, "--data", "data", "--workers", 0)
    assert done.exit_code == 1 and "1 of 2 images could not be read and are not counted: ant/b.png" in done.stderr
    assert "1 images, not counted" in done.stdout


def test_a_soup_of_checkpoints_is_a_checkpoint(run, images):
    said = succeed("soup", "soup.pth", run.best_checkpoint, run.last_checkpoint)
    assert "2 checkpoints" in said and "BatchNorm" not in said
    assert "9 in 3 classes" in succeed("validate", "soup.pth", "--data", images, "--workers", 0)
    refused("--update-bn: the model has no statistics of BatchNorm", "soup", "a.pth", run.best_checkpoint,
            run.last_checkpoint, "--update-bn")  # fmt: skip
    refused("--data: has no effect without --update-bn", "soup", "a.pth", run.best_checkpoint, run.best_checkpoint,
            "--data", images)  # fmt: skip
    refused("wanted at least two checkpoints", "soup", "a.pth", run.best_checkpoint)
    assert sorted(os.listdir()) == ["soup.pth"]


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_probe_reports_the_accuracy_of_features(run, images, method):
    options = ["--neighbors", 3] if method == "knn" else ["--regularization", 0.5]
    said = succeed("probe", run.best_checkpoint, "--data", images, "--method", method, "--workers", 0, *options)
    assert "32 of 24 training images" in said and "% of 9 images" in said
    other = ["--regularization", 1] if method == "knn" else ["--neighbors", 3]
    refused(
        "has no effect without --method", "probe", run.best_checkpoint, "--data", images, "--method", method, *other
    )


def test_recipes_are_listed_and_found_by_a_part_of_their_name():
    everything, some = succeed("recipes").splitlines(), succeed("recipes", "litv2").splitlines()
    assert len(everything) > 50 and len(some) == 6 and some[0].split()[:2] == ["recipe", "model"]
    row = next(line for line in some if line.startswith("litv2_base_8xb128_in1k-ft384")).split()
    assert row[1] == "litv2_base" and row[4:7] == ["30", "1024", "8"] and row[8:] == ["84.7", "-"]
    refused("no recipe matches 'resnet9000'", "recipes", "resnet9000")


def test_a_dry_run_and_a_scaled_rate_at_the_command_line(images):
    Path("tiny.json").write_text(json.dumps({
        "model": {"name": "test_resnet", "num_classes": 3}, "data": {"root": str(images), "img_size": 16, "workers": 0},
        "optimizer": {"lr": 0.004}, "schedule": {"epochs": 1}, "batch_size": 4, "global_batch": 16,
    }))  # fmt: skip
    said = succeed("train", "tiny.json", "--dry-run", "--device", "cpu")
    assert "no step was taken" in said and "--scale-lr multiplies the rate by 0.25" in said
    assert os.listdir() == ["tiny.json"]
    assert "rate     0.001, cosine" in succeed("train", "tiny.json", "--dry-run", "--scale-lr", "--device", "cpu")
