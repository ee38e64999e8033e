"""Nothing that an op keeps between calls shows: after tracers, threads, forks, inference mode, other defaults."""

import copy
import gc
import os
import pkgutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from ops import CASES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from foveate import attention_ops
from foveate.attention_ops import neighborhood_attention

every_case = pytest.mark.parametrize("name", CASES)
MODULES = [import_module(f"foveate.attention_ops.{m.name}") for m in pkgutil.iter_modules(attention_ops.__path__)]
TABLES = {value for module in MODULES for value in vars(module).values() if hasattr(value, "cache_info")}


@pytest.fixture(autouse=True)
def no_tables():
    """Start without tables of other tests: the first call makes them."""
    for table in TABLES:
        table.cache_clear()


def results(case, impl="auto"):
    tensors = case.tensors()
    out = case.call(*tensors, impl=impl)
    return out, *torch.autograd.grad(out.square().sum(), tensors)


def check_still_right(case):
    torch.testing.assert_close(results(case), results(case, "reference"))


@every_case
def test_a_call_with_real_tensors_under_fake_mode(name):
    case = CASES[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = case.call(*case.tensors(grad=False))
        assert isinstance(out, FakeTensor)
    check_still_right(case)


@every_case
def test_a_call_under_a_tracer(name):
    case = CASES[name]
    tensors = case.tensors(grad=False)
    traced = make_fx(lambda *t: case.call(*t), tracing_mode="symbolic")(*tensors)
    torch.testing.assert_close(traced(*tensors), case.call(*tensors, impl="reference"))
    check_still_right(case)


@every_case
def test_inference_mode_first(name):
    case = CASES[name]
    with torch.inference_mode():
        out = case.call(*case.tensors(grad=False))
    torch.testing.assert_close(out.clone(), case.call(*case.tensors(grad=False), impl="reference"))
    check_still_right(case)


@every_case
def test_transforms_first(name):
    case = CASES[name]
    torch.func.vmap(case.call)(*(t[None] for t in case.tensors(grad=False)))
    torch.func.grad(lambda *t: case.call(*t).sum())(*case.tensors(grad=False))
    check_still_right(case)


@every_case
def test_another_default_device_and_dtype(name):
    case = CASES[name]
    tensors = case.tensors(grad=False)
    expected = case.call(*tensors, impl="reference")
    with torch.device("meta"):
        for impl in ("tiled", "reference"):
            torch.testing.assert_close(case.call(*tensors, impl=impl), expected)
    torch.set_default_dtype(torch.float64)
    try:
        check_still_right(case)
    finally:
        torch.set_default_dtype(torch.float32)
    check_still_right(case)


@every_case
def test_many_threads_at_once(name):
    case = CASES[name]
    expected = case.call(*case.tensors(grad=False), impl="reference")
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda _: case.call(*case.tensors(grad=False)), range(32)))
    for out in outs:
        torch.testing.assert_close(out, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same():
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    for case in CASES.values():
        case.call(*case.tensors(grad=False))
    child = os.fork()
    if child == 0:
        right = all(
            torch.allclose(
                case.call(*case.tensors(grad=False)), case.call(*case.tensors(grad=False), impl="reference"), atol=1e-8
            )
            for case in CASES.values()
        )
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_tables_are_bounded_and_small():
    """A table has one axis: the two of a large map take less than a megabyte."""
    q = torch.zeros(1, 200, 200, 1, 1)
    before = {id(t) for t in tensors_alive()}
    neighborhood_attention(q, q, q, 7)
    kept = [t for t in tensors_alive() if id(t) not in before]
    assert 0 < sum(t.nbytes for t in kept) < 1 << 20
    assert all(table.cache_info().maxsize for table in TABLES)


@pytest.fixture
def few_objects():
    """Let collections look at new objects only: those of all modules take seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@every_case
def test_nothing_of_the_tensors_of_a_call_is_kept(name, few_objects):
    case = CASES[name]
    for grad in (False, True):
        tensors = case.tensors(grad=grad)
        out = case.call(*tensors)
        if grad:
            out.sum().backward()
        storages = [weakref.ref(t) for t in (*tensors, out)]
        del tensors, out
        gc.collect()
        assert [ref for ref in storages if ref() is not None] == []


@every_case
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_another_map_size_dtype_and_pattern_in_between_changes_nothing(name, grad):
    """Tables and plans are found again by what decides them."""
    case = CASES[name]
    expected = results(case) if grad else case.call(*case.tensors(grad=False))
    for other in CASES.values():
        other.call(*other.tensors(torch.float32, grad=False))
    torch.testing.assert_close(
        results(case) if grad else case.call(*case.tensors(grad=False)), expected, rtol=0, atol=0
    )


def tensors_alive():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor]


@every_case
def test_a_graph_can_be_copied_and_walked_twice(name):
    case = CASES[name]
    tensors = case.tensors()
    out = case.call(*tensors)
    first = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out.square().sum(), tensors)))
    copied = [copy.deepcopy(t) for t in case.tensors()]
    torch.testing.assert_close(case.call(*copied), case.call(*tensors, impl="reference"))
