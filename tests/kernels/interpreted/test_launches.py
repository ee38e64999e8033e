"""What a launch does besides launching: it allocates results, and no cache of the kernels keeps a tensor.

A tensor that a cache owns is freed while a captured CUDA graph still reads it; one that is made by a launch is copied
to the device in every replay, or lies in memory of the graph.
"""

import functools
import gc
import importlib
import pkgutil
import sys
from types import BuiltinFunctionType, FunctionType, ModuleType

import pytest
import torch
from local_cases import Case, halos, na, results
from torch.utils._python_dispatch import TorchDispatchMode

from foveate import kernels
from foveate._torch import body_of
from foveate.attention_ops._op import OPS
from foveate.kernels.local import launch as local

CASES = [
    na((9, 7), (3, 4), (2, 1), stride=(2, 1), table=True),
    na((4, 5), (3, 5), table=True),
    Case("window", (4, 8), {"window_size": (4, 4)}, table=True),
    Case("window", (9, 10), {"window_size": (9, 10)}, table=True),
    Case("circle", (5, 7), {"radius": 2}),
    halos((4, 8), (4, 4), (1, 1), table=True),
]
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
VIEWS = {"view", "_unsafe_view", "detach", "alias", "permute", "transpose", "select", "slice", "unbind", "expand"}


class Record(TorchDispatchMode):
    """Keep the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class NoLaunch:
    """A kernel that is not launched."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


def remove_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let no kernel of local attention be launched."""
    for name, module in list(sys.modules.items()):
        if name.startswith("foveate.kernels.local."):
            for kernel in [key for key in vars(module) if key.endswith("_kernel")]:
                patch.setattr(module, kernel, NoLaunch())


def launch_all(case: Case, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """The operations of a forward and a backward pass, as eager mode runs them."""
    calls = []

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "foveate::local_attention_forward":
                calls.append(args)
            return func(*args, **(kwargs or {}))

    with Catch():
        case.call(case.inputs(dtype), "fused")
    ((q, k, v, *tables), pattern) = calls[0][:6], calls[0][6:]
    with Record() as record:
        out, lse = body_of(local._forward)(q, k, v, *tables, *pattern)
        body_of(local._backward)(q, k, v, *tables, out, lse, out, None, True, *pattern, packed=True)
    return record.names


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "halo"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_launch_only_allocates_and_takes_views(case, dtype, monkeypatch):
    remove_kernels(monkeypatch)
    assert set(launch_all(case, dtype)) - ALLOCATIONS - VIEWS == set()


def test_no_cache_or_global_of_the_kernels_holds_a_tensor():
    for case in CASES:
        results(case, case.inputs(), "fused")
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")]
    held = {f"{m.__name__}.{name}" for m in modules for name, value in vars(m).items() if owns_a_tensor(value)}
    assert len(modules) > 15 and held == set()


def owns_a_tensor(value: object) -> bool:
    """Whether a cache or container reaches a tensor; functions and modules are not followed."""
    if not isinstance(value, (functools._lru_cache_wrapper, dict, list, set, tuple)):
        return False
    seen, stack = set(), [value]
    while stack:
        x = stack.pop()
        if isinstance(x, torch.Tensor):
            return True
        if id(x) in seen or isinstance(x, (ModuleType, FunctionType, BuiltinFunctionType, type, str)):
            continue
        seen.add(id(x))
        stack += gc.get_referents(x)
    return False


def test_a_cache_that_holds_a_tensor_is_found():
    @functools.lru_cache
    def table(size):
        return {"table": [torch.zeros(size)]}

    assert not owns_a_tensor(table)
    table(3)
    assert owns_a_tensor(table) and owns_a_tensor({"a": (torch.zeros(1),)}) and not owns_a_tensor({"a": [1, OPS]})


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_calls_of_two_hundred_other_sizes_change_no_bit(case, monkeypatch):
    before = results(case, case.inputs(), "fused")
    with monkeypatch.context() as patch:
        remove_kernels(patch)
        for size in range(200):
            launch_all(na((13 + size, 16), (3, 5), table=True))
    for first, second in zip(before, results(case, case.inputs(), "fused"), strict=True):
        assert torch.equal(first, second)
