"""Print what the Python of a call takes with a package, as JSON: a script that call_overhead.py runs.

    python _calls_of.py foveate

The package is the one of that name on the path, of whichever commit.
"""

import json
import sys
import time
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY, CALLS, ROUNDS = 90, 50, 15


def nothing(*args, **kwargs) -> None:
    """In place of the driver's launch, or of Triton's."""


def best_us(call) -> float:
    """The fastest of some rounds: other load only adds to it."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS)
    return min(rounds) * 1e6


def measure(op) -> dict[str, float]:
    """Microseconds of `op`, of q, k, v (B, H, W, heads, D): without gradients, with them, and with a backward pass."""
    packed = torch.empty(1, 14, 14, 3, 2, 32, dtype=torch.bfloat16)
    plain, grad = packed.unbind(3), torch.empty(1, 14, 14, 2, 32, dtype=torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in plain]
    taken = {}
    for launches, run in (("", JITFunction.run), ("without launches", nothing)):
        with mock.patch.object(JITFunction, "run", run):
            with torch.no_grad():
                taken["without gradients", launches] = best_us(lambda: op(*plain))
            taken["with gradients", launches] = best_us(lambda: op(*leaves))
            taken["and backward", launches] = best_us(lambda: torch.autograd.grad(op(*leaves), leaves, grad))
    return {", ".join(filter(None, key)): value for key, value in taken.items()}


def main() -> None:
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
        get_current_device=lambda: CAPABILITY,
        get_current_stream=lambda device: 0,
    )
    setattr(driver, "_active" if hasattr(driver, "_active") else "active", gpu)
    CompiledKernel.run = property(lambda self: nothing)
    CompiledKernel.launch_metadata = nothing
    package = sys.argv[1]
    ops = import_module(f"{package}.attention_ops")
    for name, module in list(sys.modules.items()):  # kernels take the tensors of a CPU
        if name.startswith(f"{package}.") and hasattr(module, "why_no_triton"):
            module.why_no_triton = nothing
    rpb, bias = torch.empty(2, 13, 13), torch.empty(2, 49, 49)
    calls = {
        "neighborhood_attention": lambda q, k, v: ops.neighborhood_attention(q, k, v, 7),
        "neighborhood_attention, rpb": lambda q, k, v: ops.neighborhood_attention(q, k, v, 7, rpb=rpb),
        "window_attention": lambda q, k, v: ops.window_attention(q, k, v, 7),
        "window_attention, bias": lambda q, k, v: ops.window_attention(q, k, v, 7, bias=bias),
        "channel_attention": lambda q, k, v: ops.channel_attention(q, k, v),
    }
    print(json.dumps({name: measure(call) for name, call in calls.items()}))


if __name__ == "__main__":
    main()
