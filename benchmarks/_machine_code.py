"""Compile kernels for GPUs that are not there, and read what ptxas made of them: registers, memory, instructions.

Launchers get meta tensors of real shapes and strides, so that launch shapes, specialisation and kernel are looked at
together. Nothing runs. Triton must not interpret kernels in this process (TRITON_INTERPRET unset).
"""

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Shared memory in bytes, by compute capability: of a block at most, and of a multiprocessor (CUDA programming guide)
SHARED_LIMIT_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}
SHARED_OF_SM_BYTES = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 120: 102400}
WARPS_OF_SM = {80: 64, 86: 48, 89: 48, 90: 64, 120: 48}
REGISTERS_OF_SM = 65536
SHARED_BYTES_OF_SYSTEM = 1024  # that the driver takes of each block

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one GPU, and how it was launched."""

    name: str
    capability: int  # 80, 90
    warps: int
    shared_bytes: int
    ptx: str
    cubin: bytes
    module: str = ""
    programs: int = 0  # of the launch
    constants: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the launch

    @cached_property
    def _usage(self) -> str:
        return self._dump("--dump-resource-usage")

    @property
    def registers(self) -> int:
        return self._used("REG")

    @property
    def stack_bytes(self) -> int:
        return self._used("STACK")

    def _used(self, name: str) -> int:
        found = re.search(rf"{name}:(\d+)", self._usage)
        if found is None:
            raise ValueError(f"cuobjdump reports no {name} of {self.name}: {self._usage!r}")
        return int(found.group(1))

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

    def executed(self, turns: float) -> float:
        """Machine instructions of one thread where the longest loop makes so many turns."""
        everything = sum(op != "NOP" for _, op, _ in self.instructions)  # NOPs fill up the last line of code
        return everything + len(self.loops[0]) * (turns - 1) if self.loops else everything

    def loop_spills(self) -> list[str]:
        """Loads and stores of local memory inside the longest loop."""
        return [op for op in self.loops[0] if op.startswith(("LDL", "STL"))] if self.loops else []

    def count(self, pattern: str) -> int:
        """How often a regular expression occurs in the PTX."""
        return len(re.findall(pattern, self.ptx))

    @property
    def blocks_of_sm(self) -> int:
        """Blocks that one multiprocessor holds at a time."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(
            REGISTERS_OF_SM // registers,
            SHARED_OF_SM_BYTES[self.capability] // (self.shared_bytes + SHARED_BYTES_OF_SYSTEM),
            WARPS_OF_SM[self.capability] // self.warps,
            32 if self.capability in (80, 90) else 16,
        )

    def _dump(self, flag: str) -> str:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(self.cubin)
            return subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout


def fake_gpu(capability: int) -> SimpleNamespace:
    """What Triton asks its driver before it compiles; caches are kept by device, so a capability is a device."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )


def active_driver() -> tuple[object, str]:
    """Return the object and the name of its attribute that hold Triton's driver."""
    from triton.runtime import driver

    return driver, "_active" if hasattr(driver, "_active") else "active"  # triton 3.4: active


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for a GPU of this compute capability and run nothing; yields them as they come."""
    from triton.runtime.jit import JITFunction

    plain_run, launches = JITFunction.run, []

    def run(self, *args, grid, warmup, **kwargs):
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(describe(kernel, capability, self.__module__, grid, kwargs))
        return kernel

    with mock.patch.object(*active_driver(), fake_gpu(capability)), mock.patch.object(JITFunction, "run", run):
        yield launches


def compile_for(capability: int, launch: Callable, *args, **kwargs) -> list[Compiled]:
    """Call a launcher on meta tensors, and return what it launches as compiled for a compute capability."""
    with compiling_for(capability) as launches:
        launch(*args, **kwargs)
    return launches


def describe(kernel, capability: int, module: str, grid, constants: Mapping[str, Any]) -> Compiled:
    asm, metadata = kernel.asm, kernel.metadata
    return Compiled(
        kernel.name, capability, metadata.num_warps, metadata.shared, asm["ptx"], asm["cubin"],
        module=module, programs=grid[0], constants=dict(constants),
    )  # fmt: skip
