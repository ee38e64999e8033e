"""`foveate train`: what it prints, how it exits."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from foveate.commands.main import app
from foveate.train import report


@pytest.fixture
def command(make_recipe, tmp_path, monkeypatch):
    """Return a function that runs the command in a folder of its own, on a recipe file."""
    lines = [f"{key} = {value!r}" for key, value in make_recipe().items()]
    (tmp_path / "tiny.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["train", "tiny.py", *words])


def test_a_run_prints_a_line_an_epoch_and_the_result(command, tmp_path, kept):
    result = command("--cfg-options", "schedule.epochs=1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    *before, first, last = result.stdout.splitlines()
    assert before[0].startswith("model    test_resnet: ")
    assert first.startswith("epoch 1/1") and re.match(r"best top-1 \d+\.\d\d %, \d+ s; weights: .*best.pth", last)
    assert (tmp_path / "work_dirs" / "tiny" / "best.pth").is_file()
    assert kept == ["train.runner"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg-options", "schedule.epoch=1"], "unknown key schedule.epoch; did you mean schedule.epochs"),
        (["--cfg-options", "epochs"], "--cfg-options wants key=value, got 'epochs'"),
        (["--data", "nowhere"], "data.root nowhere does not exist"),
        (["--device", "tpu"], "device: wanted cpu, cuda, cuda:N or mps, got 'tpu'"),
        (["--work-dir", "tiny.py/run"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(command, tmp_path, words, message):
    result = command(*words)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("foveate train: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and os.listdir(tmp_path) == ["tiny.py"]


def test_a_launcher_that_does_not_exist_is_a_usage_error(command):
    assert command("--launcher", "mpi").exit_code == 2


def test_ctrl_c_says_how_to_resume_and_resuming_finishes(command, monkeypatch):
    step = report.EpochLog.after_train_iter

    def press(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == 1:
            raise KeyboardInterrupt
        step(self, runner, batch_idx, data_batch, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(report.EpochLog, "after_train_iter", press)
        result = command()
    assert result.exit_code == 130
    assert "epoch_1.pth is complete: run the same command with --resume to continue from it\n" in result.stderr
    result = command("--resume")
    assert result.exit_code == 0 and "resuming from" in result.stdout and "epoch 2/2" in result.stdout


def test_a_diverged_run_exits_with_1(command):
    result = command("--cfg-options", "optimizer.lr=1e30", "--cfg-options", "optimizer.opt=sgd")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert re.search(r"step \d+ \(epoch 1, batch \d+\): .*, first in .*; files .*\.png", result.stderr)


@pytest.mark.slow
def test_a_real_ctrl_c_with_worker_processes_exits_with_130_and_no_traceback(command, tmp_path):
    words = [
        "train",
        "tiny.py",
        "--work-dir",
        "run",
        "--cfg-options",
        "schedule.epochs=500",
        "--cfg-options",
        "data.workers=2",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "foveate", *words], cwd=tmp_path, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "epoch_2.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    *warnings, last = said.splitlines()  # libraries may warn when they are imported
    assert last.startswith("foveate train: interrupted; ") and all("foveate" not in line for line in warnings)
    assert "Traceback" not in said
