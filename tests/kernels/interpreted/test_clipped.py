"""Clipped, masked, gated, sparse and reversed attention in the interpreter, against the ops' definition in float64."""

import pytest
import torch

from foveate.attention_ops import dense_attention, reversed_attention, sparse_attention, window_attention


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(queries, keys, dim=16, value_dim=16, *, batch=1, heads=2):
    sizes = (batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, value_dim)
    return [numbers(*size, seed=i) for i, size in enumerate(sizes)]


def maps(size, dim=16, value_dim=16, *, batch=1, heads=1):
    return [numbers(batch, *size, heads, d, seed=i) for i, d in enumerate((dim, dim, value_dim))]


def pairs(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6


def without_some_rows(mask):
    mask[..., ::5, :] = False
    return mask


def columns(queries, keys, budget, *, batch=1, heads=2):
    order = torch.rand(batch, heads, queries, keys, generator=torch.Generator().manual_seed(4)).argsort(-1)
    return order[..., :budget]


CLIP = (-0.01, 1.01)
GATE = numbers(2, 21, 2, seed=5)
CASES = {  # tensors that have gradients, and the call
    "clip over tiles": (tokens(70, 90), lambda q, k, v, impl: dense_attention(q, k, v, clip=CLIP, impl=impl)),
    "clip of narrow heads": (
        tokens(17, 5, 3, 9),
        lambda q, k, v, impl: dense_attention(q, k, v, clip=(-0.1, 1.2), scale=0.5, impl=impl),
    ),
    "mask of every image and head": (
        tokens(20, 70, batch=2),
        lambda q, k, v, impl: dense_attention(q, k, v, mask=pairs(2, 2, 20, 70), impl=impl),
    ),
    "shared mask, rows without keys, clip": (
        tokens(21, 33, batch=2),
        lambda q, k, v, impl: dense_attention(
            q, k, v, mask=without_some_rows(pairs(1, 1, 21, 33)), clip=(-0.05, 1.0), impl=impl
        ),
    ),
    "gate, clip, mask": (
        [*tokens(21, 40, batch=2), GATE],
        lambda q, k, v, gate, impl: dense_attention(q, k, v, mask=pairs(1, 2, 21, 40), clip=CLIP, gate=gate, impl=impl),
    ),
    "gate alone": (
        [*tokens(21, 21, batch=2), GATE],
        lambda q, k, v, gate, impl: dense_attention(q, k, v, gate=gate, impl=impl),
    ),
    "windows": (maps((14, 14)), lambda q, k, v, impl: window_attention(q, k, v, 7, clip=CLIP, impl=impl)),
    "shifted windows, gate": (
        [*maps((6, 10), value_dim=24, heads=2), numbers(1, 6, 10, 2, seed=6)],
        lambda q, k, v, gate, impl: window_attention(
            q, k, v, (3, 5), shift=(2, 1), clip=(-0.05, 1.0), gate=gate, impl=impl
        ),
    ),
    "windows shifted on one axis": (
        maps((4, 10)),
        lambda q, k, v, impl: window_attention(q, k, v, (4, 5), shift=(0, 3), clip=CLIP, impl=impl),
    ),
    "windows of several tiles": (
        maps((9, 18), 8, 8),
        lambda q, k, v, impl: window_attention(q, k, v, 9, shift=4, clip=(-0.003, 1.0), impl=impl),
    ),
    "sparse": (
        tokens(18, 100),
        lambda q, k, v, impl: sparse_attention(q, k, v, columns(18, 100, 9), impl=impl),
    ),
    "reversed over tiles": (
        [*tokens(70, 70, 16, 24), numbers(1, 70, 2, seed=7)],
        lambda q, k, v, weight, impl: reversed_attention(q, k, v, weight, impl=impl),
    ),
}


def results(call, tensors, impl):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*leaves, impl=impl)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_definition_with_every_gradient(name):
    tensors, call = CASES[name]
    exact = results(call, [t.double() for t in tensors], "reference")
    for ours, wanted in zip(results(call, tensors, "fused"), exact, strict=True):
        assert (ours - wanted).abs().max() <= 1e-5 * max(wanted.abs().max(), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["shifted windows, gate", "sparse", "reversed over tiles"])
def test_16_bits_cost_a_few_roundings(name, dtype):
    tensors, call = CASES[name]
    tensors = [t.to(dtype) for t in tensors]
    exact = results(call, [t.double() for t in tensors], "reference")
    for ours, wanted in zip(results(call, tensors, "fused"), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * max(wanted.abs().max(), 1)


def test_a_nan_stays_in_its_window():
    q, k, v = maps((6, 10))
    expected = window_attention(q, k, v, (3, 5), clip=CLIP, impl="fused")
    k[0, 1, 1] = torch.nan
    out = window_attention(q, k, v, (3, 5), clip=CLIP, impl="fused")
    assert out[:, :3, :5].isnan().all()
    out[:, :3, :5] = expected[:, :3, :5]
    torch.testing.assert_close(out, expected)


def test_biases_and_masks_of_clipped_windows_are_refused_in_one_line():
    q, k, v = maps((6, 10))
    for wanted in ({"bias": torch.zeros(1, 15, 15)}, {"mask": torch.ones(4, 15, 15, dtype=torch.bool)}):
        with pytest.raises(NotImplementedError, match=r"window_attention: impl='fused' cannot run here: .+") as found:
            window_attention(q, k, v, (3, 5), clip=CLIP, impl="fused", **wanted)
        assert "\n" not in str(found.value)


def test_memory_of_reversed_attention_is_linear_in_tokens(monkeypatch):
    """No tensor of the call, forward or backward, holds a number for every pair of tokens."""
    tensors, call = CASES["reversed over tiles"]
    largest, plain = [], torch.Tensor.new_empty

    def new_empty(self, *size, **kwargs):
        made = plain(self, *size, **kwargs)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    results(call, tensors, "fused")
    assert largest and max(largest) <= 70 * 2 * 24
