"""Two processes on one CPU, as torchrun and srun start them on a node."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from foveate.train import load_net, read_scalars
from foveate.train.checkpoints import read_checkpoint

SCRIPT = """
import sys, json
import torch
from foveate.train import train
torch.set_num_threads(1)
recipe, work_dir, options = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
train(recipe, work_dir=work_dir, device="cpu", **options)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
VIT = {"name": "test_vit", "img_size": 32, "num_classes": 3}
LINEAR = {"optimizer": {"opt": "sgd", "lr": 0.1, "weight_decay": 0.01, "clip_grad": 1.0}}  # rounding is not magnified


def torchrun(
    folder: Path, recipe: dict, work_dir: str, processes: int = 2, **options
) -> subprocess.CompletedProcess[str]:
    (folder / "run.py").write_text(SCRIPT)
    words = ["run.py", json.dumps(recipe), work_dir, json.dumps(options)]
    launch = TORCHRUN if processes == 2 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def weights(work_dir: Path, part: str = "state_dict") -> dict[str, torch.Tensor]:
    return read_checkpoint(work_dir / "epoch_3.pth")[part]


def assert_close(first: dict, second: dict, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
def test_two_processes_share_the_work_and_resume_bit_for_bit(make_recipe, everything, tmp_path):
    """Without --launcher: it is detected, one process speaks, and one run is in the folder."""
    recipe = make_recipe(**everything, batch_size=2, schedule={"epochs": 3}, data={"img_size": 32})
    whole = torchrun(tmp_path, recipe, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert [line.split()[1] for line in whole.stdout.splitlines() if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert whole.stdout.count("batch    16 = 2 images x 4 accumulated x 2") == 1
    log = read_scalars(tmp_path / "whole" / "scalars.jsonl")
    assert [line["iter"] for line in log] == [6, 12, 18]  # 24 images, 2 processes, 2 a batch
    assert all(round(line["val_top1"] * 9 / 100, 6).is_integer() for line in log)  # 9 images, none counted twice
    assert read_checkpoint(tmp_path / "whole" / "epoch_3.pth")["meta"]["processes"] == 2

    torchrun(tmp_path, recipe, "parts")
    (tmp_path / "parts" / "epoch_3.pth").unlink()
    again = torchrun(tmp_path, recipe, "parts", resume=True)
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr[-3000:]
    for part in ("state_dict", "ema_state_dict"):
        first, second = (weights(tmp_path / run, part) for run in ("whole", "parts"))
        assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch_and_sharded_ones(make_recipe, tmp_path):
    augment = {"hflip": 0.5, "scale": (0.5, 1.0), "randaugment": "rand-m9-mstd0.5-inc1"}
    common = {
        "model": VIT,
        "schedule": {"epochs": 3},
        "data": {"img_size": 32},
        "augment": augment,
        "ema": 0.8,
        **LINEAR,
    }
    runs = {
        "one": (make_recipe(**common, batch_size=8), 1),
        "two": (make_recipe(**common, batch_size=4), 2),
        "sharded": (make_recipe(**common, batch_size=4, engine={"parallel": "fsdp"}), 2),
    }
    for name, (recipe, processes) in runs.items():
        done = torchrun(tmp_path, recipe, name, processes)
        assert done.returncode == 0, done.stderr[-3000:]
    for part in ("state_dict", "ema_state_dict"):
        one, two, sharded = (weights(tmp_path / run, part) for run in runs)
        assert_close(one, two, 1e-6)
        assert_close(two, sharded, 1e-5)
    logs = [read_scalars(tmp_path / run / "scalars.jsonl") for run in runs]
    for key in ("train_loss", "grad_norm", "val_loss", "raw_loss"):
        for lines in logs[1:]:
            assert [line[key] for line in lines] == pytest.approx([line[key] for line in logs[0]], rel=1e-5)
    assert load_net(tmp_path / "sharded" / "best.pth")(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_and_with_another_number_of_processes(make_recipe, tmp_path):
    common = {"model": VIT, "schedule": {"epochs": 3}, "data": {"img_size": 32}, "checkpoint": {"keep": 3}}
    recipe = make_recipe(**common, batch_size=4, ema=0.8, engine={"parallel": "fsdp"})
    for name in ("whole", "parts"):
        assert torchrun(tmp_path, recipe, name).returncode == 0
    (tmp_path / "parts" / "epoch_3.pth").unlink()
    again = torchrun(tmp_path, recipe, "parts", resume=True)
    assert again.returncode == 0, again.stderr[-3000:]
    for part in ("state_dict", "ema_state_dict"):
        first, second = (weights(tmp_path / run, part) for run in ("whole", "parts"))
        assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.slow
def test_another_number_of_processes_continues_only_on_request(make_recipe, tmp_path):
    recipe = make_recipe(model=VIT, schedule={"epochs": 3}, data={"img_size": 32}, batch_size=4, checkpoint={"keep": 3})
    assert torchrun(tmp_path, recipe, "run").returncode == 0
    (tmp_path / "run" / "epoch_3.pth").unlink()
    refused = torchrun(tmp_path, recipe, "run", 1, resume=True)
    assert "was trained by 2 processes, now there are 1; --change-processes allows it" in refused.stderr
    done = torchrun(tmp_path, recipe, "run", 1, resume=True, change_processes=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "with 1 process instead of 2: global batch 4 instead of 8" in done.stdout
    assert [line["iter"] for line in read_scalars(tmp_path / "run" / "scalars.jsonl")] == [3, 6, 18]


def two_processes(folder: Path, recipe: dict, work_dir: str) -> list[tuple[int, str]]:
    """Two processes that know of each other by environment; where one ends, nobody ends the other (torchrun would)."""
    (folder / "run.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    known |= {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "run.py", json.dumps(recipe), work_dir, "{}"],
            cwd=folder,
            env={**os.environ, **known, "RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda process: process.communicate(timeout=300)[1], processes))
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.mark.slow
def test_a_mistake_and_a_bad_image_of_one_process_stop_both(make_recipe, images, tmp_path):
    for code, error in two_processes(tmp_path, make_recipe(model={"num_classes": 4}), "run"):
        assert code == 1 and "has 3 classes in 'train', but model.num_classes is 4" in error
    data = shutil.copytree(images, tmp_path / "data")
    (data / "train" / "ant" / "3.png").write_bytes(b"broken")
    recipe = make_recipe(data={"root": str(data), "max_unreadable": 0}, batch_size=2)
    for code, error in two_processes(tmp_path, recipe, "run"):
        last = error.rstrip().splitlines()[-1]
        assert code == 1 and "TrainError: data: 1 training images cannot be read" in last and "ant/3.png" in last


@pytest.mark.slow
def test_tasks_of_srun_are_one_run(make_recipe, tmp_path):
    """As srun starts them on one machine; gloo on CPUs."""
    (tmp_path / "run.py").write_text(SCRIPT)
    recipe = json.dumps(make_recipe(model=VIT, data={"img_size": 32}, schedule={"epochs": 1}))
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    slurm |= {"SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "run.py", recipe, "run", "{}"],
            cwd=tmp_path,
            env={**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert read_checkpoint(tmp_path / "run" / "epoch_1.pth")["meta"]["processes"] == 2
    assert len(read_scalars(tmp_path / "run" / "scalars.jsonl")) == 1
