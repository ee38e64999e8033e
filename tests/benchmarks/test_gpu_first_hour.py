"""The first run on a GPU: its definitions are those of the ops, and its dry run in Triton's interpreter works."""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from foveate import attention_ops
from foveate.attention_ops._op import OPS, Impl
from foveate.benchmarks.gpu_first_hour import cases, token_cases
from foveate.benchmarks.gpu_first_hour.__main__ import MODULE, main


def reference_of(call):
    return lambda *args, **kwargs: call(*args, **kwargs | {"impl": "reference"})


@pytest.mark.parametrize("case", cases.small_cases(), ids=lambda case: case.name)
def test_the_definitions_are_those_of_the_ops(monkeypatch, case):
    ops = {name: reference_of(getattr(attention_ops, name)) for name in OPS}
    for module in (cases, token_cases):
        monkeypatch.setattr(module, "ops", SimpleNamespace(**ops))
    torch.manual_seed(0)
    leaves, ours, exact = case.make("cpu")
    doubles = [x.double() for x in leaves]
    torch.testing.assert_close(ours(doubles), exact(doubles))


@pytest.mark.parametrize("made", [cases.small_cases, cases.full_cases], ids=["small", "full"])
def test_every_op_with_a_kernel_has_a_case_and_no_case_comes_twice(made):
    names = [f"{case.name} {case.dtype}" for case in made()]
    assert len(set(names)) == len(names)
    tried = {case.op for case in made()}
    with_kernels = {name for name, op in OPS.items() if Impl.FUSED in op.bodies}
    ops = {name.removesuffix("_attention") for name in with_kernels} - {"hilo"}  # hilo runs the window kernel
    assert tried == ops


def test_a_dry_run_finds_a_kernel_exact(tmp_path):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", MODULE, "--cpu", "--parts", "a", "--only", "channel_gate", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["a"]
    assert len(rows) == 2 and not any(row["bad"] for row in rows)


@pytest.mark.slow
def test_workers_compile_forward_and_backward_without_a_gpu(tmp_path):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    command = [sys.executable, "-m", MODULE, "--worker", "0/9/90", "--batch", "2"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert {"local_forward_kernel", "local_dkv_kernel", "dilated_gate_kernel"} <= compiled


def test_a_part_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--parts", "ax"])
    assert "--parts takes letters of aebcd, got x" in capsys.readouterr().err


def test_without_a_gpu_the_command_says_what_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", partial(bool, 0))
    assert main([]) == 2
    assert "--cpu runs small cases" in capsys.readouterr().err
