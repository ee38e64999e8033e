"""Local attention's kernels as machine code for sm_80 and sm_90: registers, memory, instructions of the main loop."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from of_triton import OLD, instructions, stack_bytes

from foveate.benchmarks._machine_code import Compiled
from foveate.benchmarks.gpu_first_hour.sweep import Setting, forced
from foveate.kernels.local import launch as local
from foveate.kernels.local.halo_logits import halo_logits, halo_logits_backward, places
from foveate.kernels.local.plan import Pattern


@dataclass(frozen=True)
class Case:
    """A call at the shape of a published model; `table` gives it a bias or relative logits."""

    pattern: Pattern
    size: tuple[int, int]
    heads: int
    table: bool


CASES = {
    "neighborhood": Case(Pattern("neighborhood", (7, 7)), (56, 56), 2, False),
    "neighborhood, bias": Case(Pattern("neighborhood", (7, 7)), (56, 56), 2, True),
    "window": Case(Pattern("block", (7, 7)), (56, 56), 3, False),
    "window, bias": Case(Pattern("block", (7, 7)), (56, 56), 3, True),
    "window, shift, bias": Case(Pattern("block", (7, 7), shift=(3, 3)), (56, 56), 3, True),
    "one map, bias": Case(Pattern("neighborhood", (7, 7)), (7, 7), 16, True),
    "halo": Case(Pattern("block", (8, 8), (3, 3)), (64, 64), 4, False),
    "halo, relative": Case(Pattern("block", (8, 8), (3, 3)), (64, 64), 4, True),
    "circle": Case(Pattern("circle", (8, 8), (7, 7)), (64, 64), 4, False),
}
KERNELS = ("forward", "dq", "dkv", "dbias")


class Call:
    """One call on meta tensors: inputs, results, and the launch of each of its kernels."""

    def __init__(self, case: Case, dim: int, dtype: torch.dtype) -> None:
        self.case, pattern = case, case.pattern
        self.halo = case.table and pattern.reach != (0, 0)
        packed = torch.empty(128, *case.size, 3, case.heads, dim, dtype=dtype, device="meta")
        self.q, self.k, self.v = packed.unbind(3)
        self.bias = self.rel = None
        if self.halo:
            windows = [k + 2 * r for k, r in zip(pattern.keys, pattern.reach, strict=True)]
            self.tables = tuple(torch.empty(2 * w - 1, dim, device="meta") for w in windows)
            self.rel = self.q.new_empty(*self.q.shape[:4], 2 * places(tuple(windows)))
        elif case.table:
            rows, cols = pattern.keys
            cells = (rows * cols) ** 2 if pattern.kind == "block" else (2 * rows - 1) * (2 * cols - 1)
            self.bias = torch.empty(case.heads, cells, device="meta")
        tables = (self.bias is not None, self.rel is not None)
        self.launch = local.Launch(self.q, self.k, self.v, pattern, dim**-0.5, *tables)
        self.out, self.lse = local.empty_results(self.q, self.v)

    def run(self, kernel: str) -> None:
        q, k, v, out, lse = self.q, self.k, self.v, self.out, self.lse
        tables = (self.bias, self.rel)
        if kernel == "forward":
            local.launch_forward(self.launch, q, k, v, *tables, out, lse)
        elif kernel == "dq":
            local.launch_dq(self.launch, q, k, v, *tables, out, out, lse, out, self.rel, lse)
        elif kernel == "dkv":
            local.launch_dkv(self.launch, q, k, v, *tables, out, lse, lse, out, out)
        elif kernel == "dbias":
            local.launch_dbias(self.launch, q, k, v, self.bias, out, lse, lse, self.bias)
        else:
            grads = (q, k, v) if kernel == "packed backward" else (out, out, out)
            local.launch_one_pass(self.launch, q, k, v, self.bias, out, out, lse, *grads, self.bias)


def compile_local(compile_for, capability: int, launch: Callable[..., None], *arguments) -> Compiled:
    """The kernel that moves the maps, of those that a launcher launches: bias tables have kernels of their own."""
    (found,) = (k for k in compile_for(capability, launch, *arguments) if k.name.startswith("local_"))
    return found


# Machine instructions a computed logit in the main loop, over all threads, bf16: a little more than triton 3.8 gives,
# as ((sm_80, sm_90) at head_dim 32, (sm_80, sm_90) at head_dim 64). Smaller tiles take more, and compute fewer logits.
BOUNDS = {
    ("neighborhood", "forward"): ((17, 16), (16, 14)),
    ("neighborhood", "dq"): ((15, 14), (17, 13)),
    ("neighborhood", "dkv"): ((18, 17), (21, 15)),
    ("neighborhood, bias", "forward"): ((18, 18), (18, 16)),
    ("neighborhood, bias", "dq"): ((16, 16), (20, 17)),
    ("neighborhood, bias", "dkv"): ((18, 19), (26, 21)),
    ("neighborhood, bias", "dbias"): ((24, 24), (26, 28)),
    ("window, bias", "dq"): ((14, 13), (20, 17)),
    ("window, bias", "dkv"): ((17, 16), (26, 21)),
    ("window, bias", "dbias"): ((21, 25), (27, 29)),
    ("halo", "forward"): ((13, 12), (16, 14)),
    ("halo", "dq"): ((12, 11), (17, 13)),
    ("halo", "dkv"): ((15, 13), (21, 15)),
    ("halo, relative", "forward"): ((16, 15), (20, 17)),
    ("halo, relative", "dq"): ((16, 14), (22, 21)),
    ("halo, relative", "dkv"): ((19, 18), (32, 28)),
    ("circle", "forward"): ((18, 19), (21, 19)),
    ("circle", "dq"): ((18, 16), (23, 18)),
    ("circle", "dkv"): ((26, 24), (30, 24)),
}
# Kernels whose tiles see only themselves: instructions a logit in the loop, on (sm_80, sm_90), by case and head_dim.
ONE_PASS = {
    ("window", "forward", 32): (19, 19.5),
    ("window", "backward", 32): (26, 24),
    ("window", "forward", 64): (24.5, 24),
    ("window", "backward", 64): (39, 31),
    ("window, bias", "forward", 32): (19, 19.5),
    ("window, bias", "backward", 32): (26.5, 23),
    ("window, shift, bias", "forward", 32): (21, 22),
    ("window, shift, bias", "backward", 32): (28.5, 25.5),
    ("one map, bias", "forward", 32): (15.5, 15.5),
    ("one map, bias", "backward", 32): (24.5, 20.5),
}
PACKED = [(name, "packed backward", dim) for name, kernel, dim in ONE_PASS if kernel == "backward"]
# Words kept on the stack around the loop, none touched inside it, in bytes: (case, kernel, head_dim, capability).
AROUND_THE_LOOP = {("halo, relative", "dkv", 32, 80): 8, ("neighborhood, bias", "dkv", 32, 90): 8}
FIRST = [key for key in BOUNDS if key[0] in ("neighborhood, bias", "halo, relative")]
REST = [key for key in BOUNDS if key not in FIRST]


def broken_bounds(compile_for, shared_limit_bytes, name, kernel, capability, dim) -> dict[str, object]:
    """What one kernel exceeds or lacks, with the value found; empty where all bounds hold."""
    call = Call(CASES[name], dim, torch.bfloat16)
    found = compile_local(compile_for, capability, call.run, kernel)
    plan = call.launch.of(kernel).plan
    logits, one_turn = plan.owners * plan.walked, plan.steps == 1 and kernel != "dbias" and "bias" not in name
    per_logit = found.loop_instructions_per(logits)
    exponentials = sum(op.startswith("MUFU.EX2") for op in found.loops[0])
    rows = 2 if kernel == "forward" else 0  # a thread holds pieces of two rows; each is rescaled once
    wide = capability == 90 and plan.owners == 64  # what a warpgroup's product takes
    around = AROUND_THE_LOOP.get((name, kernel, dim, capability), 0)
    bound = BOUNDS[name, kernel][dim // 64][capability // 90]
    holds = {
        "spills in the loop": (found.loop_spills(), found.loop_spills() == []),
        "stack": (found.stack_bytes, found.stack_bytes <= stack_bytes(around)),
        # two blocks on a multiprocessor
        "shared memory": (found.shared_bytes, found.shared_bytes <= shared_limit_bytes[capability] // 2),
        "asynchronous copies": (found.count(r"cp\.async"), (found.count(r"cp\.async") > 0) != one_turn),
        "warps": (found.warps, found.warps == plan.owners // 16),
        "wgmma": (capability, (found.count(r"wgmma\.mma_async") > 0) == wide),
        "exponentials": (exponentials, exponentials == logits // (32 * found.warps) + rows),
        "instructions a logit": (per_logit, per_logit <= instructions(bound)),
    }
    return {bound: value for bound, (value, held) in holds.items() if not held}


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "kernel"), FIRST)
def test_the_loop_is_short_and_does_not_spill(compile_for, shared_limit_bytes, name, kernel, capability, dim):
    assert broken_bounds(compile_for, shared_limit_bytes, name, kernel, capability, dim) == {}


@pytest.mark.parametrize("capability", [80, 90])
def test_strides_and_gradients_of_log_sum_exps_stay_out_of_the_loop(compile_for, capability):
    pattern = Pattern("neighborhood", (7, 7), stride=(3, 2), causal=(False, True))
    call = Call(Case(pattern, (56, 56), 2, False), 32, torch.bfloat16)
    q, k, v, out, lse = call.q, call.k, call.v, call.out, call.lse

    def launch_dq():
        local.launch_dq(call.launch, q, k, v, None, None, out, out, lse, out, None, lse, grad_lse=lse)

    for kernel, launch in {"dq": launch_dq, "dkv": lambda: call.run("dkv")}.items():
        found, plan = compile_for(capability, launch)[-1], call.launch.of(kernel).plan
        bound = BOUNDS["neighborhood", kernel][0][capability // 90]
        assert found.loop_instructions_per(plan.owners * plan.walked) <= instructions(bound)
        assert found.stack_bytes <= stack_bytes()


@pytest.mark.parametrize(
    ("setting", "bound"),
    [
        (Setting((4, 8), (2, 16), 2, 1), "asynchronous copies"),
        (Setting((8, 8), (8, 16), 4, 3), "shared memory" if OLD else "stack"),
        (Setting((4, 8), (1, 16), 2, 3), "instructions a logit"),
    ],
    ids=["one stage", "tiles too large", "tiles too small"],
)
def test_a_worse_launch_shape_breaks_a_bound(compile_for, shared_limit_bytes, setting, bound):
    with forced(setting):
        assert bound in broken_bounds(compile_for, shared_limit_bytes, "neighborhood, bias", "dq", 80, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "kernel"), REST)
def test_the_other_loops_too(compile_for, shared_limit_bytes, name, kernel, capability, dim):
    assert broken_bounds(compile_for, shared_limit_bytes, name, kernel, capability, dim) == {}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv", "dbias"])
def test_other_dtypes_compile_within_shared_memory(compile_for, shared_limit_bytes, kernel, dtype, capability):
    call = Call(CASES["neighborhood, bias"], 32, dtype)
    found = compile_local(compile_for, capability, call.run, kernel)
    assert found.shared_bytes <= shared_limit_bytes[capability]
    if dtype == torch.float16:
        assert found.loop_spills() == [] and found.stack_bytes <= 8
        assert found.count(r"wgmma\.mma_async|mma\.sync") > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv", "dbias"])
@pytest.mark.parametrize("dim", [16, 24, 128])
def test_other_head_dims_compile_within_shared_memory(compile_for, shared_limit_bytes, dim, kernel, capability):
    found = compile_local(compile_for, capability, Call(CASES["neighborhood, bias"], dim, torch.bfloat16).run, kernel)
    assert found.shared_bytes <= shared_limit_bytes[capability]
    assert found.loop_spills() == []


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "kernel", "dim"), [*ONE_PASS, *PACKED])
def test_the_one_pass_kernels_are_short_and_do_not_spill(
    compile_for, shared_limit_bytes, name, kernel, dim, capability
):
    found = compile_local(compile_for, capability, Call(CASES[name], dim, torch.bfloat16).run, kernel)
    way = kernel.removeprefix("packed ")
    assert found.name == {"forward": "local_closed_forward_kernel", "backward": "local_backward_kernel"}[way]
    assert found.loop_spills() == [] and found.stack_bytes == 0
    assert found.loop_instructions_per(64 * 64) <= ONE_PASS[name, way, dim][capability // 90]
    assert found.shared_bytes <= shared_limit_bytes[86] and found.blocks_of_sm >= 2
    assert sum(op.startswith("MUFU.EX2") for op in found.loops[0]) == 64 * 64 // 128


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["neighborhood, bias", "window, bias"])
def test_the_kernels_of_bias_tables_keep_all_in_registers(compile_for, name, capability):
    call = Call(CASES[name], 32, torch.bfloat16)
    found = {k.name: k for kernel in ("dq", "dkv", "dbias") for k in compile_for(capability, call.run, kernel)}
    assert {"bias_tiles_kernel", "table_gradient_kernel"} <= set(found)
    assert all(found[k].loop_spills() == [] for k in ("bias_tiles_kernel", "table_gradient_kernel"))


# Instructions a logit, without a bias, where 8 but not 16 divides the head_dim, as in pruned nets: (sm_80, sm_90)
ODD_WIDTHS = {
    (24, "forward"): (17, 16),
    (24, "dq"): (15, 14.5),
    (24, "dkv"): (18.5, 17.5),
    (40, "forward"): (16, 14),
    (72, "forward"): (27.5, 16),
    (72, "dq"): (23, 14),
    (72, "dkv"): (33.5, 20.5),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dim", "kernel"), ODD_WIDTHS)
def test_heads_of_8_times_an_odd_number_of_channels_are_loaded_in_vectors(compile_for, dim, kernel, capability):
    call = Call(CASES["neighborhood"], dim, torch.bfloat16)
    found, plan = compile_local(compile_for, capability, call.run, kernel), call.launch.of(kernel).plan
    assert found.count(r"cp\.async\.c[ga]") > 0 and found.loop_spills() == []
    bound = ODD_WIDTHS[dim, kernel][capability // 90]
    assert found.loop_instructions_per(plan.owners * plan.walked) <= instructions(bound)


# float32 with all its digits: instructions a logit, on (sm_80: FMA, sm_90)
FULL_PRECISION = {
    ("neighborhood", "forward", 32): (112, 107),
    ("neighborhood", "forward", 64): (190, 106),
    ("neighborhood", "dkv", 64): (340, 146),
    ("halo", "forward", 32): (110, 82),
    ("halo", "dkv", 64): (340, 180),
    ("window, bias", "dq", 64): (260, 141),
    ("window, bias", "dbias", 64): (235, 220),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "kernel", "dim"), FULL_PRECISION, ids=str)
def test_float32_takes_tensor_cores_of_sm_90_where_they_save_instructions(
    compile_for, monkeypatch, name, kernel, dim, capability
):
    monkeypatch.setattr(local, "compute_capability", lambda _: divmod(capability, 10))
    call = Call(CASES[name], dim, torch.float32)
    found, plan = compile_local(compile_for, capability, call.run, kernel), call.launch.of(kernel).plan
    on_tensor_cores = capability == 90 and kernel != "dbias" and (dim > 32 or plan.owners == 64)
    assert (found.count(r"wgmma\.mma_async|mma\.sync") > 0) == on_tensor_cores
    fits = not (OLD and kernel == "dkv" and capability == 80)  # by FMA, which needs most registers
    assert (found.loop_spills() == []) == fits
    bound = FULL_PRECISION[name, kernel, dim][capability // 90]
    assert found.loop_instructions_per(plan.owners * plan.walked) <= instructions(bound)


# Head_dims of 65 to 128 need most shared memory; sm_86, sm_89 and sm_120 give a block 99 KB.
AT_RISK = [
    ("neighborhood", "dq", torch.bfloat16),
    ("neighborhood, bias", "forward", torch.bfloat16),
    ("neighborhood, bias", "dkv", torch.bfloat16),
    ("window, bias", "dbias", torch.bfloat16),
    ("halo, relative", "dq", torch.float32),
]


@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize(("name", "kernel", "dtype"), AT_RISK, ids=str)
def test_wide_heads_fit_the_smallest_shared_memory(compile_for, shared_limit_bytes, name, kernel, dtype, capability):
    found = compile_local(compile_for, capability, Call(CASES[name], 128, dtype).run, kernel)
    assert found.shared_bytes <= shared_limit_bytes[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_fits_the_smallest_shared_memory(compile_for, shared_limit_bytes, name, dim, dtype, capability):
    call, limit = Call(CASES[name], dim, dtype), shared_limit_bytes[capability]
    kernels = ["forward", "dq", "dkv"] + ["dbias"] * (call.bias is not None)
    kernels += ["backward"] * (local.plan_one_pass("backward", call.launch.sizes) is not None)
    found = {kernel: compile_local(compile_for, capability, call.run, kernel).shared_bytes for kernel in kernels}
    assert {kernel: size for kernel, size in found.items() if size > limit} == {}


@pytest.mark.parametrize(("wanted", "tensor_cores"), [("high", True), ("highest", False)])
def test_tf32_is_used_where_the_user_allows_it(compile_for, wanted, tensor_cores):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    found = compile_for(80, Call(CASES["neighborhood"], 32, torch.float32).run, "forward")[-1]
    torch.set_float32_matmul_precision(before)
    assert (found.count(r"mma\.sync\S*tf32") > 0) == tensor_cores


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_of_relative_logits_neither_spill_nor_leave_tensor_cores(compile_for, capability):
    call = Call(CASES["halo, relative"], 32, torch.bfloat16)
    per = call.case.pattern.keys

    def launch():
        halo_logits(call.q, call.tables, per, "ieee")
        halo_logits_backward(call.q, call.tables, call.rel, call.out, per, "ieee")

    found = {kernel.name: kernel for kernel in compile_for(capability, launch)}
    assert set(found) == {"halo_logits_kernel", "halo_dq_kernel", "halo_table_kernel"}
    for kernel in found.values():
        assert kernel.stack_bytes == 0 and kernel.count(r"wgmma\.mma_async|mma\.sync") > 0
