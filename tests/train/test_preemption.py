"""A run that a signal ended within an epoch continues bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from recipes import EVERYTHING

from foveate.train import StoppedError, TrainError, loop, report, train
from foveate.train.checkpoints import list_checkpoints, read_checkpoint

CLOCK = ("images_per_s", "seconds")


def same(a, b) -> bool:
    """Tell whether nested data is equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def records(work_dir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in report.read_scalars(work_dir / report.SCALARS)]


def content(path: Path) -> dict:
    """Return a checkpoint without what a changed number of workers changes in its recipe."""
    checkpoint = read_checkpoint(path)
    checkpoint["meta"]["recipe"]["data"].pop("workers")
    return checkpoint


def assert_equal_runs(first: Path, second: Path, last: str) -> None:
    for name in (last, "best.pth"):
        assert same(content(first / name), content(second / name)), name
    assert records(first) == records(second)


def signal_at(monkeypatch, number: int, *, training: int | None = None, validation: int | None = None) -> None:
    """Send this process a signal in the n-th training or validation batch of the run (from 0), once."""
    counts = {"train": 0, "val": 0}

    def counting(kind, wanted, original):
        def after(self, runner, batch_idx, data_batch=None, outputs=None):
            original(self, runner, batch_idx, data_batch, outputs)
            if counts[kind] == wanted:
                signal.raise_signal(number)
            counts[kind] += 1

        return after

    train_iter = counting("train", training, report.EpochLog.after_train_iter)
    monkeypatch.setattr(report.EpochLog, "after_train_iter", train_iter)
    nothing = lambda *args: None  # noqa: E731
    monkeypatch.setattr(report.EpochLog, "after_val_iter", counting("val", validation, nothing))


@pytest.fixture(scope="module")
def recipe(images):
    """All that draws random numbers or has a state; 6 batches an epoch in groups of 4, 3 epochs."""
    return {
        "model": {"name": "test_resnet", "num_classes": 3, "drop_path_rate": 0.2, "drop_rate": 0.2},
        "data": {"root": str(images), "img_size": 32, "workers": 0},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.05, "clip_grad": 1.0},
        "schedule": {"epochs": 3, "warmup_epochs": 1},
        "batch_size": 4,
        **EVERYTHING,
        "checkpoint": {"keep": 3},
    }


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, work_dir=work_dir, keep_freed_memory=False)
    return work_dir


# training batch of the signal, and the last batch that is done: the end of the optimizer step
STOPS = [(0, 4), (3, 4), (4, 6), (5, 6), (9, 10), (13, 16)]
IN_SHORT = [(5, 6), (9, 10)]


@pytest.mark.parametrize(
    ("batch", "saved"), [pytest.param(*s, marks=() if s in IN_SHORT else pytest.mark.slow) for s in STOPS]
)
def test_a_signal_within_an_epoch_writes_a_checkpoint_from_which_the_run_continues(
    recipe, whole, tmp_path, monkeypatch, capsys, batch, saved
):
    number = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)[batch % 3]
    signal_at(monkeypatch, number, training=batch)
    with pytest.raises(StoppedError, match=signal.Signals(number).name) as stopped:
        train(recipe, work_dir=tmp_path)
    monkeypatch.undo()
    assert stopped.value.signal == number
    file = list_checkpoints(tmp_path)[0]
    assert file.name == f"epoch_{(saved - 1) // 6}_iter_{saved}.pth"
    assert (tmp_path / "last_checkpoint").read_text() == f"{file.name}\n"
    train({**recipe, "data": {**recipe["data"], "workers": 2 * (batch == 9)}}, work_dir=tmp_path, resume=True)
    assert f"resuming from {file}" in capsys.readouterr().out and not file.exists()
    assert_equal_runs(whole, tmp_path, "epoch_3.pth")


@pytest.mark.parametrize(
    "batch", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(10, marks=pytest.mark.slow)]
)
def test_a_signal_in_validation_leaves_only_the_validation_to_do(recipe, whole, tmp_path, monkeypatch, batch):
    """An epoch validates 6 batches: 3 of the weights, 3 of the averages."""
    signal_at(monkeypatch, signal.SIGTERM, validation=batch)
    with pytest.raises(StoppedError):
        train(recipe, work_dir=tmp_path)
    monkeypatch.undo()
    epochs = batch // 6
    assert list_checkpoints(tmp_path)[0].name == f"epoch_{epochs}_iter_{6 * (epochs + 1)}.pth"
    trained = []
    run_iter = loop.EpochLoop.run_iter
    monkeypatch.setattr(loop.EpochLoop, "run_iter", lambda self, i, b: (trained.append(i), run_iter(self, i, b)))
    train(recipe, work_dir=tmp_path, resume=True)
    assert len(trained) == 18 - 6 * (epochs + 1)
    assert_equal_runs(whole, tmp_path, "epoch_3.pth")


@pytest.mark.slow
def test_two_signals_in_one_run_are_two_parts(recipe, whole, tmp_path, monkeypatch):
    for batch in (2, 3):  # of each part
        signal_at(monkeypatch, signal.SIGTERM, training=batch)
        with pytest.raises(StoppedError):
            train(recipe, work_dir=tmp_path, resume=batch == 3)
        monkeypatch.undo()
    train(recipe, work_dir=tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path, "epoch_3.pth")


def test_minutes_between_checkpoints_write_them_within_epochs(recipe, whole, tmp_path, monkeypatch):
    """A kill after such a checkpoint continues from it."""
    seen = []
    run_iter = loop.EpochLoop.run_iter

    def watched(self, idx, batch):
        run_iter(self, idx, batch)
        seen.append([path.name for path in list_checkpoints(tmp_path)])
        if len(seen) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.EpochLoop, "run_iter", watched)
    often = {**recipe, "checkpoint": {"keep": 3, "every_minutes": 1e-9}}
    with pytest.raises(KeyboardInterrupt):
        train(often, work_dir=tmp_path)
    monkeypatch.undo()
    assert seen[4] == ["epoch_0_iter_4.pth"] and seen[7] == ["epoch_1.pth"]  # the one within an epoch goes after it
    assert seen[11][:2] == ["epoch_1_iter_12.pth", "epoch_1.pth"]
    train(recipe, work_dir=tmp_path, resume=True)  # without the key: it may change
    first, second = (read_checkpoint(run / "epoch_3.pth") for run in (whole, tmp_path))
    assert same(first["state_dict"], second["state_dict"]) and records(whole) == records(tmp_path)


def test_a_damaged_checkpoint_within_an_epoch_falls_back_to_the_epoch_before(
    recipe, whole, tmp_path, monkeypatch, capsys
):
    signal_at(monkeypatch, signal.SIGTERM, training=8)
    with pytest.raises(StoppedError):
        train(recipe, work_dir=tmp_path)
    monkeypatch.undo()
    file = tmp_path / "epoch_1_iter_10.pth"
    file.write_bytes(file.read_bytes()[:-5000])
    train(recipe, work_dir=tmp_path, resume=True)
    out = capsys.readouterr().out
    assert "epoch_1_iter_10.pth is truncated or damaged" in out and f"resuming from {tmp_path}/epoch_1.pth" in out
    assert_equal_runs(whole, tmp_path, "epoch_3.pth")


def test_a_folder_with_a_checkpoint_within_an_epoch_holds_a_run(recipe, tmp_path, monkeypatch):
    signal_at(monkeypatch, signal.SIGTERM, training=1)
    with pytest.raises(StoppedError):
        train(recipe, work_dir=tmp_path)
    monkeypatch.undo()
    with pytest.raises(TrainError, match=r"holds a run \(epoch_0_iter_4.pth\)"):
        train(recipe, work_dir=tmp_path)


def test_a_data_set_that_grew_is_not_continued_within_an_epoch(recipe, images, tmp_path, monkeypatch):
    signal_at(monkeypatch, signal.SIGTERM, training=1)
    with pytest.raises(StoppedError):
        train(recipe, work_dir=tmp_path / "run")
    monkeypatch.undo()
    more = shutil.copytree(images, tmp_path / "more")
    for i in range(4):
        shutil.copy(more / "train" / "ant" / "0.png", more / "train" / "ant" / f"more{i}.png")
    with pytest.raises(TrainError, match="its epochs have 6 batches, those of the data set now 7"):
        train(recipe, work_dir=tmp_path / "run", data=more, resume=True)


def test_another_batch_goes_on_only_on_request_and_is_said(recipe, tmp_path, monkeypatch, capsys):
    signal_at(monkeypatch, signal.SIGTERM, training=9)
    with pytest.raises(StoppedError):
        train(recipe, work_dir=tmp_path)
    monkeypatch.undo()
    larger = {**recipe, "batch_size": 8, "accumulate": 1}
    with pytest.raises(TrainError, match="was trained with accumulate=4, the recipe says 1"):
        train(larger, work_dir=tmp_path, resume=True)
    train(larger, work_dir=tmp_path, resume=True, change_processes=True)
    assert "global batch 8 instead of 16, optimizer.lr stays 0.001" in capsys.readouterr().out
    assert [line["iter"] for line in records(tmp_path)] == [6, 6, 9]  # 16 of 24 images were done: 2 batches of 8


COMMAND = [sys.executable, "-m", "foveate", "train", "tiny.json", "--work-dir"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_real_signals_at_random_steps_within_epochs(recipe, tmp_path, number, processes):
    """Ten parts of a run, each ended by a real signal; the sum equals the uninterrupted run bit for bit."""
    model = {"name": "test_resnet" if processes == 1 else "test_vit", "num_classes": 3, "drop_path_rate": 0.2}
    if processes == 2:
        model["img_size"] = 32
    many = {
        **recipe,
        "model": model,
        "schedule": {"epochs": 30},
        "batch_size": 2,
        "data": {**recipe["data"], "workers": 1},
    }
    many["checkpoint"] = {"keep": 2, "every_minutes": 1e-6}
    (tmp_path / "tiny.json").write_text(json.dumps(many))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = [*launch, "foveate", *COMMAND[3:]] if processes == 2 else COMMAND
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "text": True}
    options |= {"stderr": subprocess.STDOUT, "start_new_session": True}

    def start(work_dir: str) -> subprocess.Popen:
        return subprocess.Popen([*words, work_dir, "--resume", "--device", "cpu"], **options)

    def finish(work_dir: str) -> None:
        part = start(work_dir)
        out, _ = part.communicate(timeout=400)  # reads: a full pipe would stop the run
        assert part.returncode == 0, out[-3000:]

    finish("whole")
    draw, stopped = random.Random(0), 0
    while stopped < 10:
        newest = _newest(tmp_path / "parts")
        part = start("parts")
        while part.poll() is None and _newest(tmp_path / "parts") == newest:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        if part.poll() is not None:
            break
        if number == signal.SIGKILL:  # torchrun's processes are in sessions of their own
            started = psutil.Process(part.pid).children(recursive=True)
            for process in (part, *started):
                process.kill()
        else:
            os.killpg(part.pid, number)
        out, _ = part.communicate(timeout=120)
        stopped += 1
        if number == signal.SIGTERM and processes == 1:
            assert part.returncode == 143 and "foveate train: stopped by SIGTERM" in out, out[-3000:]
            assert "Traceback" not in out, out[-3000:]
    assert stopped >= 5
    finish("parts")
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts", "epoch_30.pth")


def _newest(work_dir: Path) -> str | None:
    found = list_checkpoints(work_dir) if work_dir.is_dir() else []
    return found[0].name if found else None
