"""Compile the kernels for GPUs that are not there, through our own launchers, and read what ptxas made of them."""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

if os.environ.get("FOVEATE_COMPILE_GATE") != "1":
    collect_ignore_glob = ["test_*.py"]

COMPILED: set[str] = set()  # every kernel that a test has compiled, as module.name


def pytest_sessionfinish():
    """Tell the process that started this one which kernels were compiled."""
    if path := os.environ.get("FOVEATE_COMPILED_NAMES"):
        Path(path).write_text("\n".join(sorted(COMPILED)))


SHARED_LIMIT_BYTES = {80: 166912, 86: 101376, 90: 232448}  # a block's, by compute capability
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one GPU."""

    name: str
    capability: int  # 80, 90
    warps: int
    shared_bytes: int
    ptx: str
    cubin: bytes

    @cached_property
    def _usage(self) -> str:
        return self._dump("--dump-resource-usage")

    @property
    def registers(self) -> int:
        return int(re.search(r"REG:(\d+)", self._usage).group(1))

    @property
    def stack_bytes(self) -> int:
        return int(re.search(r"STACK:(\d+)", self._usage).group(1))

    @cached_property
    def instructions(self) -> list[tuple[int, str, str]]:
        """(address, opcode, operands) of the machine code, in order."""
        return [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(self._dump("-sass"))]

    @cached_property
    def loops(self) -> list[list[str]]:
        """Opcodes of every loop (a backward branch), longest first."""
        found = []
        for address, op, rest in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
            if target and int(target.group(1), 16) < address:
                start = int(target.group(1), 16)
                found.append([o for a, o, _ in self.instructions if start <= a <= address])
        return sorted(found, key=len, reverse=True)

    def loop_instructions_per(self, elements: int) -> float:
        """Machine instructions of the longest loop, over all threads, for each of `elements` made in one turn."""
        return len(self.loops[0]) * 32 * self.warps / elements

    def loop_spills(self) -> list[str]:
        """Loads and stores of local memory inside the longest loop."""
        return [op for op in self.loops[0] if op.startswith(("LDL", "STL"))] if self.loops else []

    def count(self, pattern: str) -> int:
        """How often a regular expression occurs in the PTX."""
        return len(re.findall(pattern, self.ptx))

    def _dump(self, flag: str) -> str:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(self.cubin)
            return subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def compile_for(monkeypatch) -> Callable[..., list[Compiled]]:
    """A function `(capability, launch, *args)`: calls a launcher, compiles what it launches, runs nothing.

    The launcher gets meta tensors (device="meta", real shapes and strides): launch shapes, specialisation and kernel
    are looked at together.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    plain_run, kernels = JITFunction.run, []

    def run(self, *args, grid, warmup, **kwargs):
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel)
        COMPILED.add(f"{self.__module__}.{self.__name__}")
        return kernel

    def compile_(capability: int, launch: Callable, *args, **kwargs) -> list[Compiled]:
        fake = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,  # caches are kept by device
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", fake)  # triton 3.4: active
        kernels.clear()
        launch(*args, **kwargs)
        return [describe(kernel, capability) for kernel in kernels]

    monkeypatch.setattr(JITFunction, "run", run)
    return compile_


def describe(kernel, capability: int) -> Compiled:
    asm, metadata = kernel.asm, kernel.metadata
    return Compiled(kernel.name, capability, metadata.num_warps, metadata.shared, asm["ptx"], asm["cubin"])


@pytest.fixture
def shared_limit_bytes() -> dict[int, int]:
    return SHARED_LIMIT_BYTES
