"""The lines at the start of a run, the scaled rate, the lines inside an epoch, dry runs, and longer runs."""

import re

import pytest
import torch

from foveate.train import TrainError, dry_run, load_recipe, read_scalars, train
from foveate.train.checkpoints import read_checkpoint
from foveate.train.describe import duration, scale_rate
from foveate.train.optim import lr_at

LEARNER = {"name": "nat_mini", "dims": (16, 32), "depths": (1, 1), "head_dim": 8, "kernel_size": 3, "num_classes": 3}


def lines(capsys) -> dict[str, str]:
    """Return the printed lines by their first word."""
    return {line.split(None, 1)[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}


def test_a_run_says_what_it_is_before_it_starts(make_recipe, images, tmp_path, capsys):
    recipe = make_recipe(model=LEARNER, data={"img_size": 32}, schedule={"epochs": 1}, accumulate=2, global_batch=8)
    train(recipe, work_dir=tmp_path, device="cpu")
    said = lines(capsys)
    params = sum(v.numel() for k, v in read_checkpoint(tmp_path / "best.pth")["state_dict"].items())
    assert re.fullmatch(
        rf"model    nat_mini: {params / 1e6:.2f} M parameters, [\d.e-]+ GMACs at 3x32x32", said["model"]
    )
    assert said["weights"] == "weights  random"
    assert said["data"] == f"data     {images}: 24 images for training, 9 for validation, 3 classes"
    assert said["device"] == "device   cpu, 1 process, fp32"
    assert said["batch"] == "batch    8 = 4 images x 2 accumulated x 1"
    assert said["rate"] == "rate     0.001, cosine to 0; adamw, weight decay 0.05"
    assert re.fullmatch(r"run      6 iterations in 1 epoch, 6 each; about \d+ (s|min) of computation", said["run"])
    assert "warning:" not in said


def test_the_estimate_changes_no_weight_and_no_draw(make_recipe, everything, tmp_path, monkeypatch):
    recipe = make_recipe(**everything, model={"drop_path_rate": 0.2}, schedule={"epochs": 1}, data={"img_size": 32})
    told = train(recipe, work_dir=tmp_path / "told", device="cpu")
    monkeypatch.setattr("foveate.train.prepare.describe_run", lambda run: [])
    silent = train(recipe, work_dir=tmp_path / "silent", device="cpu")
    first, second = (read_checkpoint(run.last_checkpoint)["state_dict"] for run in (told, silent))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_trained_parameters_and_initial_weights_are_named(make_recipe, tmp_path, capsys):
    start = train(make_recipe(model=LEARNER, schedule={"epochs": 1}), work_dir=tmp_path / "start", device="cpu")
    capsys.readouterr()
    model = {**LEARNER, "num_classes": 3, "checkpoint": str(start.best_checkpoint), "lora": {"rank": 2}}
    dry_run(make_recipe(model=model), work_dir=tmp_path / "run", device="cpu")
    said = lines(capsys)
    assert re.search(r"M parameters, [\d.]+ M of them trained, ", said["model"])
    assert said["weights"].startswith(f"weights  weights of {start.best_checkpoint}")


def test_another_global_batch_is_warned_of_or_scaled(make_recipe, tmp_path, capsys):
    recipe = make_recipe(global_batch=16, schedule={"epochs": 2, "warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-5})
    dry_run(recipe, work_dir=tmp_path / "run", device="cpu")
    warning = "the rate 0.001 is for a global batch of 16, this run has 4; --scale-lr multiplies the rate by 0.25"
    assert warning in capsys.readouterr().out
    run = train(recipe, work_dir=tmp_path / "run", scale_lr=True, device="cpu")
    assert "warning" not in capsys.readouterr().out
    saved = load_recipe(tmp_path / "run" / "recipe.py")
    assert (saved.optimizer.lr, saved.schedule.min_lr, saved.schedule.warmup_lr) == pytest.approx(
        (2.5e-4, 2.5e-6, 2.5e-5)
    )
    assert saved.global_batch == 4
    assert read_scalars(run.log)[-1]["lr"] == pytest.approx(lr_at(2 - 1 / 6, saved.schedule, 2.5e-4))
    train(recipe, work_dir=tmp_path / "run", scale_lr=True, resume=True, device="cpu")  # the same run again
    with pytest.raises(TrainError, match="was trained with"):
        train(recipe, work_dir=tmp_path / "run", resume=True, device="cpu")


def test_a_recipe_of_unknown_batch_is_neither_warned_of_nor_scaled(make_recipe, tmp_path, capsys):
    dry_run(make_recipe(), work_dir=tmp_path, device="cpu")
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(TrainError, match="--scale-lr: the recipe does not say for which batch its rate is"):
        dry_run(make_recipe(), work_dir=tmp_path, scale_lr=True, device="cpu")
    assert scale_rate(load_recipe(make_recipe(global_batch=8)), 4).optimizer.lr == pytest.approx(2e-3)


def test_a_dry_run_builds_everything_and_writes_nothing(make_recipe, tmp_path, capsys, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1))
    dry_run(make_recipe(), work_dir=tmp_path / "run", device="cpu")
    said = capsys.readouterr().out
    assert "dry run: everything was built and one batch of each split was read; no step was taken" in said
    assert said.startswith("model    ") and not steps and not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"model.name": "nat_minni"}, {"data.root": "nowhere"}, {"optimizer.opt": "x"}])
def test_a_dry_run_refuses_what_training_refuses(make_recipe, tmp_path, options):
    with pytest.raises(TrainError) as dry:
        dry_run(make_recipe(), work_dir=tmp_path / "run", cfg_options=options, device="cpu")
    with pytest.raises(TrainError, match=re.escape(str(dry.value))):
        train(make_recipe(), work_dir=tmp_path / "run", cfg_options=options, device="cpu")


def test_an_epoch_prints_lines_off_a_terminal(make_recipe, tmp_path, capsys):
    train(make_recipe(log={"interval": 2}), work_dir=tmp_path, device="cpu")
    inside = [line for line in capsys.readouterr().out.splitlines() if re.match(r"epoch \d/2  \d/6", line)]
    assert [line.split()[2] for line in inside] == ["2/6", "4/6"] * 2  # the epoch's own line stands for 6/6
    assert re.fullmatch(
        r"epoch 1/2  2/6  loss \d+\.\d{4}  lr \d\.\d\de-\d\d  [\d,]+ img/s  \d+ (s|min)( \d+ s)? left", inside[0]
    )


def test_a_finished_run_is_extended(make_recipe, tmp_path, capsys):
    recipe = make_recipe(model=LEARNER)
    first = train(recipe, work_dir=tmp_path, device="cpu")
    capsys.readouterr()
    longer = train(recipe, work_dir=tmp_path, resume=True, cfg_options={"schedule.epochs": 4}, device="cpu")
    said = capsys.readouterr().out
    assert "schedule.epochs was 2 and is 4: from epoch 3 on the new schedule holds" in said
    assert "12 iterations in 2 epochs from epoch 3 on" in said
    records = read_scalars(longer.log)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4] and longer.epochs == 4
    schedule = load_recipe(recipe, {"schedule.epochs": 4}).schedule
    assert records[2]["lr"] == pytest.approx(lr_at(3 - 1 / 6, schedule, 1e-3))
    assert records[:2] == read_scalars(first.log)[:2]
    cooled = train(
        recipe, work_dir=tmp_path, resume=True, device="cpu",
        cfg_options={"schedule.epochs": 4, "schedule.cooldown_epochs": 1, "schedule.min_lr": 0.0},
    )  # fmt: skip
    assert read_scalars(cooled.log)[-1]["lr"] == 0 and cooled.epochs == 5
    with pytest.raises(TrainError, match=r"epoch_5.pth has 5 epochs, the recipe asks for 2"):
        train(recipe, work_dir=tmp_path, resume=True, device="cpu")
    with pytest.raises(TrainError, match=r"was trained with optimizer\.lr"):
        train(
            recipe,
            work_dir=tmp_path,
            resume=True,
            cfg_options={"schedule.epochs": 9, "optimizer.lr": 1.0},
            device="cpu",
        )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (3661, "1 h 1 min"), (90000, "1 day 1 h"),
     (200000, "2 days 7 h"), (86400 + 59, "1 day")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
