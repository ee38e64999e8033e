"""Routed attention's kernels as compiled for GPUs that are not there: no spills, tensor cores, short loops."""

import pytest
import torch
from of_triton import instructions

from foveate.kernels.routed.backward import launch_keys, launch_queries
from foveate.kernels.routed.forward import launch_forward
from foveate.kernels.routed.inverse import invert_routes
from foveate.kernels.routed.invert import launch_inverse
from foveate.kernels.routed.plan import MOST_REGIONS, Regions, region_tiles
from foveate.kernels.routed.routes import launch_routes

# BiFormer at 224 px, but for stage 1, whose topk 1 needs no loop: map, region, heads, head_dim, topk.
# Then instructions for a logit: what was measured, and a little more.
STAGES = {
    "stage 1, topk 4": ((56, 56), (8, 8), 2, 32, 4, 13),
    "stage 2": ((28, 28), (4, 4), 4, 32, 4, 17),
    "stage 3": ((14, 14), (2, 2), 8, 32, 16, 18),
    "regions of 49": ((49, 49), (7, 7), 2, 32, 4, 15),
    "head_dim 64": ((56, 56), (8, 8), 1, 64, 4, 17),
}


def launch(size, region, heads, dim, topk, dtype, batch=8):
    """All three kernels, and the sums of long lists, on meta tensors."""
    q, k, v = torch.empty(batch, *size, 3, heads, dim, dtype=dtype, device="meta").unbind(3)
    cut = Regions((size[0] // region[0], size[1] // region[1]), region, region)
    routes = torch.empty(batch, cut.count, topk, dtype=torch.int64, device="meta")
    out = torch.empty(q.shape, dtype=dtype, device="meta")
    lse = torch.empty(batch, heads, cut.count, cut.queries, device="meta")
    lists = invert_routes(routes, cut.queries)
    sums = [torch.empty(max(lists.extras, 1), heads, cut.keys, dim, device="meta")] * 2
    launch_forward(q, k, v, routes, out, lse, cut, 1.0)
    launch_queries(q, k, v, routes, out, lse, out, lse, out, cut, 1.0)
    for extra in (True, False) if lists.extras else (False,):
        launch_keys(q, k, v, lists, lse, out, lse, out, out, sums, cut, 1.0, extra)
    return cut


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_16_bit_loops_are_short_and_on_tensor_cores(compile_for, shared_limit_bytes, stage, capability):
    *shape, bound = stage
    rows, columns, warps = region_tiles(shape[1][0] * shape[1][1], 10**6, 2)
    for kernel in compile_for(capability, launch, *shape, torch.bfloat16):
        logits = rows * columns if "keys" in kernel.name else rows * min(columns, tile_of_keys(shape))
        what = (kernel.name, kernel.registers, kernel.loop_instructions_per(logits))
        assert kernel.stack_bytes == 0 and kernel.loop_spills() == [], what
        assert kernel.shared_bytes <= shared_limit_bytes[capability] // 2, what  # two blocks on a multiprocessor
        assert kernel.warps == warps and kernel.count(r"cp\.async") > 0, what
        wide = capability == 90 and rows == 64  # what a warpgroup's product takes
        assert kernel.count(r"wgmma\.mma_async" if wide else r"mma\.sync") > 0, what
        more = 0.9 if shape[1] == (7, 7) else 0.25
        assert kernel.loop_instructions_per(logits) <= instructions(bound, more), what
        exponentials = sum(op.startswith("MUFU.EX2") for op in kernel.loops[0])
        assert exponentials * 32 * warps <= logits + 32 * warps * 4, what  # one for a logit, few for a row


def tile_of_keys(shape):
    _, (rows, cols), _, _, topk = shape
    return region_tiles(rows * cols, topk * rows * cols, 2)[1]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_float32_and_wide_heads_fit(compile_for, shared_limit_bytes, capability):
    for dim, dtype in ((32, torch.float32), (64, torch.float32), (128, torch.bfloat16), (128, torch.float32)):
        for kernel in compile_for(capability, launch, (56, 56), (8, 8), 1, dim, 4, dtype):
            assert kernel.shared_bytes <= shared_limit_bytes[capability], (dim, dtype, kernel.name)
            assert kernel.count("tf32" if dtype == torch.float32 else r"mma") > 0
            if dim == 32:
                assert kernel.loop_spills() == [], (dim, dtype, kernel.name)


def make_and_invert_routes(size, region, dim, topk):
    q, k, _ = torch.empty(8, *size, 3, dim, dtype=torch.bfloat16, device="meta").unbind(3)
    grid = (size[0] // region[0], size[1] // region[1])
    launch_inverse(launch_routes(q, k, grid, region, topk), region[0] * region[1])


@pytest.mark.parametrize("capability", [80, 90])
def test_routes_are_made_and_inverted_without_spills(compile_for, shared_limit_bytes, capability):
    for size, region, dim, topk in (((56, 56), (8, 8), 64, 1), ((14, 14), (2, 2), 256, 16)):
        kernels = compile_for(capability, make_and_invert_routes, size, region, dim, topk)
        assert [k.name for k in kernels] == ["region_means_kernel", "routes_kernel", "invert_routes_kernel"]
        for kernel in kernels:
            assert kernel.stack_bytes == 0 and kernel.loop_spills() == [], (kernel.name, kernel.registers)
            assert kernel.shared_bytes <= shared_limit_bytes[86] // 2, kernel.name
        assert kernels[0].count(r"ld\.global\.v[248]") > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_routes_of_the_most_regions_fit(compile_for, shared_limit_bytes, capability):
    assert MOST_REGIONS == 16 * 16
    q, k, _ = torch.empty(8, 32, 32, 3, 512, device="meta").unbind(3)
    kernels = compile_for(capability, launch_routes, q, k, (16, 16), (2, 2), 16)
    assert [kernel.loop_spills() for kernel in kernels] == [[], []]
    assert max(kernel.shared_bytes for kernel in kernels) <= shared_limit_bytes[capability]
