"""Compile the kernels for GPUs that are not there, through our own launchers, and read what ptxas made of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from foveate.benchmarks import _machine_code
from foveate.benchmarks._machine_code import Compiled

if os.environ.get("FOVEATE_COMPILE_GATE") != "1":
    collect_ignore_glob = ["test_*.py"]

COMPILED: set[str] = set()  # every kernel that a test has compiled, as module.name


def pytest_sessionfinish():
    """Tell the process that started this one which kernels were compiled."""
    if path := os.environ.get("FOVEATE_COMPILED_NAMES"):
        Path(path).write_text("\n".join(sorted(COMPILED)))


@pytest.fixture
def compile_for() -> Callable[..., list[Compiled]]:
    """A function `(capability, launch, *args)`: calls a launcher, compiles what it launches, runs nothing."""

    def compile_(capability: int, launch: Callable, *args, **kwargs) -> list[Compiled]:
        found = _machine_code.compile_for(capability, launch, *args, **kwargs)
        COMPILED.update(f"{kernel.module}.{kernel.name}" for kernel in found)
        return found

    return compile_


@pytest.fixture
def shared_limit_bytes() -> dict[int, int]:
    return _machine_code.SHARED_LIMIT_BYTES
