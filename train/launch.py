"""Devices and processes: one process, or one per device with torchrun or SLURM."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from mmengine.dist import init_dist
from torch import distributed

from .errors import TrainError
from .recipe import Precision

Launcher = Literal["none", "pytorch", "slurm"]

_STARTED_BY = {"pytorch": ("RANK", "torchrun"), "slurm": ("SLURM_PROCID", "srun")}


@contextmanager
def processes(launcher: Launcher, device: str | None) -> Iterator[torch.device]:
    """Join the process group, if any, and yield the device of this process; leave the group at the end.

    Args:
        launcher: "none", "pytorch" (torchrun; gloo on CPU, NCCL on CUDA) or "slurm" (srun, CUDA).
        device: "cpu", "cuda", "cuda:1", ...; None: CUDA if available. With a launcher each process takes
            the device of its local rank.

    Raises:
        TrainError: unknown launcher, no such device, or not started by the launcher.
    """
    chosen = choose_device(device)
    if launcher == "none":
        yield chosen
        return
    if launcher not in _STARTED_BY:
        raise TrainError(f"launcher: wanted none, pytorch or slurm, got {launcher!r}")
    variable, program = _STARTED_BY[launcher]
    if variable not in os.environ:
        raise TrainError(f"launcher {launcher}: start the command with {program} ({variable} is not set)")
    if chosen.index is not None:
        raise TrainError(f"device {device}: launcher {launcher} sets the device of each process, use 'cuda' or 'cpu'")
    _join(launcher, chosen)
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if chosen.type == "cuda" else chosen
    finally:
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


def _join(launcher: Launcher, device: torch.device) -> None:
    if device.type == "cuda":
        init_dist(launcher, backend="nccl")  # also sets the device of this process
    elif launcher == "slurm":
        raise TrainError("launcher slurm: needs CUDA devices; on CPU nodes start torchrun and use launcher pytorch")
    else:
        distributed.init_process_group("gloo")  # MMEngine's own start calls CUDA
