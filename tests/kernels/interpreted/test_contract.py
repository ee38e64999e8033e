"""Every op has kernels that equal its definition in Triton's interpreter, or says why it has none."""

from functools import lru_cache

import pytest
import torch
from ops import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.attention_ops import Impl, bi_level_routes
from foveate.attention_ops._op import OPS
from foveate.kernels import register  # noqa: F401  registers the ops

OF_OTHERS = {"bi_level_routes"}  # an op without bodies to choose from
KERNEL_OPS = {
    name.removeprefix("foveate::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("foveate::") and not name.startswith("foveate::_")
} - {*OPS, *OF_OTHERS}


class Watch(TorchDispatchMode):
    """Keep the first call of every kernel's op."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name, *_ = str(func).split(".")
        if space == "foveate":
            self.calls.setdefault(name, (func, args))
        return func(*args, **(kwargs or {}))


@lru_cache
def fused(name: str):
    """The results of a case by its kernels, with every gradient, and the calls of kernels' ops.

    Or the reason why no kernel runs.
    """
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    with Watch() as watch:
        try:
            out = case.call(*tensors, impl="fused")
        except NotImplementedError as error:
            return str(error)
        gradients = torch.autograd.grad(out.square().sum(), tensors)
    return [out, *gradients], watch.calls


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_the_definition_with_every_gradient(name):
    found = fused(name)
    if isinstance(found, str):
        assert "cannot run here: " in found
        return
    ours, case = found[0], CASES[name]
    tensors = case.tensors()
    truth = [out := case.call(*tensors, impl="reference"), *torch.autograd.grad(out.square().sum(), tensors)]
    for mine, exact in zip(ours, truth, strict=True):
        assert (mine - exact).abs().max() <= 1e-5 * max(exact.abs().max(), 1)


def test_every_op_has_a_case_that_its_kernels_run_or_has_no_kernels():
    run = {CASES[name].name for name in CASES if not isinstance(fused(name), str)}
    without = {name for name, op in OPS.items() if Impl.FUSED not in op.bodies}
    assert run == set(OPS) - without, "tests/ops.py needs a Case that the fused body takes"


def calls_of_kernel_ops() -> dict:
    runs = [fused(name) for name in CASES]
    with Watch() as watch:  # the op without bodies to choose from
        bi_level_routes(*torch.randn(2, 1, 4, 6, 3), region_size=2, topk=2)
    return {op: call for run in runs if not isinstance(run, str) for op, call in run[1].items()} | watch.calls


def test_every_kernels_op_is_reached_by_a_case():
    assert set(calls_of_kernel_ops()) == KERNEL_OPS


@pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")
@pytest.mark.parametrize("op", sorted(name for name in KERNEL_OPS if not name.endswith("_backward")))
def test_opcheck(op):
    func, args = calls_of_kernel_ops()[op]
    grad = f"{op.removesuffix('_forward')}_backward" in KERNEL_OPS

    def leaf(x):
        return x.detach().clone().requires_grad_(grad and x.is_floating_point())

    args = tuple(leaf(a) if isinstance(a, torch.Tensor) else a for a in args)
    results = torch.library.opcheck(func, args, rtol=1e-4, atol=1e-4)
    assert set(results.values()) == {"SUCCESS"}, results
