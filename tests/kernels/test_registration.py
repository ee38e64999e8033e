"""Programs exported on a GPU name the kernels' ops: one import makes all of them known."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import foveate

KERNELS = Path(foveate.__file__).parent / "kernels"


def known_ops(statement: str) -> set[str]:
    """The ops of ours that torch knows in a fresh process after one statement."""
    command = f"import torch; {statement}; print(*torch._C._dispatch_get_all_op_names())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return {name.removeprefix("foveate::") for name in done.stdout.split() if name.startswith("foveate::")}


def test_one_import_registers_the_op_of_every_kernel():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    written = set(re.findall(r'custom_op\("foveate::(\w+)"', "".join(f.read_text() for f in KERNELS.rglob("*.py"))))
    assert len(written) == 11 and written <= known_ops("import foveate.kernels.register")
    assert not written & known_ops("import foveate")  # which needs no Triton
