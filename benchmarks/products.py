"""Matrix products of torch and of oneDNN on this CPU and on weaker ones that it imitates, and which `fuse` takes.

    python -m foveate.benchmarks.products --threads 2

Imitated    The libraries are told to use fewer instructions, by environment, each in a process of its own.
Chosen      as `fuse` chooses: each shape is measured once, in turns; the rates of the table are measured after it.
Shapes      Layers of the models at batch 1 and 8.
taken       The product that `fuse` takes, over torch's: it should not be below 0.95.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.table import Table

from .._torch import has_bfloat16_products
from ..attention_ops import _onednn as onednn
from ..attention_ops.calibration import SETTING, cpu_report, name_of, product_calls, takes_product
from ._timing import common_parser, describe_machine, interleaved_seconds, parse_and_set_threads, write_report

MODULE = "foveate.benchmarks.products"
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
CPUS = {"this CPU": (), "AVX2": ("avx2", "AVX2", "AVX2"), "SSE 4.1": ("default", "SSE41", "SSE4_2")}
SHAPES = (  # rows, inputs, outputs
    *((49, 512, 2048), (196, 1280, 320), (784, 192, 192), (3136, 96, 288)),
    *((392, 768, 768), (1568, 384, 1152), (6272, 512, 128), (25088, 64, 512)),
)


@dataclass(frozen=True)
class Product:
    """Rates of one shape, in 10^9 multiply-adds per second."""

    dtype: str
    rows: int
    inputs: int
    outputs: int
    torch: float
    onednn: float
    takes_onednn: bool

    @property
    def taken(self) -> float:
        return self.onednn / self.torch if self.takes_onednn else 1.0


@dataclass(frozen=True)
class Measured:
    """The products of one CPU, and its calibration as text."""

    calibration: str
    products: list[Product]


@torch.inference_mode()
def measure(rounds: int) -> Measured:
    """Measure all shapes in this process, float32 and, where oneDNN has it, bfloat16."""
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn.works(dtype)]
    products = [_measure(*shape, dtype, takes_product(*shape, dtype), rounds) for dtype in dtypes for shape in SHAPES]
    report = cpu_report()
    return Measured(str(report).replace(f"; {report.file}", ""), products)  # without a path of this machine


def _measure(rows: int, inputs: int, outputs: int, dtype: torch.dtype, takes: bool, rounds: int) -> Product:
    calls = dict(zip(("torch", "onednn"), product_calls(rows, inputs, outputs, dtype), strict=True))
    seconds = interleaved_seconds(calls, rounds=rounds, warmup=2)
    rates = {name: rows * inputs * outputs / 1e9 / taken for name, taken in seconds.items()}
    return Product(name_of(dtype), rows, inputs, outputs, **rates, takes_onednn=takes)


def measure_as(limits: tuple[str, ...], options: argparse.Namespace) -> Measured:
    """Measure in a process whose libraries use fewer instructions, with a calibration of its own."""
    with TemporaryDirectory() as cache:
        unlimited = {name: value for name, value in os.environ.items() if name not in LIMITS}
        environment = unlimited | dict(zip(LIMITS, limits, strict=False)) | {"XDG_CACHE_HOME": cache, SETTING: "auto"}
        command = [sys.executable, "-m", MODULE, "--as-json", "--rounds", str(options.rounds)]
        command += [] if options.threads is None else ["--threads", str(options.threads)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    data = json.loads(done.stdout)
    return Measured(data["calibration"], [Product(**product) for product in data["products"]])


def tabulate(found: dict[str, Measured]) -> Table:
    table = Table(title="products, GMAC/s")
    for column in ("CPU", "dtype", "rows", "inputs", "outputs", "torch", "oneDNN", "taken"):
        table.add_column(column, justify="left" if column in ("CPU", "dtype") else "right")
    for cpu, measured in found.items():
        for p in measured.products:
            shape = map(str, (p.rows, p.inputs, p.outputs))
            table.add_row(cpu, p.dtype, *shape, f"{p.torch:.0f}", f"{p.onednn:.0f}", f"{p.taken:.2f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__, rounds=9)
    parser.add_argument("--as-json", action="store_true", help="measure this process only, and print JSON")
    options = parse_and_set_threads(parser, arguments)
    if options.as_json:
        found = measure(options.rounds)
        print(json.dumps({"calibration": found.calibration, "products": [vars(p) for p in found.products]}))
        return
    measured = {cpu: measure_as(limits, options) for cpu, limits in CPUS.items()}
    machine = f"{describe_machine()}\nbfloat16 {'has' if has_bfloat16_products() else 'has no'} instructions of its own"
    write_report(tabulate(measured), module=MODULE, machine=machine, out=options.out)
    calibrations = "\n".join(("Calibrations", *(m.calibration for m in measured.values())))
    print(calibrations)
    if options.out is not None:
        with Path(options.out).open("a") as file:
            file.write(f"\n{calibrations}\n")


if __name__ == "__main__":
    main()
