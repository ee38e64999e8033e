"""Programs exported on a GPU name the kernels' ops: one import makes all of them known."""

import json
import subprocess
import sys

import pytest

# The ops of ours that torch knows after each of three imports, in one fresh process.
PROGRAM = """
import importlib, json, pkgutil, torch
def known():
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("foveate::")]
import foveate
without_kernels = known()
import foveate.kernels.register
with_register = known()
for module in pkgutil.walk_packages(foveate.kernels.__path__, "foveate.kernels."):
    importlib.import_module(module.name)
print(json.dumps([without_kernels, with_register, known()]))
"""


def test_one_import_registers_the_op_of_every_kernel():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    without_kernels, with_register, every = map(set, json.loads(done.stdout))
    assert any(name.endswith("_forward") for name in every - without_kernels)
    assert not any(name.endswith("_forward") for name in without_kernels)  # importing the package needs no Triton
    assert every - with_register == set(), "import its file in kernels/register.py"
