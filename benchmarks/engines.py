"""Inference on a CPU in the engines that people deploy with, ours and timm's models, measured in one process.

    python -m foveate.benchmarks.engines --models fv_davit_tiny davit_tiny --batch 8 --threads 2

Speed         Median images per second. Engines take turns (see _timing.py). `eager` is measured first: after it,
              `foveate.keep_memory()` is called for all other columns.
kept          Eager with memory that stays.
bf16          `model.bfloat16()`, eager and fused; "-" where this CPU has no bfloat16 products.
AOTI          An AOTInductor package; it takes minutes to compile, so that it is measured on request only.
best          The fused model's speed over the best of the engines that are not eager.
limit         The fused model's multiply-adds per second over the fastest float32 product measured on this CPU.
Page faults   Of one forward pass, below the table: eager, eager with kept memory, fused.
Peak memory   Of tensors during one forward pass, weights and input apart, below the table: eager, fused.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from .._torch import has_bfloat16_products
from ..attention_ops.macs import count_macs
from ..export import ExportError
from ..fusion import FuseError, cpu_report, keep_memory
from ._settings import ModelSettings, add_model_options, parse_model_settings
from ._timing import (
    common_parser,
    cpu_features,
    describe_machine,
    interleaved_seconds,
    peak_tensor_bytes,
    write_report,
)
from .measuring import create_model, prepare_call, product_rate, random_images

MODULE = "foveate.benchmarks.engines"
MODELS = ("resnet50", "swin_tiny_patch4_window7_224", "davit_tiny", "fv_davit_tiny", "nat_mini", "biformer_tiny")
MODELS += ("van_b1", "litv2_small", "fv_halonet26t", "eca_resnet50")
RIVALS = ("compiled", "onnxruntime", "openvino", "aoti", "executorch")
KNOWN = ("kept", "fused", *RIVALS, "bf16", "bf16-fused")
ENGINES = tuple(name for name in KNOWN if name not in ("aoti", "executorch"))  # minutes of compiling a model; an extra
TITLES = {"compiled": "compile", "onnxruntime": "ORT", "openvino": "OpenVINO", "aoti": "AOTI"}  # of columns


@dataclass(frozen=True)
class Settings(ModelSettings):
    """One run of the benchmark."""

    models: tuple[str, ...] = MODELS
    engines: tuple[str, ...] = ENGINES

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.engines if name not in KNOWN]:
            raise ValueError(f"unknown engines: {', '.join(unknown)}; known: {', '.join(KNOWN)}")


@dataclass
class Row:
    """Measurements of one model: images per second by engine, and why an engine has none."""

    name: str
    macs: int  # of one image
    speed: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    faults: dict[str, int | None] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # bytes

    @property
    def over_best(self) -> float | None:
        rivals = [self.speed[name] for name in RIVALS if name in self.speed]
        return self.speed["fused"] / max(rivals) if rivals and "fused" in self.speed else None


def measure(settings: Settings) -> list[Row]:
    """Measure every model in eager mode, then all models in all engines with memory that stays."""
    rows = []
    for name in settings.models:  # before memory is kept
        model, x = create_model(name, settings.img_size), random_images(settings.batch, settings.img_size)
        row = Row(name, count_macs(model, x[:1]))
        eager = prepare_call("eager", model, x)
        row.faults["eager"] = page_faults(eager)
        row.memory["eager"] = peak_tensor_bytes(eager)
        row.speed["eager"] = settings.batch / interleaved_seconds({"eager": eager}, rounds=settings.rounds)["eager"]
        rows.append(row)
    keep_memory()
    for row in rows:
        _measure_engines(row, settings)
        gc.collect()
    return rows


def _measure_engines(row: Row, settings: Settings) -> None:
    model, x = create_model(row.name, settings.img_size), random_images(settings.batch, settings.img_size)
    calls: dict[str, Callable[[], object]] = {}
    for name in settings.engines:
        engine = {"kept": "eager", "bf16": "eager", "bf16-fused": "fused"}.get(name, name)
        half = name.startswith("bf16")
        if half and not has_bfloat16_products():
            row.refused[name] = "this CPU has no bfloat16 products"
            continue
        try:
            calls[name] = prepare_call(engine, model, x, "bfloat16" if half else "float32")
        except (ExportError, FuseError) as error:
            row.refused[name] = str(error)
    row.memory |= {name: peak_tensor_bytes(calls[name]) for name in ("fused",) if name in calls}
    row.faults |= {name: page_faults(calls[name]) for name in ("kept", "fused") if name in calls}
    seconds = interleaved_seconds(calls, rounds=settings.rounds, warmup=2, settle=True)
    row.speed |= {name: settings.batch / taken for name, taken in seconds.items()}


def page_faults(call: Callable[[], object]) -> int | None:
    """Return the page faults of the second of two calls; None where the system does not count them."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    call()
    before = getrusage(RUSAGE_SELF).ru_minflt
    call()
    return getrusage(RUSAGE_SELF).ru_minflt - before


def tabulate(rows: list[Row], settings: Settings) -> Table:
    limit = product_limit()
    size = f"batch {settings.batch}, {settings.img_size} px, float32 unless bf16"
    title = f"inference, img/s, {size}, median of {settings.rounds} rounds; limit {limit:.0f} GMAC/s"
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    engines = ("eager", *(name for name in KNOWN if name in settings.engines))
    for name in (*engines, "best", "limit"):
        table.add_column(TITLES.get(name, name), justify="right", no_wrap=True)
    for row in rows:
        speeds = [f"{row.speed[name]:.1f}" if name in row.speed else "-" for name in engines]
        best = "-" if row.over_best is None else f"{row.over_best:.2f}"
        share = f"{row.macs * row.speed['fused'] / 1e9 / limit:.0%}" if "fused" in row.speed else "-"
        table.add_row(row.name, *speeds, best, share)
    return table


def notes(rows: list[Row]) -> str:
    """The products that this CPU was calibrated with, page faults, and why engines have no figure."""
    refused = [f"{row.name}, {name}: {why}" for row in rows for name, why in row.refused.items()]
    faults = [
        f"{row.name}: " + ", ".join(f"{name} {'-' if n is None else n}" for name, n in row.faults.items())
        for row in rows
    ]
    memory = [
        f"{row.name}: " + ", ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in row.memory.items()) for row in rows
    ]
    report = cpu_report()
    calibration = str(report).replace(f"; {report.file}", "")  # a path of this machine
    parts = {"Calibration": [calibration], "Page faults of a forward pass": faults}
    parts |= {"Peak memory of a forward pass": memory, "Not measured": refused}
    return "\n".join(line for title, lines in parts.items() if lines for line in (title, *lines))


def product_limit() -> float:
    """The fastest float32 product measured on this CPU, in 10^9 multiply-adds per second."""
    rate = product_rate()
    if rate is None:
        raise SystemExit("the limit is measured with FOVEATE_PRODUCTS=auto only")
    return rate


def parse_settings(arguments: list[str] | None = None) -> tuple[Settings, Path | None]:
    """Read the command line; an invalid request exits with one line and code 2."""
    default = Settings()
    parser = common_parser(MODULE, __doc__, rounds=default.rounds)
    add_model_options(parser, default)
    parser.add_argument("--engines", nargs="+", default=default.engines, metavar="NAME", help=", ".join(KNOWN))
    return parse_model_settings(Settings, parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    settings, out = parse_settings(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    cpu_report(measure_again=True)  # the one that is kept may be of a busy machine
    product_limit()  # refused before work starts
    rows = measure(settings)
    machine = f"{describe_machine()}\nFeatures {cpu_features()}"
    write_report(tabulate(rows, settings), module=MODULE, machine=machine, out=out)
    text = notes(rows)
    print(text)
    if out is not None:
        with out.open("a") as file:
            file.write(f"\n{text}\n")


if __name__ == "__main__":
    main()
