"""Two processes on one CPU, as torchrun starts them on a node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveate.train.checkpoints import read_checkpoint

SCRIPT = """
import sys, json
import torch
from foveate.train import train
torch.set_num_threads(1)
recipe, work_dir, resume = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
train(recipe, work_dir=work_dir, resume=resume, launcher="pytorch", device="cpu")
"""


def torchrun(folder: Path, recipe: dict, work_dir: str, how: str = "start") -> subprocess.CompletedProcess[str]:
    (folder / "run.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*launch, "run.py", json.dumps(recipe), work_dir, how]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_share_the_work_and_resume_bit_for_bit(make_recipe, everything, tmp_path):
    recipe = make_recipe(**everything, batch_size=2, schedule={"epochs": 3}, data={"img_size": 32})
    whole = torchrun(tmp_path, recipe, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert whole.stdout.count("epoch 1/3") == 1 and whole.stdout.count("\n") == 3  # one process speaks
    log = [json.loads(line) for line in (tmp_path / "whole" / "scalars.jsonl").open()]
    assert [line["iter"] for line in log] == [6, 12, 18]  # 24 images, 2 processes, 2 a batch
    assert all(round(line["val_top1"] * 9 / 100, 6).is_integer() for line in log)  # 9 images, none counted twice

    torchrun(tmp_path, recipe, "parts")
    (tmp_path / "parts" / "epoch_3.pth").unlink()
    again = torchrun(tmp_path, recipe, "parts", "resume")
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr[-3000:]
    first, second = (read_checkpoint(tmp_path / run / "epoch_3.pth") for run in ("whole", "parts"))
    for part in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())


@pytest.mark.slow
def test_a_mistake_stops_both_processes(make_recipe, tmp_path):
    done = torchrun(tmp_path, make_recipe(model={"num_classes": 4}), "run")
    assert done.returncode != 0 and "has 3 classes in 'train', but model.num_classes is 4" in done.stderr
