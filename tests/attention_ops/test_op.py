"""Public functions of ops: what they pass on, and what they refuse."""

import inspect

import pytest
import torch
from ops import CASES
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from foveate import attention_ops
from foveate.attention_ops import circle_attention_lse
from foveate.attention_ops._op import OPS


@pytest.mark.parametrize("name", OPS)
def test_public_functions_pass_all_arguments_in_the_order_of_their_signatures(monkeypatch, name):
    function = getattr(attention_ops, name)
    given = {parameter: object() for parameter in inspect.signature(function).parameters}
    namespace = inspect.unwrap(function).__globals__
    monkeypatch.setitem(namespace, "run", lambda op, *values: (op, values))
    assert function(**given) == (name, tuple(given.values()))


def test_calls_that_do_not_fit_a_signature_are_type_errors():
    q = torch.zeros(1, 3, 3, 1, 4)
    for args, kwargs in (((q, q), {}), ((q, q, q, 2), {"q": q}), ((q, q, q, 2), {"radios": 2}), ((q,) * 20, {})):
        with pytest.raises(TypeError):
            circle_attention_lse(*args, **kwargs)
    out, lse = circle_attention_lse(q, q, v=q, radius=2)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]


class Watched(TorchFunctionMode):
    """A mode that sees every call, so that ops go through torch's dispatcher; keeps the names of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("foveate."):
            self.names.add(str(func).removeprefix("foveate."))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_call_gives_the_same_with_and_without_the_dispatcher(case):
    """In eager mode ops skip it, unless somebody watches."""
    given = case.tensors(torch.float32)
    plain = case.call(*given)
    grads = torch.autograd.grad(plain.sum(), given, allow_unused=True)
    with Watched() as watched:
        out = case.call(*given)
        assert torch.equal(out, plain)
        for grad, wanted in zip(torch.autograd.grad(out.sum(), given, allow_unused=True), grads, strict=True):
            assert grad is wanted is None or torch.equal(grad, wanted)
    assert case.name in watched.names


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_profilers_see_calls_by_name(case):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        case.call(*case.tensors(torch.float32))
    assert f"foveate::{case.name}" in {event.name for event in record.events()}


UNFIT = {
    "q": [None],
    "k": [None, [1.0]],
    "v": [None, 3.0],
    "kernel_size": [3.0, (3, 3, 3), None],
    "dilation": ["2"],
    "rpb": [1.0],
    "is_causal": ["no"],
    "scale": ["wide", [1.0]],
    "impl": [3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNFIT.items() for value in values])
def test_values_of_other_types_than_the_schema_has_are_refused_with_and_without_the_dispatcher(name, value):
    maps = dict.fromkeys(("q", "k", "v"), torch.zeros(1, 5, 5, 1, 4))
    given = {**maps, "kernel_size": 3, name: value}
    with pytest.raises((TypeError, ValueError, RuntimeError)) as plain:
        attention_ops.neighborhood_attention(**given)
    with Watched(), pytest.raises(plain.type) as watched:
        attention_ops.neighborhood_attention(**given)
    assert str(plain.value) == str(watched.value)
