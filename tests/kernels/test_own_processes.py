"""The kernels' suites, each in a process of its own: Triton cannot interpret and compile in one.

interpreted/  Triton's interpreter runs the kernels on CPU tensors: results against brute force.
compiled/     the kernels are compiled for GPUs that are not there: registers, memory, instructions.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreted, and FOVEATE_COMPILE_GATE=1 pytest tests/kernels/compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

HERE = Path(__file__).parent
BOUNDS_OF = Version("3.8")
SWITCH = {"interpreted": "TRITON_INTERPRET", "compiled": "FOVEATE_COMPILE_GATE"}


def run(suite: str, marks: str) -> None:
    triton = Version(pytest.importorskip("triton", reason="Triton has no wheel for this platform").__version__)
    if suite == "compiled" and triton < BOUNDS_OF:
        pytest.skip(f"the bounds are of the machine code that Triton {BOUNDS_OF} makes; this one is {triton}")
    if suite == "interpreted" and triton < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton} wants NumPy before 2.4")
    command = [sys.executable, "-m", "pytest", str(HERE / suite), "-q", "-m", marks, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env=os.environ | {SWITCH[suite]: "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout.splitlines()[-1], done.stdout[-2000:]


@pytest.mark.parametrize("suite", SWITCH)
def test_the_suite_passes(suite):
    run(suite, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("suite", SWITCH)
def test_the_slow_suite_passes(suite):
    run(suite, "slow")
