"""The kernels of keys that all queries see, and of local mixtures, in Triton's interpreter, against float64."""

import pytest
import torch

from foveate.kernels.keys import keys_attention_lse
from foveate.kernels.mixture import local_mixture

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [((5, 7), 13, 8, 8), ((9, 8), 40, 24, 24), ((1, 3), 1, 16, 5), ((4, 17), 33, 33, 20)]


def made(size, keys, dim, wide, dtype, bias):
    """Views of packed tensors, and the bias of a list that is a map of one column."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = [randn(2, *size, 2, 2, dim), randn(2, keys, 2, dim + wide), randn(2, 6, 5)]
    rows = torch.randint(0, 6, (size[0], keys), generator=generator)
    cols = torch.randint(0, 5, (size[1], 1), generator=generator)

    def views(tensors):
        q, kv, table = tensors
        return q[:, :, :, 1], kv[..., :dim], kv[..., dim:], (table, rows, cols) if bias else None

    return tensors, views


def by_definition(q, k, v, bias, scale):
    logits = torch.einsum("byxhd,bkhd->bhyxk", q, k) * scale
    if bias is not None:
        table, rows, cols = bias
        pairs = table[:, rows[:, :, None, None], cols[None, None]]  # (heads, H, Ph, W, Pw)
        logits = logits + pairs.permute(0, 1, 3, 2, 4).flatten(3)
    return torch.einsum("bhyxk,bkhd->byxhd", logits.softmax(-1), v), logits.logsumexp(-1).permute(0, 2, 3, 1)


def results(call, tensors, views, dtype):
    out, lse = call(*views(tensors))
    probe = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    loss = (out * probe).sum() + (lse * lse.detach().cos()).sum().to(out.dtype)
    return [out, lse, *torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_keys_equal_the_definition_with_every_gradient(sizes, bias, dtype):
    tensors, views = made(*sizes, dtype, bias)

    def ours(q, k, v, bias):
        return keys_attention_lse(q, k, v, scale=0.3, bias=bias)

    found = results(ours, tensors, views, dtype)
    exact = results(
        lambda *given: by_definition(*given, 0.3), [t.detach().double().requires_grad_() for t in tensors], views,
        torch.float64,
    )  # fmt: skip
    tolerance = 2e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    for mine, truth in zip(found, exact, strict=True):
        assert (mine.double() - truth).abs().max() <= tolerance * max(truth.abs().max(), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "dim", "kernel"), [((5, 7), 8, (3, 3)), ((9, 11), 24, (3, 3)), ((6, 2), 5, (5, 3))])
def test_mixtures_equal_the_definition_with_every_gradient(size, dim, kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    near = kernel[0] * kernel[1]
    packed = torch.randn(2, *size, 3, 2, dim, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(2, *size, 2, near, generator=generator).to(dtype).requires_grad_()

    def exact(weights, v):
        top, left = kernel[0] // 2, kernel[1] // 2
        wide = torch.nn.functional.pad(v, (0, 0, 0, 0, left, left, top, top))
        places = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
        shifted = [wide[:, i : i + size[0], j : j + size[1]] for i, j in places]
        return sum(weights[..., n, None] * shifted[n] for n in range(near))

    found = []
    for call, leaves in (
        (lambda w, v: local_mixture(w, v, kernel), [weights, packed]),
        (exact, [t.detach().double().requires_grad_() for t in (weights, packed)]),
    ):
        out = call(leaves[0], leaves[1][:, :, :, 2])
        probe = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
        found.append([out, *torch.autograd.grad(out, leaves, probe)])
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for mine, truth in zip(*found, strict=True):
        assert (mine.double() - truth).abs().max() <= tolerance * truth.abs().max()
