"""The gate itself: a kernel with a known loop, known copies and a known spill is described as what it is."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def sum_of_products_kernel(a_ptr, b_ptr, out_ptr, steps, SIDE: tl.constexpr):
    row, col = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for step in range(steps):
        tile = step * SIDE * SIDE + row * SIDE + col
        total += tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile))
    tl.store(out_ptr + row * SIDE + col, total)


def launch(side: int, warps: int) -> None:
    a, b = (torch.empty(100, side, side, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out = torch.empty(side, side, device="meta")
    sum_of_products_kernel[(1,)](a, b, out, 100, SIDE=side, num_warps=warps, num_stages=3)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_loop_of_products_is_seen(compile_for, shared_limit_bytes, capability):
    (kernel,) = compile_for(capability, launch, 64, 4)
    assert (kernel.name, kernel.capability, kernel.warps) == ("sum_of_products_kernel", capability, 4)
    assert kernel.stack_bytes == 0 and kernel.loop_spills() == []
    assert 2 * 64 * 64 * 2 <= kernel.shared_bytes <= shared_limit_bytes[capability]
    assert 0 < kernel.registers < 255
    assert kernel.count(r"cp\.async") > 0
    assert (kernel.count(r"wgmma\.mma_async") > 0) == (capability == 90)
    products = [op for op in kernel.loops[0] if op.startswith(("HMMA", "HGMMA"))]
    assert products and 0 < kernel.loop_instructions_per(64 * 64) < 20


def test_a_spill_is_seen(compile_for):
    (kernel,) = compile_for(80, launch, 256, 4)  # 512 accumulators a thread
    assert kernel.stack_bytes > 0 and kernel.loop_spills()
