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
from functools import lru_cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console, RenderableType

from .._errors import first_line
from .._version import __version__

FLUSHED_BYTES = 256 << 20  # more than the L2 cache of any GPU
REPORT_COLUMNS = 140
SETTLE = 0.05  # s
_RESET_PEAK = "5"  # resets the peak when written to Linux's /proc/self/clear_refs
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve")
K = TypeVar("K")  # what names a call


def interleaved_seconds(
    calls: Mapping[K, Callable[[], object]],
    *,
    rounds: int,
    device: str = "cpu",
    warmup: int = 1,
    replay: bool = False,
    settle: bool = False,
) -> dict[K, float]:
    """Return the median seconds of each call; the arguments are those of `interleaved_rounds`."""
    taken = interleaved_rounds(calls, rounds=rounds, device=device, warmup=warmup, replay=replay, settle=settle)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def interleaved_rounds(
    calls: Mapping[K, Callable[[], object]],
    *,
    rounds: int,
    device: str = "cpu",
    warmup: int = 1,
    replay: bool = False,
    settle: bool = False,
) -> dict[K, list[float]]:
    """Return the seconds of each call in each round; calls take turns (A B C A B C ...): other load affects all.

    On a GPU a call is timed by events, after a flush of the L2 cache.

    Args:
        replay: on a GPU, time CUDA graphs of the calls: the GPU's work without Python and launches. A call that cannot
            be captured is timed as it is.
        settle: on a CPU, run each call for 50 ms, at least once, before it is timed: for calls of several runtimes or
            sessions, each with threads of its own, which still wait for work while the next one begins.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if replay and device.startswith("cuda"):
        calls = {name: captured(call)[0] for name, call in calls.items()}
    seconds: dict[K, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            if settle and not device.startswith("cuda"):
                _run_for(SETTLE, call)
            elapsed = _seconds(call, device)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _run_for(least: float, call: Callable[[], object]) -> None:
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < least:
        call()


def peak_bytes(call: Callable[[], object], device: str = "cpu", *, first: bool = False) -> int | None:
    """Return the peak memory of one call, without the memory in use before it (weights, gradients, inputs).

    On CUDA from torch's allocator. On Linux from the resident memory of the process, after freed memory was returned to
    the system: it includes unused memory of the allocator and is accurate to some MB. None on other systems.

    Args:
        first: measure the first call, not the second: for engines that allocate their buffers there and keep them.
    """
    if not first:
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
    facts = machine_facts(device)
    gpu = [f"GPU      {facts['gpu']}"] if "gpu" in facts else []
    load = f", load average {facts['load_average']}" if "load_average" in facts else ""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("foveate", "torch", "timm"))
    return "\n".join(
        [
            f"CPU      {facts['cpu']}, {facts['logical_cores']} logical cores, {facts['threads']} threads{load}",
            *gpu,
            f"Versions {versions}, Python {facts['python']}, {facts['system']}",
        ]
    )


def machine_facts(device: str = "cpu") -> dict[str, str | int | float]:
    """Return what figures depend on: processor, instruction sets, threads, load, GPU, versions and the date."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, str | int | float] = {
        "cpu": _cpu_model(),
        "features": cpu_features(),
        "logical_cores": cores or 1,
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "getloadavg"):
        facts["load_average"] = round(os.getloadavg()[0], 1)
    if device.startswith("cuda"):
        facts["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    facts |= {"foveate": __version__, **{name: version(name) for name in ("torch", "timm")}}
    return facts | {
        "python": platform.python_version(),
        "system": platform.system(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_features() -> str:
    """Return the instruction sets that decide which products are fast, separated by spaces."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return " ".join(name for name in _FEATURES if name in flags) or torch.backends.cpu.get_cpu_capability()


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


def captured(call: Callable[[], object]) -> tuple[Callable[[], object], str | None]:
    """Return a CUDA graph of the call, after three runs; the call itself and the reason where there can be none."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # of any library that the call runs
        return call, first_line(error)
    return graph.replay, None


def copy_bytes_per_second(device: str) -> float:
    """Return bytes read and written per second by a copy larger than any cache."""
    source = torch.empty(2**31 if device.startswith("cuda") else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleaved_seconds({"copy": lambda: target.copy_(source)}, rounds=7, device=device)["copy"]
    return 2 * source.numel() / seconds


def _seconds(call: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        return _gpu_seconds(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], object]) -> float:
    _flushed().zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


@lru_cache(maxsize=1)
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
