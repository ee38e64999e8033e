"""Large kernel attention's kernel as compiled for GPUs that are not there: no spills, tensor cores, wide loads."""

import pytest
import torch

from foveate.kernels.gates.large_kernel import launch_dilated_gate
from foveate.kernels.gates.plan import large_kernel_tiles


def launch(channels, dtype):
    shapes = [(channels, 1, 7, 7), (channels,), (channels, channels, 1, 1), (channels,)]
    weights = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    x = torch.empty(8, channels, 28, 28, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    launch_dilated_gate(x, x, *weights, 3, x)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [32, 64, 160, 512])  # of VAN's stages
def test_16_bit_maps_are_read_16_bytes_at_a_time_without_spills(compile_for, shared_limit_bytes, channels, capability):
    (kernel,) = compile_for(capability, launch, channels, torch.bfloat16)
    assert kernel.stack_bytes == 0 and kernel.loop_spills() == [], kernel.registers
    assert kernel.shared_bytes <= shared_limit_bytes[capability]
    assert kernel.count(r"wgmma\.mma_async|mma\.sync") > 0
    assert kernel.count(r"ld\.global\.v[48]|cp\.async") > 0


@pytest.mark.parametrize("capability", [80, 90])
def test_a_tap_costs_few_instructions(compile_for, capability):
    (kernel,) = compile_for(capability, launch, 64, torch.bfloat16)
    pixels, step, _, _ = large_kernel_tiles(64, 2)
    for_a_tap = len(kernel.loops[-1]) * 32 * kernel.warps / (pixels * step * 7)  # the innermost loop: a row of taps
    assert for_a_tap <= 4.5  # measured 4.2


@pytest.mark.parametrize("capability", [80, 90])
def test_float32_maps_fit(compile_for, shared_limit_bytes, capability):
    for channels in (64, 512):
        (kernel,) = compile_for(capability, launch, channels, torch.float32)
        assert kernel.shared_bytes <= shared_limit_bytes[capability] and kernel.loop_spills() == []
