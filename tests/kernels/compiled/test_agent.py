"""Agent attention's kernels as compiled for GPUs that are not there: no spills, tensor cores, shared memory."""

import pytest
import torch

from foveate.kernels.agent.backward import launch_bias_gradient, launch_keys, launch_queries
from foveate.kernels.agent.forward import launch_gather, launch_one_pass, launch_read
from foveate.kernels.agent.plan import make_plan

# tokens, agents, heads, head_dim of published models, batch 8
LAYERS = {
    "DeiT": (197, 49, 3, 64),
    "DeiT-B, 81 agents": (197, 81, 12, 64),
    "Swin, stage 1": pytest.param((3136, 9, 3, 32), marks=pytest.mark.slow),
    "dense, 784 agents": pytest.param((4096, 784, 8, 64), marks=pytest.mark.slow),
}
FEW_SPILLS = 5  # loads and stores, of more than 600 instructions, in loops whose products are three of TF32
WIDE = {"head_dim 128": (784, 49, 4, 128), "head_dim 128, 784 agents": (784, 784, 4, 128)}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(tokens, agents, heads, dim, dtype):
    """All kernels on meta tensors, those of one pass where a block holds the agents."""
    q, k, v = meta(8, tokens, 3, heads, dim, dtype=dtype).unbind(2)
    few = meta(8, agents, heads, dim, dtype=dtype)
    to, of = (meta(*shape, dtype=torch.float32) for shape in ((heads, agents, tokens), (heads, tokens, agents)))
    out, gathered, dgathered = meta(*q.shape, dtype=dtype), meta(*few.shape, dtype=dtype), meta(*few.shape)
    lse, gathered_lse = (meta(8, heads, n, dtype=torch.float32) for n in (tokens, agents))
    plan, dgathered = make_plan(q, k, few), dgathered.float()
    if plan.blocks == 1:
        launch_one_pass(plan, q, k, v, few, to, of, out, lse, gathered, gathered_lse, 1.0)
    launch_gather(plan, k, v, few, to, gathered, gathered_lse, 1.0)
    launch_read(plan, q, few, gathered, of, out, lse, 1.0)
    sums = out if plan.back_blocks == 1 else out.float()
    parts = [meta(plan.splits(tokens)[0], *few.shape, dtype=torch.float32)] * 2
    for first in (0, plan.back_block) if plan.back_blocks > 1 else (0,):
        launch_queries(plan, q, few, gathered, of, out, out, lse, sums, parts, first, 1.0)
        launch_keys(plan, k, v, few, gathered, dgathered, to, gathered_lse, sums, sums, parts[0], first, 1.0)
    launch_bias_gradient(plan, q, out, few, gathered, dgathered, out, lse, of, 1.0, of_keys=False)
    launch_bias_gradient(plan, k, v, few, gathered, dgathered, out, gathered_lse, to.mT, 1.0, of_keys=True)


def check(kernel, limit_bytes):
    what = (kernel.name, kernel.capability, kernel.registers, kernel.stack_bytes, kernel.shared_bytes)
    assert kernel.loop_spills() == [] and kernel.stack_bytes <= 32, what  # a few bytes before and after the loop
    assert kernel.shared_bytes <= limit_bytes, what
    if kernel.name != "combine_kernel":
        assert kernel.count(r"wgmma\.mma_async|mma\.sync") > 0, what


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_16_bit_kernels_are_on_tensor_cores_without_spills(compile_for, shared_limit_bytes, layer, capability):
    kernels = compile_for(capability, launch, *layer, torch.bfloat16)
    assert {kernel.name for kernel in kernels} >= {"gather_kernel", "read_kernel", "queries_kernel", "keys_kernel"}
    for kernel in kernels:
        check(kernel, shared_limit_bytes[86])  # the smallest


def launch_split_gather(tokens, agents, heads, dim):
    """The kernel that gathers, over so many keys that several programs share them, and the one that joins these."""
    q, k, v = meta(8, tokens, 3, heads, dim).unbind(2)
    few, gathered = meta(8, agents, heads, dim), meta(8, agents, heads, dim)
    launch_gather(make_plan(q, k, few), k, v, few, None, gathered, meta(8, heads, agents, dtype=torch.float32), 1.0)


def test_keys_that_several_programs_share_are_joined(compile_for, shared_limit_bytes):
    kernels = compile_for(80, launch_split_gather, 3136, 9, 1, 32)
    assert "combine_kernel" in {kernel.name for kernel in kernels}
    for kernel in kernels:
        check(kernel, shared_limit_bytes[86])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
@pytest.mark.parametrize("layer", WIDE.values(), ids=WIDE.keys())
def test_wide_heads_fit(compile_for, shared_limit_bytes, layer, capability):
    for kernel in compile_for(capability, launch, *layer, torch.bfloat16):
        check(kernel, shared_limit_bytes[capability])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_float32_fits(compile_for, shared_limit_bytes, dim, capability):
    for agents in (49, 784):
        for kernel in compile_for(capability, launch, 784, agents, 4, dim, torch.float32):
            assert kernel.shared_bytes <= shared_limit_bytes[capability], (kernel.name, kernel.shared_bytes)
            assert kernel.name == "combine_kernel" or kernel.count("tf32") > 0
            spills = kernel.loop_spills()
            assert len(spills) <= (FEW_SPILLS if capability == 120 else 0), (kernel.name, kernel.registers, len(spills))
