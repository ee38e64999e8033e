"""The kernels of keys that all queries see, and of local mixtures, as machine code: no spills, tensor cores, memory."""

import pytest
import torch
from of_triton import OLD, stack_bytes

from foveate.kernels import keys, mixture

SHAPES = {  # map, keys as a map, heads, head_dim, bias: layers of published models
    "MoH-S stage 1": ((56, 56), (7, 7), 3, 24, True),
    "MoH-B stage 3": ((14, 14), (7, 7), 16, 24, True),
    "CLEAR, cells": ((64, 64), (16, 16), 4, 64, False),
}


def launch(shape, dtype, batch=8):
    """All kernels of forward and backward, on meta tensors."""
    size, pooled, heads, dim, has_bias = shape
    q = torch.empty(batch, size[0] * size[1], heads, dim, dtype=dtype, device="meta")
    k, v = torch.empty(batch, pooled[0] * pooled[1], 2, heads, dim, dtype=dtype, device="meta").unbind(2)
    bias = None
    if has_bias:
        table = torch.empty(heads, 104, 104, dtype=dtype, device="meta")
        cells = [torch.empty(a, b, dtype=torch.int64, device="meta") for a, b in zip(size, pooled, strict=True)]
        bias = (table, *cells)
    out, lse = torch.empty_like(q), torch.empty(batch, heads, q.shape[1], device="meta")
    call = keys.Call(q, k, v, bias, 1.0)
    keys.launch_forward(call, q, k, v, out, lse)
    delta = keys.launch_backward(call, q, k, v, out, lse, out, lse, q, k, v)
    if bias is not None:
        keys.launch_bias_gradient(call, q, k, v, out, lse, delta)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SHAPES)
def test_16_bit_kernels_are_on_tensor_cores_without_spills(compile_for, shared_limit_bytes, name, capability):
    found = compile_for(capability, launch, SHAPES[name], torch.bfloat16)
    names = {"keys_forward_kernel", "keys_dq_kernel", "keys_dkv_kernel"} | (
        {"keys_dbias_kernel"} if SHAPES[name][4] else set()
    )
    assert {kernel.name for kernel in found} == names
    for kernel in found:
        assert kernel.stack_bytes <= stack_bytes(), (kernel.name, kernel.registers)
        spilled = 2 if OLD and kernel.name == "keys_dbias_kernel" else 0  # a word, stored and loaded
        assert len(kernel.loop_spills()) <= spilled, (kernel.name, kernel.registers)
        assert kernel.shared_bytes <= shared_limit_bytes[86] // 2, (kernel.name, kernel.shared_bytes)
        assert kernel.count(r"wgmma\.mma_async|mma\.sync") > 0, kernel.name


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_float32_and_wide_heads_fit(compile_for, shared_limit_bytes, capability):
    for dim, dtype in ((24, torch.float32), (64, torch.float32), (128, torch.bfloat16), (128, torch.float32)):
        for kernel in compile_for(capability, launch, ((14, 14), (7, 7), 2, dim, True), dtype):
            assert kernel.shared_bytes <= shared_limit_bytes[capability], (dim, dtype, kernel.name)


def mixtures(dim, dtype):
    v = torch.empty(8, 56, 56, 3, 2, dim, dtype=dtype, device="meta")[:, :, :, 2]
    weights = torch.empty(8, 56, 56, 2, 9, dtype=dtype, device="meta")
    mixture.launch_forward(weights, v, torch.empty(v.shape, dtype=dtype, device="meta"), [3, 3])
    mixture.launch_backward(weights, v, v, weights, v, [3, 3])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixtures_keep_their_tiles_in_registers(compile_for, dtype, capability):
    found = compile_for(capability, mixtures, 24, dtype)
    assert {kernel.name for kernel in found} == {"mixture_forward_kernel", "mixture_backward_kernel"}
    for kernel in found:
        assert kernel.stack_bytes == 0, (kernel.name, kernel.registers)
