"""A full disk, at any point: one line, and what was complete stays complete."""

import resource
from contextlib import contextmanager

import pytest
import torch

from foveate.train import StorageError, report, train
from foveate.train.checkpoints import read_checkpoint

SMALL = {"model": {"name": "test_vit", "img_size": 16}}


@contextmanager
def disk_of(size: int):
    """Let no file grow beyond `size` bytes: Python sees an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 3000])
def test_a_disk_that_is_full_at_the_start_is_one_line(make_recipe, tmp_path, capsys, size):
    """No lock file; then no recipe.py; then no checkpoint."""
    with disk_of(size), pytest.raises(StorageError, match=r"work_dir .*run: File too large.*no checkpoint") as error:
        train(make_recipe(**SMALL), work_dir=tmp_path / "run")
    assert "\n" not in str(error.value) and isinstance(error.value, OSError)
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.parametrize("what", ["epoch", pytest.param("within", marks=pytest.mark.slow), "scalars"])
def test_a_disk_that_fills_up_later_leaves_the_last_checkpoint_whole(make_recipe, tmp_path, monkeypatch, capsys, what):
    recipe = make_recipe(**SMALL, ema=0.5, schedule={"epochs": 3})
    whole = train(recipe, work_dir=tmp_path / "whole")
    step = report.EpochLog.after_train_iter
    limits = []

    def fill(self, runner, batch_idx, data_batch=None, outputs=None):
        step(self, runner, batch_idx, data_batch, outputs)
        if runner.epoch == 1 and batch_idx == 2:
            context = disk_of(10 if what == "scalars" else 20_000)
            context.__enter__()
            limits.append(context)
            if what == "within":
                runner.optim_wrapper.flags.seen["save"] = 1

    monkeypatch.setattr(report.EpochLog, "after_train_iter", fill)
    try:
        with pytest.raises(
            StorageError, match=r"File too large.*epoch_1.pth is complete: run the same command with --res"
        ):
            train(recipe, work_dir=tmp_path / "parts")
    finally:
        limits[0].__exit__(None, None, None)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "parts" / "epoch_1.pth")["meta"]["epoch"] == 1
    assert not list((tmp_path / "parts").glob("*.part")) and not list((tmp_path / "parts").glob("epoch_1_iter*"))
    train(recipe, work_dir=tmp_path / "parts", resume=True)
    first, second = (read_checkpoint(tmp_path / run / "epoch_3.pth")["state_dict"] for run in ("whole", "parts"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (whole.work_dir / "scalars.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "parts" / "scalars.jsonl").read_text().count("\n") == 3


def test_a_broken_pipe_is_not_taken_for_the_runs_folder(make_recipe, tmp_path, monkeypatch):
    def broken(*args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("foveate.train.runner._run", broken)
    with pytest.raises(BrokenPipeError):
        train(make_recipe(), work_dir=tmp_path / "run")
