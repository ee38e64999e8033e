"""Measure calls in one process: median time of interleaved rounds, memory of one call, description of the machine."""

import argparse
import ctypes
import gc
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console, RenderableType

H200_BYTES_PER_SECOND = 4.3e12  # of plain copies
REPORT_COLUMNS = 120
_RESET_PEAK = "5"  # resets the peak when written to Linux's /proc/self/clear_refs


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, device: str = "cpu", warmup: int = 1
) -> dict[str, float]:
    """Return the median seconds of each call; calls take turns (A B C A B C ...), so that other load affects all."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            elapsed = _seconds(call, device)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Return the peak memory of one call, without the memory in use before it (weights, gradients, inputs).

    On CUDA from torch's allocator. On Linux from the resident memory of the process, after freed memory was returned to
    the system: it includes unused memory of the allocator and is accurate to some MB. None on other systems.
    """
    call()  # libraries allocate buffers and caches at the first call
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _resident_bytes("VmRSS")
    call()
    return max(_resident_bytes("VmHWM") - before, 0)


def peak_tensor_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak memory that torch's allocator hands out during one call; it is the same in each run.

    On a CPU from the profiler's record of allocations; allocations inside libraries are not included.
    """
    if device.startswith("cuda"):
        return peak_bytes(call, device)
    call()  # allocates tensors that are kept between calls
    with torch.autograd.profiler.profile(profile_memory=True) as record:
        call()
    events = sorted(record.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def describe_machine(device: str = "cpu") -> str:
    """Return processor, threads in use, load and versions, in a few lines."""
    gpu = [f"GPU      {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"] if device.startswith("cuda") else []
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {version(name)}" for name in ("foveate", "torch", "timm"))
    return "\n".join(
        [
            f"CPU      {_cpu_model()}, {cores} logical cores, {torch.get_num_threads()} threads{load}",
            *gpu,
            f"Versions {versions}, Python {platform.python_version()}, {platform.system()}",
        ]
    )


def common_parser(module: str, doc: str, *, rounds: int | None = 5) -> argparse.ArgumentParser:
    """Return a parser of --rounds (unless None), --threads and --out; the first line of `doc` is its description."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.splitlines()[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write table, command and machine to FILE")
    return parser


def parse_and_set_threads(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def write_report(table: RenderableType, *, module: str, machine: str, out: Path | None) -> None:
    """Print the table; write it with command, date and machine to `out` when given."""
    Console(width=max(Console().width, REPORT_COLUMNS)).print(table)
    if out is None:
        return
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    with out.open("w") as file:
        file.write(f"Command  {command}\nDate     {time.strftime('%Y-%m-%d')}\n{machine}\n\n")
        Console(file=file, width=REPORT_COLUMNS).print(table)


def _seconds(call: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
