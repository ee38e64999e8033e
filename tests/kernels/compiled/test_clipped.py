"""The kernels of clipped and reversed attention as compiled for GPUs that are not there: no spills, tensor cores."""

import pytest
import torch

from foveate.kernels.clipped.launch import Launch, launch_dkv, launch_dq, launch_forward


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(dim, dtype, windows, everything):
    """Forward and backward, on a layer of windows or of a ViT."""
    size = (8, 56, 56, 3, dim) if windows else (8, 1, 197, 6, dim)
    q, k, v, grad = (meta(*size, dtype=dtype) for _ in range(4))
    lse = meta(size[0], size[3], *size[1:3], dtype=torch.float32)
    gate = meta(*size[:4], dtype=dtype) if everything else None
    bits = meta(8, 6, 197, 7, dtype=torch.int32) if everything and not windows else None
    one = Launch(q, k, v, (7, 7) if windows else (), (3, 3) if windows else (0, 0), (-0.003, 1.0), gate, bits, 0.1)
    launch_forward(one, q, k, v, gate, bits, torch.empty_like(q), lse)
    launch_dq(one, q, k, v, gate, bits, grad, lse, torch.empty_like(q), None if gate is None else lse, lse)
    launch_dkv(one, q, k, v, gate, bits, grad, lse, lse, torch.empty_like(k), torch.empty_like(v))


SLOW = [(64, False, False), (32, False, True), (64, True, True)]
every_layer = pytest.mark.parametrize(
    ("dim", "windows", "everything", "capability"),
    [
        (32, True, True, 90),
        (64, False, True, 80),
        pytest.param(64, False, True, 90, marks=pytest.mark.slow),
        *(pytest.param(*layer, capability, marks=pytest.mark.slow) for layer in SLOW for capability in (80, 90)),
    ],
)


@every_layer
def test_16_bit_kernels_are_on_tensor_cores_without_spills(
    compile_for, shared_limit_bytes, dim, windows, everything, capability
):
    kernels = compile_for(capability, attention, dim, torch.bfloat16, windows, everything)
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.loop_spills() == [] and kernel.stack_bytes <= 32, (kernel.name, kernel.stack_bytes)
        assert kernel.shared_bytes <= shared_limit_bytes[capability] // 2, (kernel.name, kernel.shared_bytes)
        assert kernel.count("wgmma.mma_async|mma.sync") > 0, kernel.name


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (128, torch.bfloat16), (128, torch.float32)])
def test_wide_heads_and_float32_fit(compile_for, shared_limit_bytes, dim, dtype, capability):
    for kernel in compile_for(capability, attention, dim, dtype, False, True):
        assert kernel.shared_bytes <= shared_limit_bytes[capability], (kernel.name, kernel.shared_bytes)
