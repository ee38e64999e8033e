"""Random calls agree with the papers' definitions, in every body that runs on a CPU."""

import pytest
import torch
from random_calls import MAKERS, check, draw

from foveate.attention_ops._op import OPS

SEEDS = range(6)
MANY = range(100, 380)  # times 13 ops: more than 3000 calls


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the tensors are tiny."""


def test_every_op_is_drawn():
    assert set(MAKERS) == set(OPS)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("name", MAKERS)
def test_random_calls(name, impl):
    for seed in SEEDS:
        assert check(draw(name, seed), impl) is None


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("name", MAKERS)
def test_thousands_of_random_calls(name, impl):
    wrong = [found for seed in MANY if (found := check(draw(name, seed), impl)) is not None]
    assert wrong == []


@pytest.mark.parametrize("name", MAKERS)
def test_a_wrong_answer_is_found(name):
    """In the output and in a gradient: else the calls above prove nothing."""
    call = next(call for seed in range(40) if can_show_an_error(call := draw(name, seed)))
    right = call.run
    call.run = lambda *given, impl: right(*given, impl=impl) * 1.5
    assert "the output" in check(call, "reference")
    call.run = lambda *given, impl: _WrongBackward.apply(right(*given, impl=impl))
    assert "gradients" in check(call, "reference")


def can_show_an_error(call):
    first = next(iter(call.tensors.values()))
    return call.needed and first.numel() > 8 and all(t.dtype == torch.float32 for t in call.tensors.values())


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.5
