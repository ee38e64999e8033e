"""Every op under torch.func, forward-mode AD and derivatives of derivatives: the results of plain autograd."""

import pytest
import torch
from ops import CASES
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

every_case = pytest.mark.parametrize("name", CASES)
every_body = pytest.mark.parametrize("impl", ["reference", "tiled"])
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # unfold_backward under vmap
ALIKE = [name for name, case in CASES.items() if case.names == ("q", "k", "v") and len(set(case.shapes)) == 1]


def loss_of(case, impl):
    """A scalar function of the case's tensors whose derivatives of every order differ from zero."""

    def loss(*tensors):
        out = case.call(*tensors, impl=impl)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return (out * weight).sum() + out.pow(3).sum()

    return loss


def by_autograd(case, impl="reference", seed=0):
    tensors = case.tensors(seed=seed)
    return torch.autograd.grad(loss_of(case, impl)(*tensors), tensors)


def places(case):
    return tuple(range(len(case.shapes)))


@every_case
@every_body
def test_grad_vjp_and_jacrev_equal_autograd(name, impl):
    case = CASES[name]
    tensors, expected = case.tensors(grad=False), by_autograd(case)
    for got in (grad, jacrev):
        torch.testing.assert_close(got(loss_of(case, impl), places(case))(*tensors), expected)
    out, pull = vjp(loss_of(case, impl), *tensors)
    torch.testing.assert_close(pull(torch.ones_like(out)), expected)


@every_case
@every_body
def test_jvp_jacfwd_and_dual_tensors_equal_autograd(name, impl):
    case = CASES[name]
    tensors, tangents = case.tensors(grad=False), case.tensors(seed=1, grad=False)
    expected = sum((g * t).sum() for g, t in zip(by_autograd(case), tangents, strict=True))
    _, tangent = jvp(loss_of(case, impl), tuple(tensors), tuple(tangents))
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(jacfwd(loss_of(case, impl), 1)(*tensors), by_autograd(case)[1])
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(loss_of(case, impl)(*dual)).tangent, expected)


@every_case
@every_body
def test_vmap_equals_a_loop(name, impl):
    case = CASES[name]
    stacked = [torch.stack(pair) for pair in zip(*(case.tensors(seed=s, grad=False) for s in (0, 1)), strict=True)]

    def call(*tensors):
        return case.call(*tensors, impl=impl)

    looped = torch.stack([call(*(t[i] for t in stacked)) for i in range(2)])
    torch.testing.assert_close(vmap(call)(*stacked), looped)
    shared = [stacked[0], *(t[0] for t in stacked[1:])]  # one tensor with a batch, the others without
    looped = torch.stack([call(stacked[0][i], *shared[1:]) for i in range(2)])
    torch.testing.assert_close(vmap(call, in_dims=(0, *[None] * (len(shared) - 1)))(*shared), looped)


@every_case
@every_body
def test_gradients_of_each_sample_equal_a_loop(name, impl):
    case = CASES[name]
    stacked = [torch.stack(pair) for pair in zip(*(case.tensors(seed=s, grad=False) for s in (0, 1)), strict=True)]
    per_sample = vmap(grad(loss_of(case, impl), places(case)))(*stacked)
    for seed in (0, 1):
        torch.testing.assert_close(tuple(g[seed] for g in per_sample), by_autograd(case, seed=seed))


@every_case
@every_body
def test_hessian_vector_products_agree(name, impl):
    """By two backward passes, by a jvp of grad, and by a vjp of grad."""
    case = CASES[name]
    tensors, tangents = case.tensors(), case.tensors(seed=1, grad=False)
    loss = loss_of(case, impl)
    first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    twice = torch.autograd.grad(first, tensors, tangents)
    plain = [t.detach() for t in tensors]
    _, forward = jvp(grad(loss, places(case)), tuple(plain), tuple(tangents))
    torch.testing.assert_close(forward, twice)
    _, pull = vjp(grad(loss, places(case)), *plain)
    torch.testing.assert_close(pull(tuple(tangents)), twice)


@every_case
@every_body
def test_gradcheck_of_both_orders_and_both_modes(name, impl):
    case = CASES[name]

    def call(*tensors):
        return case.call(*tensors, impl=impl)

    assert torch.autograd.gradcheck(call, case.tensors(), fast_mode=True)
    assert torch.autograd.gradcheck(
        call, case.tensors(), fast_mode=True, check_forward_ad=True, check_backward_ad=False
    )
    assert torch.autograd.gradgradcheck(call, case.tensors(), fast_mode=True)


@pytest.mark.parametrize("name", ["neighborhood, bias, dilation", "routed, masked keys", "halo, tables, stride"])
def test_a_hessian_equals_that_of_the_reference(name):
    case = CASES[name]
    tensors = case.tensors(grad=False)
    ours, reference = (hessian(loss_of(case, impl), argnums=2)(*tensors) for impl in ("tiled", "reference"))
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("name", ALIKE)
def test_one_tensor_may_be_q_k_and_v_of_a_second_derivative(name):
    x, results = CASES[name].tensors()[0], []
    for impl in ("tiled", "reference"):
        (first,) = torch.autograd.grad(loss_of(CASES[name], impl)(x, x, x), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results)
