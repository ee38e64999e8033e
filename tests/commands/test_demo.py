"""The main job: what the demo leaves behind, and what it refuses before any work starts."""

import json

import pytest
import timm
import torch
from typer.testing import CliRunner

from foveate.commands import _demo_report, demo
from foveate.commands.main import app


def foveate(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def one_epoch(monkeypatch):
    """The micro recipe, cut to one epoch."""
    whole = demo.train

    def short(recipe, *, work_dir, cfg_options):
        quick = {"schedule.epochs": 1, "schedule.warmup_epochs": 0, "schedule.warmup_lr": None}
        return whole(recipe, work_dir=work_dir, cfg_options={**cfg_options, **quick})

    monkeypatch.setattr(demo, "train", short)


@pytest.mark.parametrize("model", ["nat", pytest.param("van", marks=pytest.mark.slow)])
def test_the_demo_trains_saves_exports_verifies_and_draws(model, one_epoch, tmp_path):
    out = tmp_path / "demo"
    done = foveate("demo", "--model", model, "--out", out, "--seed", 3)
    assert done.exit_code == 0, done.output
    assert "of 1000 held-out digits" in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["recipe"] == f"{model}_micro_1xb64_mnist5k" and summary["seed"] == 3
    assert summary["top1_percent"] > 20  # ten classes, one epoch
    assert 0 < summary["onnx_largest_difference_in_std"] < 1e-4
    for name in ("report.png", "attention.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "model.onnx").stat().st_size > 100_000
    net = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    assert net(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    written = ["attention.png", "model", "model.onnx", "report.png", "summary.json", "train"]
    assert sorted(p.name for p in out.iterdir()) == written


def test_a_model_without_attention_has_no_such_picture(tmp_path):
    net = timm.create_model("test_convnext", num_classes=3).eval()
    why = _demo_report.draw_attention(tmp_path / "attention.png", net, torch.zeros(1, 3, 64, 64))
    assert why and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nat", "van"])
def test_the_demo_reaches_97_percent(model, tmp_path):
    done = foveate("demo", "--model", model, "--out", tmp_path / "demo")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["top1_percent"] >= 97


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = foveate("demo", "--out", tmp_path)
    assert done.exit_code == 2 and "is not an empty folder" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("option", [("--checkpoint", "x"), ("--pretrained",), ("--epochs", "3"), ("--img-size", "64")])
def test_options_of_own_images_are_refused_without_them(option, tmp_path):
    done = foveate("demo", "--out", tmp_path / "demo", *option)
    assert done.exit_code == 2 and f"{option[0]}: has no effect without --images" in done.stderr


def test_another_model_than_the_two_is_refused(tmp_path):
    done = foveate("demo", "--out", tmp_path / "demo", "--model", "resnet50")
    assert done.exit_code == 2 and "--model: wanted nat or van without --images, got 'resnet50'" in done.stderr


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NEEDED", ("no_such_package",))
    done = foveate("demo", "--out", tmp_path / "demo")
    assert done.exit_code == 2 and 'needs no_such_package: pip install "foveate[demo]"' in done.output
    assert not (tmp_path / "demo").exists()


def test_an_export_that_disagrees_fails_the_demo_and_leaves_no_onnx_file(one_epoch, tmp_path, monkeypatch):
    def another_net(net, part, **kwargs):
        broken = timm.create_model("nat_mini", num_classes=10, in_chans=1, dims=(32,), depths=(1,), kernel_size=3)
        return whole(broken.eval(), part, **kwargs)

    whole = _demo_report.export_onnx
    monkeypatch.setattr(_demo_report, "export_onnx", another_net)
    done = foveate("demo", "--out", tmp_path / "demo")
    assert done.exit_code == 1 and "differs from the model by" in done.output
    assert not (tmp_path / "demo" / "model.onnx").exists()


def test_mistakes_are_drawn_first_and_right_answers_from_every_class():
    right = torch.ones(1000, dtype=torch.bool)
    right[[7, 500]] = False
    drawn = _demo_report.worth_drawing(right, 40)
    assert drawn[:2] == [7, 500] and len(drawn) == 40
    assert {i // 100 for i in drawn} == set(range(10))


@pytest.mark.parametrize("command", ["train", "export", "demo"])
def test_every_door_explains_itself(command):
    done = foveate(command, "--help")
    assert done.exit_code == 0 and "Usage" in done.output


def test_version():
    import foveate as package

    assert foveate("--version").output.strip() == package.__version__
