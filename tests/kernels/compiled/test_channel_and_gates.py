"""Channel attention's and the gates' kernels as compiled for GPUs that are not there: no spills, wide copies."""

import pytest
import torch
from of_triton import OLD

from foveate.kernels import channel
from foveate.kernels.gates import channel_gate, strip_gate

every_capability = pytest.mark.parametrize("capability", [80, 90])


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def channel_attention(dim, dtype, tokens_last):
    """All kernels of forward and backward, on DaViT's first stage."""
    shape = (8, 3, dim, 56, 56) if tokens_last else (8, 56, 56, 3, dim)
    q, k, v = (meta(*shape, dtype=dtype) for _ in range(3))
    if tokens_last:
        q, k, v = (x.permute(0, 3, 4, 1, 2) for x in (q, k, v))
    probs = channel.launch_softmax(channel.launch_product(q, k), 1.0)
    channel.launch_mixture(v, probs, meta(8, 56, 56, 3, dim, dtype=dtype))
    channel.launch_softmax_grad(channel.launch_product(q, v), probs)
    channel.launch_mixture(k, probs, q, 1.0, back=True)


@every_capability
@pytest.mark.parametrize("tokens_last", [False, True], ids=["packed", "channels before tokens"])
@pytest.mark.parametrize("dim", [32, 64])
def test_channel_attention_is_on_tensor_cores_without_spills(
    compile_for, shared_limit_bytes, dim, tokens_last, capability
):
    kernels = compile_for(capability, channel_attention, dim, torch.bfloat16, tokens_last)
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel.stack_bytes == 0, kernel.name
        assert kernel.shared_bytes <= shared_limit_bytes[capability] // 2, kernel.name
        if "softmax" not in kernel.name:
            assert kernel.count("wgmma.mma_async|mma.sync") > 0, kernel.name
        if "product" in kernel.name:
            assert kernel.count(r"cp\.async") > 0, kernel.name


@every_capability
@pytest.mark.parametrize("dim", [32, 128])
def test_float32_channel_attention_fits(compile_for, shared_limit_bytes, dim, capability):
    for kernel in compile_for(capability, channel_attention, dim, torch.float32, False):
        assert kernel.shared_bytes <= shared_limit_bytes[capability], kernel.name
        assert kernel.stack_bytes == 0 or dim == 128, kernel.name


def gates(x, weight):
    """Forward and backward of both gates, but for what torch does."""
    tiles = channel_gate.tiles_of(x)
    sums = channel_gate.launch_sums(x, None, tiles)
    channel_gate.launch_gate(x, sums, weight, None, x, tiles)
    dz, _ = channel_gate.launch_logits_grad(x, sums, channel_gate.launch_sums(x, x, tiles), weight)
    channel_gate.launch_gate(x, sums, weight, dz, x, tiles)
    strips = strip_gate.launch_sums(x)
    strip_gate.launch_gate(x, strips, None, x)
    strip_gate.launch_gate(x, strips, strip_gate.launch_sums(x, x, strips), x)


@every_capability
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels last"])
def test_gates_read_16_bytes_at_a_time_without_spills(compile_for, layout, capability):
    x = meta(8, 256, 56, 56).to(memory_format=layout)
    kernels = compile_for(capability, gates, x, meta(1, 1, 5))
    assert len(kernels) == 9
    for kernel in kernels:
        assert kernel.stack_bytes == 0 and kernel.registers <= (150 if OLD else 128), (kernel.name, kernel.registers)
        if kernel.name in ("sums_kernel", "gate_kernel"):
            assert kernel.count(r"ld\.global\.v[48]") > 0, kernel.name
