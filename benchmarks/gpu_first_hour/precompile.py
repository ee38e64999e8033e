"""Compile the kernels of parts a and c in parallel processes that see no GPU, into Triton's cache on disk.

A worker calls the launchers with meta tensors: launch shapes and constants are those of the real call, and the launch
stops when the kernel is compiled.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType

import torch
from torch.library import CustomOpDef

from ..._torch import body_of
from .._machine_code import active_driver, fake_gpu
from .cases import full_cases
from .session import say
from .sweep import Tensors, forced, jobs

MOST_WORKERS = 12
WAIT_SECONDS = 100.0


def start_workers(module: str, batch: int) -> list[subprocess.Popen]:
    """Start the workers for the GPU of this process; each compiles its share of the kernels."""
    major, minor = torch.cuda.get_device_capability()
    count = max(1, min(MOST_WORKERS, (os.cpu_count() or 4) - 3))
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, "--worker", f"{i}/{count}/{10 * major + minor}", "--batch", str(batch)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        for i in range(count)
    ]


def wait_for(workers: list[subprocess.Popen], seconds: float) -> None:
    """Wait for all workers, then stop those that are not done: the first call compiles what is missing."""
    deadline = time.perf_counter() + seconds
    for worker in workers:
        try:
            worker.wait(timeout=max(1.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.terminate()
    say(f"   [kernels compiled in {len(workers)} processes]")


def work(share: str, batch: int) -> int:
    """Compile the share "index/of/capability" of the kernels; return how many calls failed."""
    index, of, capability = map(int, share.split("/"))
    compile_only(capability)
    run_backward_after_forward()
    done = failed = 0
    for number, compile_one in enumerate(_calls(batch)):
        if number % of != index:
            continue
        try:
            compile_one()
            done += 1
        except Exception:
            traceback.print_exc(limit=-3)
            failed += 1
    print(f"worker {index}: {done} calls compiled, {failed} failed")
    return failed


def _calls(batch: int) -> list[Callable[[], object]]:
    def call(case):
        made = case.make("meta")
        made.ours(made.leaves)

    def launch(layer, kernel, setting):
        with forced(setting):
            Tensors(layer, batch, "meta", torch.bfloat16).run(kernel)

    calls = [lambda case=case: call(case) for case in full_cases()]
    for layer, kernel, settings in jobs(small=False):
        calls += [lambda one=(layer, kernel, setting): launch(*one) for setting in settings]
    return calls


def compile_only(capability: int) -> None:
    """Let Triton compile for a GPU that this process does not see, and launch nothing."""
    from triton.runtime.jit import JITFunction

    from ...attention_ops import _checks

    setattr(*active_driver(), fake_gpu(capability))
    plain = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: plain(self, *args, grid=grid, warmup=True, **kwargs)
    _checks.why_no_triton = lambda x: None  # meta tensors count as a GPU's


def run_backward_after_forward() -> None:
    """Replace the kernels' ops by their own Python, forward and then backward: meta tensors record no graph."""
    from ...kernels import channel
    from ...kernels.clipped import launch as clipped
    from ...kernels.gates import channel_gate, large_kernel, strip_gate
    from ...kernels.local import launch as local
    from ...kernels.routed import backward as routed_backward
    from ...kernels.routed import forward as routed

    def replace(module: ModuleType, call: str, op: CustomOpDef, backward: Callable[..., object] | None = None) -> None:
        def both(*inputs):
            results = body_of(op)(*inputs)
            if backward is not None:
                out, *kept = results
                backward(inputs, out, kept, out.new_empty(out.shape))
            return results

        setattr(module, call, both)

    def local_backward(inputs, out, kept, grad):
        body_of(local._backward)(*inputs[:6], out, *kept, grad, None, inputs[3] is not None, *inputs[6:])

    replace(local, "call_forward", local._forward, local_backward)
    replace(
        routed,
        "routed_attention",
        routed.routed_attention_forward,
        lambda i, out, kept, grad: body_of(routed_backward.routed_attention_backward)(*i[:4], out, *kept, grad, *i[4:]),
    )
    replace(
        channel,
        "channel_attention",
        channel.channel_attention_forward,
        lambda i, out, kept, grad: body_of(channel.channel_attention_backward)(*i[:3], *kept, grad, i[3]),
    )
    replace(
        channel_gate,
        "channel_gate",
        channel_gate.channel_gate_forward,
        lambda i, out, kept, grad: body_of(channel_gate.channel_gate_backward)(*i, *kept, grad),
    )
    replace(
        strip_gate,
        "strip_gate",
        strip_gate.strip_gate_forward,
        lambda i, out, kept, grad: body_of(strip_gate.strip_gate_backward)(*i[:4], *kept, grad, *i[4:]),
    )
    replace(
        large_kernel,
        "call_forward",
        large_kernel.large_kernel_attention_forward,
        lambda i, out, kept, grad: body_of(large_kernel.large_kernel_attention_backward)(*i[:7], *kept, grad, i[7]),
    )
    replace(
        clipped,
        "call_forward",
        clipped._forward,
        lambda i, out, kept, grad: body_of(clipped._backward)(*i[:5], *kept, grad, *i[5:]),
    )
    replace(
        clipped,
        "call_reversed",
        clipped._reversed,
        lambda i, out, kept, grad: body_of(clipped._reversed_backward)(*i[:4], *kept, grad, i[4]),
    )
