"""The dense product: activation and sum in one pass are those of plain torch, whichever library multiplies."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from foveate.attention_ops import dense
from foveate.attention_ops.dense import ACTIVATIONS


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    monkeypatch.setenv("FOVEATE_PRODUCTS", request.param)
    return request.param


@pytest.mark.parametrize(("activation", "has_bias", "adds"), [*itertools.product([None, *ACTIVATIONS], [0, 1], [0, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_epilogue_is_plain_torchs(activation, has_bias, adds, dtype, library):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator).to(dtype) for size in ((3, 7, 24), (40, 24), (40,), (3, 7, 40))
    )
    bias, residual = bias if has_bias else None, residual if adds else None
    before = None if residual is None else residual.clone()
    out = dense(x, weight, bias, activation=activation, residual=residual)
    wide = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    wide = wide if activation is None else getattr(F, activation)(wide)
    wide = wide if residual is None else wide + residual.double()
    most = 2e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out.double(), wide, rtol=most, atol=most)
    assert out.dtype == dtype and (residual is None or torch.equal(residual, before))


def test_views_and_few_rows(library):
    x = torch.randn(24, 50).t()  # rows that do not lie one behind the other
    weight = torch.randn(40, 48)[:, ::2]
    torch.testing.assert_close(dense(x, weight), x @ weight.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense(x[0], weight), x[0] @ weight.t(), rtol=1e-4, atol=1e-4)
    assert dense(x[:0], weight).shape == (0, 40)


def test_gradients_take_torchs_operations(monkeypatch):
    module = sys.modules["foveate.attention_ops.dense"]  # the package has the function under that name
    monkeypatch.setattr(module, "cpu_report", None)
    x = torch.randn(64, 8, requires_grad=True)
    dense(x, torch.randn(4, 8), activation="silu").sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 5)}, r"x must be \(\.\.\., K\) and weight \(N, K\), got \(2, 5\) and \(4, 6\)"),
        ({"weight": torch.zeros(4)}, "x must be"),
        ({"bias": torch.zeros(5)}, r"bias must be \(4,\), got \(5,\)"),
        ({"residual": torch.zeros(2, 5)}, r"residual must be \(2, 4\), got \(2, 5\)"),
        ({"residual": torch.zeros(2, 4, dtype=torch.float64)}, "residual must have the dtype of x"),
        ({"activation": "tanh"}, "activation must be one of .*'relu', 'gelu', 'silu'.*, got 'tanh'"),
        ({"x": torch.zeros(2, 6, dtype=torch.int64)}, "must be floating point"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = {"x": torch.zeros(2, 6), "weight": torch.zeros(4, 6), "bias": None} | change
    with pytest.raises(ValueError, match=words):
        dense(**given)
