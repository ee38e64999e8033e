"""Large kernel attention's kernels as compiled for GPUs that are not there: no spills, tensor cores, short loops."""

import pytest
import torch

from foveate.kernels.gates import depthwise, large_kernel
from foveate.kernels.gates.plan import SPAN, TAPS

SIDES = {32: 56, 64: 56, 160: 14, 512: 7}  # of VAN's maps, by channels
every_capability = pytest.mark.parametrize("capability", [80, 90])


def launch(channels, dtype):
    """All kernels of a forward and a backward pass."""
    shapes = [(channels, 1, 5, 5), (channels, 1, 7, 7), (channels, channels, 1, 1), (channels,)]
    local, dilated, point, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    side = SIDES[channels]
    x = torch.empty(8, channels, side, side, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    depthwise.launch_depthwise(x, local, bias, 1, x)
    depthwise.launch_depthwise(x, dilated, bias, 3, x)
    large_kernel.launch_gate(x, x, point, bias, x)
    large_kernel.launch_gate_grad(x, x, point, bias, x, x, x, x)
    depthwise.launch_depthwise(x, dilated, None, 3, x, back=True, sums=True)
    depthwise.launch_depthwise(x, local, None, 1, x, addend=x, back=True)
    depthwise.launch_taps_grad(x, x, (7, 7), 3)
    depthwise.launch_taps_grad(x, x, (5, 5), 1)


@every_capability
@pytest.mark.parametrize("channels", [64, 160, *(pytest.param(c, marks=pytest.mark.slow) for c in (32, 512))])
def test_16_bit_maps_are_read_16_bytes_at_a_time_without_spills(compile_for, shared_limit_bytes, channels, capability):
    for kernel in compile_for(capability, launch, channels, torch.bfloat16):
        what = (kernel.name, kernel.registers, kernel.shared_bytes)
        assert kernel.stack_bytes == 0 and kernel.loop_spills() == [], what
        assert kernel.shared_bytes <= shared_limit_bytes[86], what
        assert kernel.count(r"ld\.global\.v[48]|cp\.async") > 0, what
        if "gate" in kernel.name:
            assert kernel.count(r"wgmma\.mma_async|mma\.sync") > 0, what


@every_capability
def test_a_tap_costs_few_instructions(compile_for, capability):
    """For each thread and channel: 1.7 in a convolution, 2 in the gradient of its taps (measured)."""
    kernels = {}
    for kernel in compile_for(capability, launch, 64, torch.bfloat16):
        kernels.setdefault((kernel.name, kernel.constants["DILATION"] if "DILATION" in kernel.constants else 0), kernel)
    row_of_taps = kernels["depthwise_kernel", 3].loops[0]
    assert len(row_of_taps) <= 1.9 * 7 * SPAN * 8
    four_columns = sorted(kernels["taps_grad_kernel", 3].loops, key=len)[-2]
    assert len(four_columns) <= 2.1 * 4 * TAPS * 8


@pytest.mark.slow
@every_capability
@pytest.mark.parametrize("channels", [64, 512])
def test_float32_maps_fit(compile_for, shared_limit_bytes, channels, capability):
    for kernel in compile_for(capability, launch, channels, torch.float32):
        assert kernel.shared_bytes <= shared_limit_bytes[86] and kernel.loop_spills() == [], kernel.name
