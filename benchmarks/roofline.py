"""Instructions, memory traffic and estimated time of each attention kernel, for the layers of published models.

    python -m foveate.benchmarks.roofline
    python -m foveate.benchmarks.roofline --capability 80 --batch 1 128 --only NAT-T

Needs no GPU: kernels are compiled for one that is not there, and their machine code is read. With a GPU the kernels are
compiled for it, and the last column is measured (replayed CUDA graph, cold L2 cache).

Tile       Owners of a program / tokens of a step. Turns: steps of a program, on average.
Logits     Computed for each query and head. Useful: the share that the definition needs.
Ins        Thread instructions for each computed logit, and for each useful one ("ins u"), of the whole program.
SM         Programs that a multiprocessor holds.
Maps       Read and written, in maps of q's size, with lse, partial sums and relative logits.
HBM, L2, issue
           Time that memory, L2 cache and issue slots need, in us. Estimate: the longest, and 2 us for the launch.
Floor      I/O lower bound of the pass: q, k, v, out once (backward: q, k, v, out, dout, dq, dk, dv), in us and as a
           share of the estimate.
Bound      Lower bound of the traffic between HBM and the shared memory of one multiprocessor, for the pairs of a query
           and a key that the definition has (see _attention_io.py), in us of HBM: an expression without its constant,
           which is not known. Where it is below the floor, the floor is the larger bound. Forward passes only.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Group
from rich.table import Table

from ..kernels.local.plan import _count_walks
from ._attention_io import io_bound
from ._layers import LAYERS, LocalLayer, RoutedLayer
from ._machine_code import Compiled, compiling_for, describe
from ._timing import common_parser, describe_machine, write_report

Layer = LocalLayer | RoutedLayer
ITEM_BYTES = 2  # bfloat16
BIAS_BYTES = 4  # tables are float32, and so are their tiles
ISSUE_SHARE = 0.65  # of the issue slots that these kernels fill (estimated)
LAUNCH_US = 2.0
FLOOR_MAPS = {"forward": 4, "backward": 8}


@dataclass(frozen=True)
class Gpu:
    """What the estimate divides by; from vendors' data sheets, L2 bandwidth from published measurements."""

    name: str
    multiprocessors: int
    hertz: float
    hbm_bytes: float  # a second
    l2_bytes: float
    shared_bytes: int  # of a multiprocessor


GPUS = {
    80: Gpu("A100 SXM 80 GB", 108, 1.41e9, 2.04e12, 4.0e12, 164 * 1024),
    90: Gpu("H100 SXM", 132, 1.755e9, 3.35e12, 5.5e12, 228 * 1024),
}


@dataclass(frozen=True)
class Work:
    """What one launch does: all programs together."""

    turns: float  # of the loop of one program, on average
    logits: float
    maps: float  # that HBM moves
    l2_bytes: float
    tile: str


@dataclass(frozen=True)
class Row:
    """One kernel of one layer at one batch size."""

    layer: Layer
    batch: int
    code: Compiled
    work: Work
    measured_us: float | None = None

    @property
    def passes(self) -> str:
        return "forward" if self.code.name in FORWARD else "backward"

    @property
    def queries(self) -> int:
        """Queries of all heads and images."""
        return self.batch * math.prod(self.layer.size) * self.layer.heads

    @property
    def map_bytes(self) -> int:
        return self.queries * self.layer.dim * ITEM_BYTES

    @property
    def thread_instructions(self) -> float:
        return self.code.executed(self.work.turns) * self.code.programs * 32 * self.code.warps

    def times_us(self) -> tuple[float, float, float]:
        """HBM, L2 cache, issue slots of the multiprocessor with the most programs."""
        gpu = GPUS[self.code.capability]
        programs = -(-self.code.programs // gpu.multiprocessors)
        issue = self.code.executed(self.work.turns) * self.code.warps * programs / (4 * gpu.hertz * ISSUE_SHARE)
        hbm, l2 = self.work.maps * self.map_bytes / gpu.hbm_bytes, self.work.l2_bytes / gpu.l2_bytes
        return hbm * 1e6, l2 * 1e6, issue * 1e6

    def estimate_us(self) -> float:
        return max(self.times_us()) + LAUNCH_US


FORWARD = ("local_forward_kernel", "local_closed_forward_kernel", "halo_logits_kernel", "forward_kernel")
OVER_TILES = ("local_bias_kernel", "local_backward_kernel", "local_closed_forward_kernel")  # what their loops walk over
# Maps of owners and of walked tokens, and float32 numbers for each query and head, that a program of a kernel moves
TRAFFIC = {
    "local_forward_kernel": (2, 2, 1), "local_dq_kernel": (4, 2, 2), "local_dkv_kernel": (4, 2, 2),
    "local_bias_kernel": (0, 4, 2), "local_backward_kernel": (0, 8, 1), "local_closed_forward_kernel": (0, 4, 1),
    "forward_kernel": (2, 2, 1), "queries_kernel": (4, 2, 2), "keys_kernel": (4, 2, 2),
}  # fmt: skip


def work_of(layer: Layer, batch: int, code: Compiled) -> Work | None:
    """Return what a launch does; None for small kernels that move no logits."""
    if code.name not in TRAFFIC or code.constants.get("EXTRA"):
        return None
    return _routed_work(layer, batch, code) if isinstance(layer, RoutedLayer) else _local_work(layer, batch, code)


def _local_work(layer: LocalLayer, batch: int, code: Compiled) -> Work:
    axes, dilation = (code.constants["ROWS"], code.constants["COLS"]), layer.pattern.dilation
    counted = [_count_walks(axes[i], layer.size[i], layer.size[i], dilation[i]) for i in (0, 1)]
    (rows, row_tiles, row_steps), (cols, col_tiles, _) = counted
    alone = code.name in OVER_TILES
    steps = row_tiles * rows.walks if alone else row_steps
    turns = batch * layer.heads * steps * col_tiles * cols.walks
    owners, walked = rows.tile * cols.tile, rows.walk * cols.walk
    words = f"{rows.tile}x{cols.tile}/{rows.walk}x{cols.walk}"
    has_bias = code.constants.get("HAS_BIAS", False) or code.constants.get("CELLS", 0) > 0
    bias = owners * walked * BIAS_BYTES * has_bias
    summed = alone and has_bias and code.name != "local_closed_forward_kernel"
    sums = code.programs * owners * walked * 8 if summed else 0  # fp32, written and read
    relative = 2 * code.constants.get("PLACES", 0) / layer.dim * (2 if code.name == "local_dq_kernel" else 1)
    once = bias * code.programs if alone else bias * turns
    return _work(layer, batch, code, turns, (owners, walked), words, once + sums, sums, relative)


def _routed_work(layer: RoutedLayer, batch: int, code: Compiled) -> Work:
    cut, by_key = layer.cut, code.name == "keys_kernel"
    rows, cols = code.constants["BLOCK_M"], code.constants["BLOCK_N"]
    owners, walked = (cols, rows) if by_key else (rows, cols)
    seen = layer.topk * (cut.queries if by_key else cut.keys)
    turns = code.programs * -(-seen // walked)
    return _work(layer, batch, code, turns, (owners, walked), f"{owners}/{walked}", 0, 0, 0)


def _work(
    layer: Layer, batch: int, code: Compiled, turns: float, tile: tuple[int, int], words: str, l2: float, sums: float,
    relative: float,
) -> Work:  # fmt: skip
    owner_maps, walked_maps, numbers = TRAFFIC[code.name]
    token, map_bytes = layer.dim * ITEM_BYTES, batch * math.prod(layer.size) * layer.heads * layer.dim * ITEM_BYTES
    maps = owner_maps + walked_maps + relative + numbers * 4 / token + sums / map_bytes
    l2 += code.programs * tile[0] * token * (owner_maps + relative) + turns * tile[1] * token * walked_maps
    return Work(turns / code.programs, turns * math.prod(tile), maps, l2, words)


def rows_of(layer: Layer, batch: int, capability: int) -> list[Row]:
    """Compile the kernels of a layer for a compute capability, and count what they do."""
    with compiling_for(capability) as launches:
        layer.run(batch, "meta")
    works = ((code, work_of(layer, batch, code)) for code in launches)
    return [Row(layer, batch, code, work) for code, work in works if work is not None]


def measured_rows_of(layer: Layer, batch: int, microseconds: Callable[[Callable[[], object]], float]) -> list[Row]:
    """Run the kernels of a layer on the GPU, then time each launch."""
    with launches_on_gpu() as launches:
        layer.run(batch, "cuda")
    works = ((code, again, work_of(layer, batch, code)) for code, again in launches)
    return [Row(layer, batch, code, work, microseconds(again)) for code, again, work in works if work is not None]


@contextmanager
def launches_on_gpu() -> Iterator[list[tuple[Compiled, Callable[[], object]]]]:
    """Inside, launches run; yields each as it comes, with a function that launches it again."""
    from triton.runtime.jit import JITFunction

    plain, launches = JITFunction.run, []
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]

    def run(self, *args, grid, warmup, **kwargs):
        kernel = plain(self, *args, grid=grid, warmup=warmup, **kwargs)
        code = describe(kernel, capability, self.__module__, grid, kwargs)
        launches.append((code, lambda: plain(self, *args, grid=grid, warmup=False, **kwargs)))
        return kernel

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def table_of_code(rows: list[Row], title: str) -> Table:
    table = Table(title=title, pad_edge=False, collapse_padding=True)
    words = ("layer", "kernel", "tile")
    for name in (*words, "turns", "logits", "useful", "ins", "ins u", "maps", "regs", "KB", "SM"):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    for (layer, passes), group in _by_pass(rows).items():
        useful = layer.useful()
        for row in group:
            code, work, ins = row.code, row.work, row.thread_instructions
            logits = work.logits / row.queries
            table.add_row(
                layer.name, _short(code.name), work.tile, f"{work.turns:.1f}", f"{logits:.0f}",
                f"{100 * useful / logits:.0f} %", f"{ins / work.logits:.1f}", f"{ins / (useful * row.queries):.0f}",
                f"{work.maps:.1f}", f"{code.registers}", f"{code.shared_bytes / 1024:.0f}", f"{code.blocks_of_sm}",
            )  # fmt: skip
        if len(group) > 1:
            ins = sum(row.thread_instructions / (useful * row.queries) for row in group)
            maps = sum(row.work.maps for row in group)
            table.add_row("", f"{passes}, all", "", "", "", "", "", f"{ins:.0f}", f"{maps:.1f}", "", "", "")
    return table


def table_of_times(rows: list[Row], title: str) -> Table:
    table = Table(title=title, pad_edge=False, collapse_padding=True)
    for name in ("layer", "kernel", "CTAs", "HBM", "L2", "issue", "estimate", "floor", "share", "bound", "measured"):
        table.add_column(name, justify="left" if name in ("layer", "kernel") else "right", no_wrap=True)
    for (layer, passes), group in _by_pass(rows).items():
        for row in group:
            times = [f"{us:.1f}" for us in (*row.times_us(), row.estimate_us())]
            name = passes if len(group) == 1 else _short(row.code.name)
            total = _totals([row], passes) if len(group) == 1 else ["", "", "", _us(row.measured_us)]
            table.add_row(layer.name, name, f"{row.code.programs}", *times, *total)
        if len(group) > 1:
            estimate = f"{sum(row.estimate_us() for row in group):.1f}"
            table.add_row("", f"{passes}, all", *[""] * 4, estimate, *_totals(group, passes))
    return table


def _totals(rows: list[Row], passes: str) -> list[str]:
    """Floor in us, its share of the estimate, bound and measured us, of one pass."""
    floor = FLOOR_MAPS[passes] * rows[0].map_bytes / GPUS[rows[0].code.capability].hbm_bytes * 1e6
    estimate, measured = sum(row.estimate_us() for row in rows), [row.measured_us for row in rows]
    total = None if None in measured else sum(us for us in measured if us is not None)
    return [f"{floor:.1f}", f"{100 * floor / estimate:.0f} %", _us(bound_us(rows[0])), _us(total)]


def bound_us(row: Row) -> float | None:
    """Return the time that HBM needs for the lower bound of the traffic; None for backward passes."""
    if row.passes != "forward":
        return None
    gpu = GPUS[row.code.capability]
    words = io_bound(row.queries, row.layer.useful(), row.layer.dim, gpu.shared_bytes // ITEM_BYTES)
    return words * ITEM_BYTES / gpu.hbm_bytes * 1e6


def _us(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


def _short(name: str) -> str:
    return name.removesuffix("_kernel").removeprefix("local_")


def _by_pass(rows: list[Row]) -> dict[tuple[Layer, str], list[Row]]:
    """Rows of one batch size by layer and pass, in order."""
    found: dict[tuple[Layer, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.layer, row.passes), []).append(row)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser("foveate.benchmarks.roofline", __doc__, rounds=None)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128], help="images (default 1 32 128)")
    parser.add_argument("--capability", type=int, choices=GPUS, default=90, help="compute capability (default 90)")
    parser.add_argument("--only", default="", help="layers whose name contains this word")
    options = parser.parse_args(arguments)
    layers = [layer for layer in LAYERS if options.only in layer.name]
    if not layers or min(options.batch) < 1:
        parser.error(f"--only {options.only!r}, --batch {options.batch}: no layer, or no image")
    here = torch.cuda.is_available()
    rows = [_rows(layer, batch, options.capability, here) for batch in options.batch for layer in layers]
    flat = [row for group in rows for row in group]
    gpu = GPUS[flat[0].code.capability]
    tables = [table_of_code([row for row in flat if row.batch == options.batch[-1]], f"Machine code, {gpu.name}")]
    tables += [
        table_of_times([row for row in flat if row.batch == batch], f"us, {gpu.name}, batch {batch}")
        for batch in options.batch
    ]
    import triton

    machine = f"{describe_machine('cuda' if here else 'cpu')}\nCompiler triton {triton.__version__}"
    write_report(Group(*tables), module="foveate.benchmarks.roofline", machine=machine, out=options.out)


def _rows(layer: Layer, batch: int, capability: int, here: bool) -> list[Row]:
    if not here:
        return rows_of(layer, batch, capability)
    from .gpu_first_hour.clock import Clock

    session: Any = SimpleNamespace(gpu=True, device="cuda", sync=torch.cuda.synchronize)
    clock = Clock(session)
    return measured_rows_of(layer, batch, lambda launch: clock.gpu_us(launch)[0])


if __name__ == "__main__":
    main()
