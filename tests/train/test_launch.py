"""What started a process is found from its environment; one run is never started twice in one folder."""

import os

import pytest

from foveate.train import TrainError
from foveate.train.launch import _environment, _slurm_variables, detect_launcher, is_first, processes

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "none"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}
CASES = [
    ({}, "none"),
    (TORCHRUN, "pytorch"),
    (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "pytorch"),  # torchrun with one process
    ({"RANK": "0", "WORLD_SIZE": "1"}, "none"),  # set by a cluster, without torchrun
    ({"RANK": "3", "WORLD_SIZE": "8"}, "pytorch"),  # started by hand or by another launcher
    ({"WORLD_SIZE": "2"}, "none"),
    (SRUN, "slurm"),
    (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, "none"),  # one task of an allocation for four
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "slurm"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "ENVIRONMENT": "BATCH"}, "none"),  # the script of a job, without srun
    ({"SLURM_NTASKS": "4"}, "none"),  # the shell of salloc
    (SRUN | TORCHRUN, "pytorch"),  # torchrun on each machine of a job
    ({"RANK": "x", "WORLD_SIZE": "y"}, "none"),
]
NAMES = {
    *TORCHRUN,
    *SRUN,
    "ENVIRONMENT",
    "SLURM_STEPID",
    "SLURM_JOB_ID",
    "SLURM_LOCALID",
    "MASTER_PORT",
    "SLURM_NNODES",
}


@pytest.fixture
def environ(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def use(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(("variables", "launcher"), CASES, ids=str)
def test_the_launcher_is_detected(environ, variables, launcher):
    environ(variables)
    assert detect_launcher() == launcher


def test_only_process_0_speaks(environ):
    assert is_first("auto") and is_first("none")
    environ(SRUN)
    assert not is_first("auto") and not is_first("slurm") and is_first("none")
    environ({"SLURM_PROCID": "0"})
    assert is_first("auto")


def test_the_variables_of_srun_become_those_of_torch(environ):
    environ(SRUN | {"SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "1"})
    found = _slurm_variables()
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "4", "1")
    assert found["MASTER_ADDR"] == "127.0.0.1" and 20_000 <= int(found["MASTER_PORT"]) < 40_000
    environ({"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "SLURM_NNODES": "2"})
    assert (_slurm_variables()["MASTER_ADDR"], _slurm_variables()["MASTER_PORT"]) == ("node7", "29500")


def test_several_machines_without_scontrol_are_refused(environ, monkeypatch, tmp_path):
    environ(SRUN | {"SLURM_NNODES": "2", "SLURM_NODELIST": "node[1-2]", "PATH": str(tmp_path)})
    with pytest.raises(TrainError, match=r"scontrol cannot list the machines 'node\[1-2\]'; set MASTER_ADDR"):
        _slurm_variables()


def test_the_environment_is_restored(environ, monkeypatch):
    environ({"RANK": "7"})
    with _environment({"RANK": "1", "MASTER_PORT": "2"}):
        assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("1", "2")
    assert os.environ["RANK"] == "7" and "MASTER_PORT" not in os.environ


def test_processes_that_cannot_find_each_other_are_one_line(environ):
    environ({"RANK": "0", "WORLD_SIZE": "2"})
    with (
        pytest.raises(TrainError, match=r"launcher: cannot join the other processes: .*MASTER_ADDR"),
        processes("auto", "cpu"),
    ):
        pass
