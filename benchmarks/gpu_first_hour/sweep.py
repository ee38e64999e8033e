"""Part c: tiles, warps and pipeline stages of the local kernels beside those that the plan takes."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ...kernels.local import launch, launch_plan, plan
from ...kernels.local.plan import Pattern, Plan
from .clock import Clock
from .session import Session, first_line, say

MOST_SECONDS = 110.0
Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    name: str
    pattern: Pattern
    side: int
    heads: int
    dim: int
    biased: bool


@dataclass(frozen=True)
class Setting:
    """Owners and walked tokens of a tile as (rows, columns), warps, pipeline stages."""

    tile: Pair
    walk: Pair
    warps: int
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.tile[0]}x{self.tile[1]}/{self.walk[0]}x{self.walk[1]} w{self.warps} s{self.stages}"


LAYERS = (
    Layer("kernel 7, 56x56", Pattern("neighborhood", (7, 7)), 56, 2, 32, True),
    Layer("kernel 7, 14x14", Pattern("neighborhood", (7, 7)), 14, 8, 32, True),
    Layer("window 7, 56x56", Pattern("block", (7, 7)), 56, 3, 32, False),
    Layer("kernel 7, 28x28", Pattern("neighborhood", (7, 7)), 28, 4, 32, True),
    Layer("halo 8 + 3, 64x64", Pattern("block", (8, 8), (3, 3)), 64, 4, 16, False),
)
SMALL_LAYERS = (Layer("kernel 3, 9x9", Pattern("neighborhood", (3, 3)), 9, 1, 16, True),)  # for the interpreter
SETTINGS = {
    "neighborhood": (
        Setting((8, 8), (4, 16), 4),
        Setting((8, 8), (4, 16), 4, 2),
        Setting((8, 8), (2, 16), 4),
        Setting((4, 8), (2, 16), 2),
        Setting((4, 8), (4, 16), 2),
        Setting((4, 16), (2, 16), 4),
        Setting((2, 16), (2, 16), 2),
        Setting((4, 4), (2, 16), 1),
        Setting((8, 8), (4, 16), 8),
    ),
    "block": (
        Setting((8, 8), (8, 8), 4),
        Setting((8, 8), (8, 8), 4, 2),
        Setting((8, 8), (4, 16), 4),
        Setting((8, 8), (4, 8), 4),
        Setting((8, 8), (8, 8), 8),
        Setting((8, 8), (8, 8), 2),
        Setting((4, 8), (8, 8), 2),
    ),
}
KERNELS = ("forward", "dkv", "dq", "dbias")


def jobs(small: bool) -> Iterator[tuple[Layer, str, tuple[Setting, ...]]]:
    """Every layer, kernel, and the settings to try."""
    for layer in SMALL_LAYERS if small else LAYERS:
        for kernel in KERNELS:
            if kernel != "dbias" or layer.biased:
                yield layer, kernel, SETTINGS[layer.pattern.kind][: 2 if small else None]


class Tensors:
    """All that the kernels of one layer read and write."""

    def __init__(self, layer: Layer, batch: int, device: str, dtype: torch.dtype) -> None:
        make = torch.empty if device == "meta" else torch.randn
        packed = make(batch, layer.side, layer.side, 3, layer.heads, layer.dim, device=device).to(dtype)
        self.q, self.k, self.v = packed.unbind(3)
        rows, cols = layer.pattern.keys
        cells = (rows * cols) ** 2 if layer.pattern.kind == "block" else (2 * rows - 1) * (2 * cols - 1)
        self.bias = torch.zeros(layer.heads, cells, device=device) if layer.biased else None
        self.dbias = None if self.bias is None else torch.empty_like(self.bias)
        self.out, self.lse = launch.empty_results(self.q, self.v)
        self.delta, self.grad = torch.empty_like(self.lse), make(self.out.shape, device=device).to(dtype)
        self.dq, self.dk, self.dv = (self.q.new_empty(self.q.shape) for _ in "qkv")
        self.pattern = layer.pattern

    def shape(self) -> launch.Launch:
        scale = self.q.shape[-1] ** -0.5
        return launch.Launch(self.q, self.k, self.v, self.pattern, scale, self.bias is not None, False)

    def run(self, kernel: str) -> None:
        inputs = (self.shape(), self.q, self.k, self.v, self.bias)
        if kernel == "forward":
            launch.launch_forward(*inputs, None, self.out, self.lse)
        elif kernel == "dq":
            launch.launch_dq(*inputs, None, self.out, self.grad, self.lse, self.dq, None, self.delta)
        elif kernel == "dkv":
            launch.launch_dkv(*inputs, None, self.grad, self.lse, self.delta, self.dk, self.dv)
        else:
            launch.launch_dbias(*inputs, self.grad, self.lse, self.delta, self.dbias)

    def written(self, kernel: str) -> list[Tensor]:
        return {"forward": [self.out], "dq": [self.dq], "dkv": [self.dk, self.dv], "dbias": []}[kernel]


@contextmanager
def forced(setting: Setting) -> Iterator[None]:
    """Let every launch inside take this setting, whatever the plan would choose."""

    def make_plan(
        pattern: Pattern, queries: Pair, keys: Pair, walked: int, *, inverse: bool, by_block: bool, **costs
    ) -> Plan:
        owners, others = (keys, queries) if inverse else (queries, keys)
        options = [
            plan._axis_options(pattern, i, setting.tile[i], setting.walk[i], owners[i], others[i], inverse, by_block)
            for i in (0, 1)
        ]
        pairs = itertools.product(*options)
        (rows, *_), (cols, *_) = min(pairs, key=lambda axes: axes[0][2] * axes[1][1] * axes[1][0].walks)
        return Plan(rows, cols)

    replaced: dict[str, Any] = {
        "make_plan": make_plan,
        "launch_shape": lambda *_, **__: (math.prod(setting.walk), setting.stages),
        "stages_of": lambda *_: setting.stages,
        "warps": lambda *_: setting.warps,
        "one_pass_shape": lambda *_: None,
    }
    caches = (launch_plan.plan_launch, launch_plan.plan_one_pass, launch_plan.plan_shares)
    for cache in caches:
        cache.cache_clear()
    try:
        with mock.patch.multiple(launch_plan, **replaced):
            yield
    finally:
        for cache in caches:
            cache.cache_clear()


def sweep(session: Session, clock: Clock) -> None:
    say("\n== c: owners of a tile / walked tokens of a tile, warps, stages: us on the GPU, now and the best four")
    session.results["c"] = []
    deadline = time.perf_counter() + min(MOST_SECONDS, session.left() * 0.5)
    for layer, kernel, settings in jobs(small=not session.gpu):
        if time.perf_counter() > deadline:
            say("   out of time: the rest is left out")
            break
        try:
            _sweep_kernel(layer, kernel, settings, session, clock, deadline)
        except Exception as error:
            say(f"   {layer.name} {kernel}: RAISED {first_line(error)}")


def _sweep_kernel(
    layer: Layer, kernel: str, settings: tuple[Setting, ...], session: Session, clock: Clock, deadline: float
) -> None:
    torch.manual_seed(0)
    tensors = Tensors(layer, session.batch if session.gpu else 1, session.device, session.low)
    for needed in ("forward", "dq"):  # dkv and dbias read lse and delta
        tensors.run(needed)
    now, _ = clock.gpu_us(lambda: tensors.run(kernel))
    want = [t.clone() for t in tensors.written(kernel)]
    taken = tensors.shape().of(kernel)
    rows, cols = taken.plan.rows, taken.plan.cols
    warps, stages = taken.constants["num_warps"], taken.constants["num_stages"]
    current = Setting((rows.tile, cols.tile), (rows.walk, cols.walk), warps, stages)
    found = []
    for setting in settings:
        if time.perf_counter() > deadline:
            break
        found.append(_time_setting(setting, lambda: tensors.run(kernel), clock, lambda: tensors.written(kernel), want))
    found.sort(key=lambda row: row[0])
    session.results["c"].append({"layer": layer.name, "kernel": kernel, "now": now, "found": found})
    best = "; ".join(f"{name} {us:.1f}" for us, name in found[:4])
    say(f"   {layer.name:18s} {kernel:8s} now {now:8.1f} ({current})  best {best}")


def _time_setting(
    setting: Setting, run: Callable[[], None], clock: Clock, written: Callable[[], list[Tensor]], want: list[Tensor]
) -> tuple[float, str]:
    try:
        with forced(setting):
            us, _ = clock.gpu_us(run)
    except Exception as error:
        return math.inf, f"{setting} {type(error).__name__}"
    close = (torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(written(), want, strict=True))
    return us, f"{setting}{'' if all(close) else ' WRONG'}"
