"""The kernels' suites, each in a process of its own: Triton cannot interpret and compile in one.

interpreted/  Triton's interpreter runs the kernels on CPU tensors: results against brute force.
compiled/     the kernels are compiled for GPUs that are not there: registers, memory, instructions.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreted, and FOVEATE_COMPILE_GATE=1 pytest tests/kernels/compiled.
"""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from foveate import kernels

HERE = Path(__file__).parent
BOUNDS_OF = Version("3.6")
SWITCH = {"interpreted": "TRITON_INTERPRET", "compiled": "FOVEATE_COMPILE_GATE"}


def all_kernels() -> set[str]:
    """Every kernel of the package, as module.name; helpers that kernels call have other names."""
    from triton.runtime.jit import JITFunction

    found = set()
    for module in pkgutil.walk_packages(kernels.__path__, "foveate.kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.__name__.endswith("_kernel"):
                found.add(f"{value.__module__}.{value.__name__}")
    return found


def run(suite: str, marks: str, **environment: str) -> None:
    triton = Version(pytest.importorskip("triton", reason="Triton has no wheel for this platform").__version__)
    if suite == "compiled" and triton < BOUNDS_OF:
        pytest.skip(f"the bounds are of the machine code that Triton {BOUNDS_OF} and newer make; this one is {triton}")
    if suite == "interpreted" and triton < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton} wants NumPy before 2.4")
    command = [sys.executable, "-m", "pytest", str(HERE / suite), "-q", "-m", marks, "-p", "no:cacheprovider"]
    environment = os.environ | {SWITCH[suite]: "1"} | environment
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout.splitlines()[-1], done.stdout[-2000:]


def test_the_interpreted_suite_passes():
    run("interpreted", "not slow")


def test_the_compiled_suite_passes_and_compiles_every_kernel(tmp_path):
    names = tmp_path / "names"
    run("compiled", "not slow", FOVEATE_COMPILED_NAMES=str(names))
    missing = all_kernels() - set(names.read_text().splitlines())
    assert missing == set(), "add a test to tests/kernels/compiled that compiles them"


@pytest.mark.slow
@pytest.mark.parametrize("suite", SWITCH)
def test_the_slow_suite_passes(suite):
    run(suite, "slow")
