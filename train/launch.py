"""Devices and processes: one process, or one per device with torchrun or SLURM."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import distributed

from .._errors import first_line
from .errors import TrainError
from .recipe import Precision

Launcher = Literal["auto", "none", "pytorch", "slurm"]

_STARTED_BY = {"pytorch": ("RANK", "torchrun"), "slurm": ("SLURM_PROCID", "srun")}
_FIRST_PORT, _PORTS = 20_000, 20_000


def detect_launcher() -> Launcher:
    """Return what started this process, from the variables that torchrun and srun set.

    The script of an sbatch job is not a task of srun: SLURM's variables in it describe the job, and it is one process.
    """
    if "RANK" in os.environ and (_number("WORLD_SIZE") > 1 or "TORCHELASTIC_RUN_ID" in os.environ):
        return "pytorch"
    in_step = "SLURM_STEP_ID" in os.environ or "SLURM_STEPID" in os.environ
    tasks = _number("SLURM_STEP_NUM_TASKS") if in_step else _number("SLURM_NTASKS")
    only_a_script = not in_step and os.environ.get("ENVIRONMENT") == "BATCH"
    return "slurm" if "SLURM_PROCID" in os.environ and tasks > 1 and not only_a_script else "none"


def resolve(launcher: Launcher) -> Launcher:
    """Return the launcher, detected where it is "auto".

    Raises:
        TrainError: unknown launcher, or this process was not started by it.
    """
    if launcher == "auto":
        return detect_launcher()
    if launcher == "none":
        return launcher
    if launcher not in _STARTED_BY:
        raise TrainError(f"launcher: wanted auto, none, pytorch or slurm, got {launcher!r}")
    variable, program = _STARTED_BY[launcher]
    if variable not in os.environ:
        raise TrainError(f"launcher {launcher}: start the command with {program} ({variable} is not set)")
    return launcher


def is_first(launcher: Launcher) -> bool:
    """Say whether this is process 0, before and after the process group exists."""
    found = detect_launcher() if launcher == "auto" else launcher
    return found == "none" or _number(_STARTED_BY[found][0]) == 0


@contextmanager
def processes(launcher: Launcher, device: str | None) -> Iterator[torch.device]:
    """Join the process group, if any, and yield the device of this process; leave the group at the end.

    Args:
        launcher: "none"; "pytorch" (torchrun) or "slurm" (srun), with gloo on CPUs and NCCL on CUDA; "auto" detects it.
        device: "cpu", "cuda", "cuda:1", ...; None: CUDA if available. With a launcher each process takes
            the device of its local rank.

    Raises:
        TrainError: unknown launcher, no such device, or not started by the launcher.
    """
    chosen = choose_device(device)
    launcher = resolve(launcher)
    if launcher == "none":
        yield chosen
        return
    if chosen.index is not None:
        raise TrainError(f"device {device}: launcher {launcher} sets the device of each process, use 'cuda' or 'cpu'")
    with _environment(_slurm_variables() if launcher == "slurm" else {}):
        try:
            _join(chosen)
            yield torch.device("cuda", torch.cuda.current_device()) if chosen.type == "cuda" else chosen
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


def choose_device(device: str | None) -> torch.device:
    """Return the requested device; a TrainError if this machine does not have it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise TrainError(f"device: wanted cpu, cuda, cuda:N or mps, got {device!r}") from error
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= available.get(chosen.type, 0):
        raise TrainError(f"device {device}: this machine has {available.get(chosen.type, 0)} of {chosen.type}")
    return chosen


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device does not support."""
    if precision == "fp16" and device.type != "cuda":
        raise TrainError(f"precision fp16: loss scaling needs a CUDA device, got {device}; use precision=bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainError(
            f"precision bf16: {torch.cuda.get_device_name(device)} does not support bfloat16; use precision=fp16"
        )


def _join(device: torch.device) -> None:
    local = _number("LOCAL_RANK")
    if device.type == "cuda":
        if local >= (gpus := torch.cuda.device_count()):
            raise TrainError(f"launcher: process {local} of this machine has no GPU, there are {gpus}")
        torch.cuda.set_device(local)
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:  # MASTER_ADDR or another variable is missing
        raise TrainError(f"launcher: cannot join the other processes: {first_line(error)}") from error


def _slurm_variables() -> dict[str, str]:
    """Return what torch reads for its process group, from the variables of srun."""
    job = _number("SLURM_JOB_ID") + _number("SLURM_STEP_ID")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(_FIRST_PORT + job % _PORTS)),
    }
    return found | {"MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_host()}


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES", "1")
    if nodes == "1":
        return "127.0.0.1"
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "")
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise TrainError(f"launcher slurm: scontrol cannot list the machines {hosts!r}; set MASTER_ADDR") from error


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _number(variable: str) -> int:
    try:
        return int(os.environ.get(variable, ""))
    except ValueError:
        return 0
