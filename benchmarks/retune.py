"""Measure the constants of the kernels on the GPU in hand, and print them as Python, ready to paste.

    python -m foveate.benchmarks.retune
    python -m foveate.benchmarks.retune --batch 32 --out constants.txt

PROGRAM_OVERHEAD, STEP_OVERHEAD
           The cost model that chooses tiles (kernels/local/plan.py), from times of several tiles of each layer.
STAGES     Pipeline stages of each kernel at a head_dim, where others than those in use are faster.
OWNERS_OF_A_WARP, ONE_PASS_PROGRAMS, PROGRAMS, TAPS_GRAD_PROGRAMS
           The value of least time over all layers; the one in use stays where none gains 2 %.

Times are of replayed CUDA graphs with a cold L2 cache. Results of every setting are compared with those in use. Takes
some minutes. Without a GPU it prints one line and exits with 2.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..kernels._launch import padded
from ..kernels.gates import depthwise
from ..kernels.gates import plan as gates_plan
from ..kernels.local import launch, launch_plan, plan
from ..kernels.local.plan import Axis, _count_walks
from ._fit import Timed, fastest, fit_costs
from ._timing import common_parser, describe_machine
from .gpu_first_hour.clock import Clock
from .gpu_first_hour.sweep import LAYERS, SETTINGS, Layer, Setting, Tensors, forced

MODULE = "foveate.benchmarks.retune"
StagesKey = tuple[str, int, int, bool]  # as `launch_shape` takes them: kernel, head_dim, bytes of a number, extra
Microseconds = Callable[[Callable[[], object]], float]
KERNELS = ("forward", "dq", "dkv", "dbias")
CANDIDATES = {
    "OWNERS_OF_A_WARP": (8, 16, 32),
    "ONE_PASS_PROGRAMS": (384, 768, 1536, 3072, 6144),
    "PROGRAMS": (256, 512, 1024, 2048, 4096),
    "TAPS_GRAD_PROGRAMS": (256, 512, 1024, 2048, 4096),
}
STAGES = (1, 2, 3, 4)
VAN = ((64, 56), (160, 14))  # channels and side of two of VAN-B1's maps


@dataclass
class Timings:
    """All times in us, by what is chosen from them."""

    tiles: list[Timed] = field(default_factory=list)
    stages: dict[StagesKey, dict[str, dict[int, float]]] = field(default_factory=dict)  # by layer, value
    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # by name, layer and kernel, value
    left_out: list[str] = field(default_factory=list)


class Tuner:
    """Times settings of the local kernels on some layers."""

    def __init__(self, layers: Sequence[Layer], batch: int, device: str, dtype: torch.dtype, us: Microseconds) -> None:
        self.layers, self.batch, self.device, self.dtype, self.us = layers, batch, device, dtype, us
        self.found = Timings()

    def run(self) -> Timings:
        for layer in self.layers:
            tensors = Tensors(layer, self.batch, self.device, self.dtype)
            for needed in ("forward", "dq"):  # dkv and dbias read lse and delta
                tensors.run(needed)
            for kernel in KERNELS if layer.biased else KERNELS[:-1]:
                self._tiles_stages_and_warps(layer, kernel, tensors)
            if layer.biased:
                self._values(layer.name, "PROGRAMS", launch_plan, partial(tensors.run, "dbias"))
            if launch_plan.plan_one_pass("backward", tensors.shape().sizes) is not None:
                self._values(layer.name, "ONE_PASS_PROGRAMS", plan, partial(one_pass, tensors))
        return self.found

    def _tiles_stages_and_warps(self, layer: Layer, kernel: str, tensors: Tensors) -> None:
        group = f"{layer.name} {kernel}"
        with forced_nothing_in_one_pass():
            wanted = [t.clone() for t in self._written(tensors, kernel)]
            now = setting_in_use(tensors, kernel)
        for setting in dict.fromkeys((now, *SETTINGS[layer.pattern.kind])):
            us = self._us(group, setting, tensors, kernel, wanted)
            if us is not None and (setting.warps, setting.stages) == (default_warps(setting, self.dtype), now.stages):
                self.found.tiles.append(Timed(group, *work_of(tensors, kernel, setting), us))
        key = (kernel, padded(layer.dim), self.dtype.itemsize, layer.biased)
        if now.stages == launch_plan.launch_shape(*key)[1]:  # not a loop of one turn
            of_layer = self.found.stages.setdefault(key, {}).setdefault(layer.name, {})
            for stages in STAGES:
                setting = Setting(now.tile, now.walk, now.warps, stages)
                if (us := self._us(group, setting, tensors, kernel, wanted)) is not None:
                    of_layer[stages] = us
        of_warps = self.found.values.setdefault("OWNERS_OF_A_WARP", {}).setdefault(group, {})
        for owners in CANDIDATES["OWNERS_OF_A_WARP"]:
            setting = Setting(now.tile, now.walk, max(now.tile[0] * now.tile[1] // owners, 1), now.stages)
            if (us := self._us(group, setting, tensors, kernel, wanted)) is not None:
                of_warps[owners] = us

    def _written(self, tensors: Tensors, kernel: str) -> list[Tensor]:
        tensors.run(kernel)
        return tensors.written(kernel)

    def _us(self, group: str, setting: Setting, tensors: Tensors, kernel: str, wanted: list[Tensor]) -> float | None:
        """The time of a setting; None, and a line, where it does not run or gives other results."""
        try:
            with forced(setting):
                us = self.us(lambda: tensors.run(kernel))
        except Exception as error:  # Triton raises what it likes: registers, shared memory, its compiler
            self.found.left_out.append(f"{group} {setting}: {type(error).__name__}")
            return None
        pairs = zip(tensors.written(kernel), wanted, strict=True)
        if not all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in pairs):
            self.found.left_out.append(f"{group} {setting}: other results")
            return None
        return us

    def _values(self, group: str, name: str, module: ModuleType, run: Callable[[], object]) -> None:
        times = self.found.values.setdefault(name, {}).setdefault(group, {})
        for value in CANDIDATES[name]:
            with replaced(module, name, value):
                times[value] = self.us(run)


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Let a constant have another value inside; plans are made again."""
    caches = (launch_plan.plan_launch, launch_plan.plan_one_pass, launch_plan.plan_shares)
    for cache in caches:
        cache.cache_clear()
    try:
        with mock.patch.object(module, name, value):
            yield
    finally:
        for cache in caches:
            cache.cache_clear()


def forced_nothing_in_one_pass():
    """Take the kernels of several passes, whose settings are tried."""
    return replaced(launch_plan, "one_pass_shape", lambda *_: None)


def one_pass(tensors: Tensors) -> None:
    """The forward and the backward pass of tiles that see only themselves."""
    t, shape = tensors, tensors.shape()
    launch.launch_forward(shape, t.q, t.k, t.v, t.bias, None, t.out, t.lse)
    launch.launch_one_pass(shape, t.q, t.k, t.v, t.bias, t.out, t.grad, t.lse, t.dq, t.dk, t.dv, t.dbias)


def setting_in_use(tensors: Tensors, kernel: str) -> Setting:
    taken = tensors.shape().of(kernel)
    rows, cols, constants = taken.plan.rows, taken.plan.cols, taken.constants
    return Setting((rows.tile, cols.tile), (rows.walk, cols.walk), constants["num_warps"], constants["num_stages"])


def default_warps(setting: Setting, dtype: torch.dtype) -> int:
    return launch_plan.warps(setting.tile[0] * setting.tile[1], dtype.itemsize)


def work_of(tensors: Tensors, kernel: str, setting: Setting) -> tuple[float, float, float]:
    """(logits, loaded, owned) of all programs, as `make_plan` counts them."""
    with forced(setting):
        taken = tensors.shape().of(kernel).plan
    size, dilation = tensors.q.shape[1:3], tensors.pattern.dilation
    axes: tuple[Axis, Axis] = (taken.rows, taken.cols)
    (_, row_tiles, row_steps), (cols, col_tiles, _) = (
        _count_walks(axes[i], size[i], size[i], dilation[i]) for i in (0, 1)
    )
    images = tensors.q.shape[0] * tensors.q.shape[3]
    steps, tiles = images * row_steps * col_tiles * cols.walks, images * row_tiles * col_tiles
    return steps * taken.owners * taken.walked, steps * (taken.owners + taken.walked), tiles * taken.owners


def time_taps_gradients(found: Timings, batch: int, device: str, dtype: torch.dtype, us: Microseconds) -> None:
    for channels, side in VAN:
        x, grad = (torch.randn(batch, side, side, channels, device=device).to(dtype).permute(0, 3, 1, 2) for _ in "xg")
        times = found.values.setdefault("TAPS_GRAD_PROGRAMS", {}).setdefault(f"{channels} x {side}x{side}", {})
        for value in CANDIDATES["TAPS_GRAD_PROGRAMS"]:
            with replaced(gates_plan, "TAPS_GRAD_PROGRAMS", value):
                times[value] = us(partial(depthwise.launch_taps_grad, x, grad, (7, 7), 3))


def choose(found: Timings) -> dict[str, dict[str, Any]]:
    """The constants that follow from the times, by the file that they belong to."""
    program_overhead, step_overhead = fit_costs(found.tiles)
    in_use = {
        "OWNERS_OF_A_WARP": launch_plan.OWNERS_OF_A_WARP[2], "ONE_PASS_PROGRAMS": plan.ONE_PASS_PROGRAMS,
        "PROGRAMS": launch_plan.PROGRAMS, "TAPS_GRAD_PROGRAMS": gates_plan.TAPS_GRAD_PROGRAMS,
    }  # fmt: skip
    best = {name: fastest(times, in_use[name]) for name, times in found.values.items()}
    stages = {key: fastest(times, launch_plan.launch_shape(*key)[1]) for key, times in found.stages.items()}
    return {
        "kernels/local/plan.py": {
            "PROGRAM_OVERHEAD": program_overhead,
            "STEP_OVERHEAD": step_overhead,
            "ONE_PASS_PROGRAMS": best["ONE_PASS_PROGRAMS"],
            "STAGES": {key: value for key, value in stages.items() if value != launch_plan.launch_shape(*key)[1]},
        },
        "kernels/local/launch_plan.py": {
            "OWNERS_OF_A_WARP": launch_plan.OWNERS_OF_A_WARP | {2: best["OWNERS_OF_A_WARP"]}
        },
        "kernels/local/shares.py": {"PROGRAMS": best["PROGRAMS"]},
        "kernels/gates/plan.py": {"TAPS_GRAD_PROGRAMS": best["TAPS_GRAD_PROGRAMS"]},
    }


def as_python(chosen: dict[str, dict[str, Any]], found: Timings, machine: str) -> str:
    """The constants as source text, each file's after its name, and what was left out."""
    lines = [f"# {line}" for line in (f"Measured {time.strftime('%Y-%m-%d')}", *machine.splitlines())]
    for file, constants in chosen.items():
        lines += ["", f"# {file}", *(f"{name} = {value!r}" for name, value in constants.items())]
    if found.left_out:
        lines += ["", "# Not taken into account:", *(f"# {line}" for line in found.left_out)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__, rounds=None)
    parser.add_argument("--batch", type=int, default=64, help="images (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if not torch.cuda.is_available():
        print(f"{MODULE}: needs an NVIDIA GPU, to measure the kernels on it; torch finds none", file=sys.stderr)
        raise SystemExit(2)
    session: Any = SimpleNamespace(gpu=True, device="cuda", sync=torch.cuda.synchronize)
    clock = Clock(session)
    write(options.batch, lambda call: clock.gpu_us(call)[0], options.out)


def write(batch: int, us: Microseconds, out: Path | None) -> None:
    """Measure, print the constants, and write them to a file where one is given."""
    found = Tuner(LAYERS, batch, "cuda", torch.bfloat16, us).run()
    time_taps_gradients(found, batch, "cuda", torch.bfloat16, us)
    text = as_python(choose(found), found, describe_machine("cuda"))
    print(text, end="")
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()
