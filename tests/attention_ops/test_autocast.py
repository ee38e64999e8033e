"""Autocast is read where an op is called and kept out of its body: sums stay in float32, forward and backward."""

import pytest
import torch
from ops import CASES
from torch import Tensor

every_body = pytest.mark.parametrize("impl", ["reference", "tiled", "auto"])


def run(name: str, impl: str, tensors: list[Tensor], autocast: bool) -> list[Tensor]:
    """Return the output and the gradients; backward runs outside of autocast, as torch's guide says."""
    given = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = CASES[name].call(*given, impl=impl)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weights)]


def assert_same_bits(name: str, impl: str, dtype: torch.dtype) -> None:
    tensors = CASES[name].tensors(dtype, grad=False)
    for one, other in zip(*(run(name, impl, tensors, autocast) for autocast in (False, True)), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@every_body
@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_autocast_changes_no_bit(name, impl):
    assert_same_bits(name, impl, torch.bfloat16)


@every_body
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(" gate")])
def test_gates_of_float32_maps_are_float32_under_autocast(name, impl):
    assert_same_bits(name, impl, torch.float32)


@every_body
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.names == ("q", "k", "v")])
def test_in_float32_autocast_casts_the_arguments_and_nothing_inside(name, impl):
    tensors = CASES[name].tensors(torch.float32, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = CASES[name].call(*tensors, impl=impl)
    assert torch.equal(cast, CASES[name].call(*(t.bfloat16() for t in tensors), impl=impl))
