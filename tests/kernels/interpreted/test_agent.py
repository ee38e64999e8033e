"""Agent attention's kernels against two spelled out attentions, in Triton's interpreter."""

import pytest
import torch

from foveate.attention_ops import agent_attention
from foveate.kernels.agent import plan as plans
from foveate.kernels.agent.backward import launch_bias_gradient, launch_keys, launch_queries
from foveate.kernels.agent.forward import launch_gather, launch_one_pass, launch_read
from foveate.kernels.agent.plan import Plan, blocks_of, make_plan

# queries, keys, agents, heads, head_dim
SIZES = {
    "one tile": (7, 9, 4, 2, 8),
    "a class token more than two tiles": (65, 65, 16, 1, 16),
    "one query, one agent": (1, 70, 1, 1, 24),
    "fewer keys than queries, 49 agents": (100, 33, 49, 1, 32),
    "two blocks of agents": (40, 70, 81, 1, 40),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


@pytest.fixture
def two_kernels(monkeypatch):
    """Gather and read by kernels of their own, in splits of at most 64 keys."""
    monkeypatch.setattr(plans, "FEW_TOKENS", 0)
    monkeypatch.setattr(plans, "LEAST_CHUNK", 32)


def inputs(size, dtype=torch.float32, biases=True, batch=2):
    """Leaves of which q, k and v are strided views, biases in float32; and the gradient of out."""
    queries, keys, agents, heads, dim = size
    torch.manual_seed(0)
    leaves = [torch.randn(batch, n, 2, heads, dim).to(dtype) for n in (queries, keys, keys)]
    leaves.append(torch.randn(batch, agents, heads, dim).to(dtype))
    leaves += [torch.randn(heads, agents, keys), torch.randn(heads, queries, agents)] if biases else []
    grad = torch.randn(batch, queries, heads, dim).to(dtype)
    return [leaf.requires_grad_() for leaf in leaves], grad


def plain(q, k, v, agents, bias_to=None, bias_from=None):
    """Every rounding that plain code makes; exact enough in float64."""
    q, k, v, few = (t.transpose(1, 2) for t in (q, k, v, agents))
    to, of = few * q.shape[-1] ** -0.5 @ k.mT, q * q.shape[-1] ** -0.5 @ few.mT
    to, of = (a if b is None else a + b.to(a.dtype) for a, b in ((to, bias_to), (of, bias_from)))
    return (of.softmax(-1) @ (to.softmax(-1) @ v)).transpose(1, 2)


def fused(q, k, v, agents, bias_to=None, bias_from=None):
    return agent_attention(q, k, v, agents, bias_to=bias_to, bias_from=bias_from, impl="fused")


def results(attend, leaves, grad):
    out = attend(*(leaf[:, :, 1] for leaf in leaves[:3]), *leaves[3:])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_exact(size, dtype=torch.float32, biases=True):
    leaves, grad = inputs(size, dtype, biases)
    exact = results(plain, [leaf.detach().double().requires_grad_() for leaf in leaves], grad.double())
    for ours, torchs, truth in zip(results(fused, leaves, grad), results(plain, leaves, grad), exact, strict=True):
        error = (ours - truth).abs().max()
        assert error <= TOLERANCE[dtype] * max(truth.abs().max(), 0.1)  # some gradients are 0
        if dtype != torch.float32:
            floor = torch.finfo(dtype).eps * truth.abs().max()
            assert error <= 2 * (torchs - truth).abs().max() + 2 * floor


@every_size
def test_one_pass_equals_two_attentions_with_every_gradient(size):
    assert_exact(size)


@every_size
def test_two_kernels_equal_two_attentions_with_every_gradient(size, two_kernels):
    assert_exact(size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_is_no_worse_than_low_precision_torch(dtype):
    assert_exact((100, 33, 49, 1, 32), dtype)


def test_two_kernels_are_no_worse_than_low_precision_torch(two_kernels):
    assert_exact((40, 170, 49, 1, 32), torch.bfloat16)


def test_without_biases():
    assert_exact((40, 33, 9, 2, 16), biases=False)


def test_the_plan_takes_one_pass_where_heads_fill_a_gpu_or_tokens_are_few():
    def plan(images, heads, agents, tokens):
        return Plan(images, heads, agents, tokens, tokens, *blocks_of(agents, 32, 2))

    assert plan(8, 3, 49, 197).one_pass and plan(128, 3, 49, 3136).one_pass
    assert not plan(8, 1, 49, 3136).one_pass and not plan(128, 3, 784, 197).one_pass
    splits, chunk = plan(8, 1, 49, 3136).splits(3136)
    assert splits > 1 and (splits - 1) * chunk < 3136 <= splits * chunk and chunk % 64 == 0
    assert plan(8, 1, 784, 4096).blocks == 13


@pytest.mark.parametrize("agents", [1, 9, 16, 49, 81, 144, 784])
@pytest.mark.parametrize("dim", [8, 32, 64, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_are_powers_of_two_that_the_registers_hold(agents, dim, itemsize):
    for block, tile in zip(*[iter(blocks_of(agents, dim, itemsize))] * 2, strict=True):
        assert block & (block - 1) == 0 and 16 <= block <= 128 and tile in (16, 32, 64)
        assert block * max(dim, 16) <= 128 * 64


def test_gradients_are_the_same_bits_every_time(two_kernels):
    leaves, grad = inputs((40, 170, 20, 2, 16))
    assert all(map(torch.equal, results(fused, leaves, grad), results(fused, leaves, grad)))


def test_only_the_gradients_that_are_asked_for():
    leaves, grad = inputs((20, 21, 9, 2, 8))
    for leaf in leaves[::2]:
        leaf.requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = [
        torch.autograd.grad(attend(*(leaf[:, :, 1] for leaf in leaves[:3]), *leaves[3:]), wanted, grad)
        for attend in (fused, plain)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_kernels_stay_inside_their_tensors(fenced):
    queries, keys, agents, heads, dim = 21, 37, 9, 2, 12
    q, out, grad, dq = (fenced(torch.randn(1, queries, heads, dim)) for _ in range(4))
    k, v, dk, dv = (fenced(torch.randn(1, keys, heads, dim)) for _ in range(4))
    few, gathered, dgathered = (fenced(torch.randn(1, agents, heads, dim)) for _ in range(3))
    to, of = fenced(torch.randn(heads, agents, keys)), fenced(torch.randn(heads, queries, agents))
    lse, gathered_lse = fenced(torch.ones(1, heads, queries)), fenced(torch.ones(1, heads, agents))
    plan = make_plan(q, k, few)
    launch_one_pass(plan, q, k, v, few, to, of, out, lse, gathered, gathered_lse, 0.3)
    one_pass = out.clone()
    launch_gather(plan, k, v, few, to, gathered, gathered_lse, 0.3)
    launch_read(plan, q, few, gathered, of, out, lse, 0.3)
    torch.testing.assert_close(out, one_pass)
    parts = [fenced(torch.ones(1, 1, agents, heads, dim)) for _ in range(3)]
    launch_queries(plan, q, few, gathered, of, out, grad, lse, dq, parts[:2], 0, 0.3)
    launch_keys(plan, k, v, few, gathered, dgathered, to, gathered_lse, dk, dv, parts[2], 0, 0.3)
    launch_bias_gradient(plan, q, grad, few, gathered, dgathered, out, lse, of, 0.3, of_keys=False)
    assert all(t.isfinite().all() for t in (out, dq, dk, dv, *parts))


def test_an_empty_batch_gives_empty_results():
    empty = torch.zeros(0, 12, 2, 4, requires_grad=True)
    bias = torch.zeros(2, 12, 12, requires_grad=True)
    out = agent_attention(empty, empty, empty, empty, bias_to=bias, bias_from=bias, impl="fused")
    out.sum().backward()
    assert out.shape == empty.grad.shape == empty.shape and not bias.grad.any()


def test_what_the_kernel_cannot_take_is_refused_with_the_reason():
    wide = torch.zeros(1, 4, 1, 129)
    with pytest.raises(NotImplementedError, match=r"agent_attention: .* head_dim of at most 128, got 129"):
        agent_attention(wide, wide, wide, wide, impl="fused")
