"""q, k and v of a packed projection: gradients that lie in one buffer are not stacked, all others are."""

import itertools

import pytest
import torch
import torch.fx

from foveate.attention_ops import packed
from foveate.attention_ops.packed import unpack
from foveate.kernels.packed import separate, together


def slices(shape: tuple[int, ...], dim: int) -> tuple[torch.Tensor, ...]:
    return torch.zeros(shape).unbind(dim)


@pytest.fixture
def kernels_run(monkeypatch):
    """Let `unpack` take CPU tensors for those of a GPU."""
    monkeypatch.setattr(packed, "why_no_triton", lambda _: None)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 4, 3, 2, 8), 3), ((3, 2, 3, 4, 2, 8), 0), ((1, 5, 1, 3, 1, 8), 3)])
def test_gradients_lie_as_the_slices_of_one_tensor(shape, dim, order):
    qkv = slices(shape, dim)
    maps = [qkv[i] for i in order]
    grads = together(*maps)
    assert [g.stride() for g in grads] == [m.stride() for m in maps]
    distances = [g.data_ptr() - grads[0].data_ptr() for g in grads]
    assert distances == [m.data_ptr() - maps[0].data_ptr() for m in maps]
    assert {g.untyped_storage().nbytes() for g in grads} == {maps[0].untyped_storage().nbytes()}


@pytest.mark.parametrize(
    "maps",
    [
        slices((2, 3, 4, 2, 8, 3), 5),  # head_dim is not contiguous
        slices((2, 3, 4, 5, 2, 8), 3)[:3],  # two slices are left over
        slices((2, 3, 4, 3, 2, 8), 3)[:2],  # one is
        tuple(torch.zeros(2, 3, 4, 2, 8) for _ in range(3)),
        (torch.zeros(1, 1, 1, 1, 8).expand(2, 3, 4, 2, 8),) * 3,
        (*slices((2, 3, 4, 2, 2, 8), 3), torch.zeros(2, 3, 4, 2, 6)),
    ],
    ids=["inner dimension", "five", "two of three", "apart", "one tensor thrice", "another shape"],
)
def test_other_slices_have_no_common_buffer(maps):
    assert together(*maps) is None
    grads = separate(*maps)
    assert all(g.is_contiguous() and g.shape == m.shape for g, m in zip(grads, maps, strict=True))


@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 3, 4), 2), ((2, 3, 3, 4), -2), ((3, 2, 4), 0), ((2, 4, 3), -1)])
def test_a_buffer_of_gradients_is_the_gradient(kernels_run, shape, dim):
    x = torch.randn(shape, requires_grad=True)
    whole = torch.randn(shape)
    parts = unpack(x, dim)
    assert all(torch.equal(a, b) for a, b in zip(parts, x.unbind(dim), strict=True))
    (grad,) = torch.autograd.grad(parts, x, whole.unbind(dim))
    assert grad.data_ptr() == whole.data_ptr() and torch.equal(grad, whole)


def test_other_gradients_are_stacked(kernels_run):
    x = torch.randn(2, 3, 3, 4, requires_grad=True)
    whole = torch.randn(2, 3, 3, 4)
    first, second, third = whole.unbind(2)
    for grads in ((third, second, first), (first, third, second), (first, second, third.clone()), (first,) * 3):
        (grad,) = torch.autograd.grad(unpack(x, 2), x, grads)
        assert torch.equal(grad, torch.stack(grads, 2))
    (grad,) = torch.autograd.grad(unpack(x, 2)[1].sum(), x)  # nobody uses the others
    assert torch.equal(grad, torch.stack([torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2, 3, 4)], 2))


def test_a_second_derivative_exists(kernels_run):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def product(x):
        q, k, v = unpack(x, 0)
        return q * k.sin() * v

    assert torch.autograd.gradcheck(product, x) and torch.autograd.gradgradcheck(product, x)


def test_tracers_see_unbind(kernels_run):
    def scaled(x: torch.Tensor) -> torch.Tensor:
        q, k, v = unpack(x, 1)
        return q * k + v

    x = torch.randn(2, 3, 4, requires_grad=True)
    script, trace = torch.jit.script(scaled), torch.jit.trace(scaled, x)
    assert "aten::unbind" in str(script.inlined_graph) and "aten::unbind" in str(trace.graph)
    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    for run in (script, trace, compiled, torch.fx.symbolic_trace(scaled)):
        torch.testing.assert_close(run(x), scaled(x))
    assert torch.func.vmap(torch.func.grad(lambda x: scaled(x[None]).sum()))(x).shape == x.shape
