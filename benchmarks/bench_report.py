"""The report of `foveate bench`: table, records for CSV and JSON, and how time and memory grow with the image."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from .._files import atomic_path
from ._fit import growth_exponent
from ._timing import machine_facts
from .bench import BenchSettings, Cell, Row, relative_speed
from .measuring import product_rate

LINEAR = 1.02  # exponent of the multiply-adds up to which a model is called linear in pixels
FEWEST_SIZES = 3  # of a fit
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}

Facts = dict[str, Any]


@dataclass(frozen=True)
class Growth:
    """Exponents of pixels, fitted over the sizes that one model was measured at."""

    model: str
    engine: str
    precision: str
    batch: int
    sizes: tuple[int, ...]  # px
    seconds: float
    memory: float | None  # None where a size has no figure, or none above 0
    macs: float  # by definition

    @property
    def is_linear(self) -> bool:
        return self.macs <= LINEAR


def run_facts(settings: BenchSettings, command: str) -> Facts:
    """Return the header of a report: machine, versions, date, command, and the product rate of each precision."""
    facts: Facts = dict(machine_facts(settings.device))
    for engine in settings.engines:
        if (package := _RUNTIMES.get(engine)) is not None and find_spec(package) is not None:
            facts[package] = version(package)
    for precision in settings.precisions:
        facts[f"product_gmacs_per_second_{precision}"] = product_rate(precision, settings.device)
    return facts | {"command": command}


def header_lines(facts: Facts) -> list[str]:
    """Return the header of the table."""
    versions = [f"{name} {facts[name]}" for name in ("foveate", "torch", "timm", *_RUNTIMES.values()) if name in facts]
    load = f", load average {facts['load_average']}" if "load_average" in facts else ""
    gpu = [f"GPU      {facts['gpu']}"] if "gpu" in facts else []
    prefix = "product_gmacs_per_second_"
    rates = [f"{k.removeprefix(prefix)} {'-' if v is None else f'{v:.0f}'}" for k, v in facts.items() if prefix in k]
    return [
        f"CPU      {facts['cpu']}, {facts['logical_cores']} logical cores, {facts['threads']} threads{load}",
        f"Features {facts['features']}",
        *gpu,
        f"Products {', '.join(rates)} GMAC/s, the fastest that were measured",
        f"Versions {', '.join(versions)}, Python {facts['python']}, {facts['system']}",
        f"Date     {facts['date']}",
    ]


def tabulate(rows: Sequence[Row], settings: BenchSettings, facts: Facts) -> Table:
    mode = "training step" if settings.train else "inference"
    table = Table(title=f"{mode}, {settings.device}, {settings.rounds} interleaved rounds")
    for name in ("model", "engine", "precision"):
        table.add_column(name, no_wrap=True)
    numbers = ("batch", "px", "img/s", "p50 ms", "p95 ms", "memory MB", "GMAC/s", "of products", "top-1")
    for name in (*numbers, *(f"x {rival}" for rival in settings.against)):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records(rows, settings, facts):
        table.add_row(*_cells(record, settings))
    return table


def _cells(record: Mapping[str, Any], settings: BenchSettings) -> list[str]:
    memory, share = record["peak_memory_bytes"], record["product_share"]
    return [
        record["model"],
        record["engine"],
        record["precision"],
        str(record["batch"]),
        str(record["px"]),
        _number(record["images_per_second"]),
        _number(record["p50_ms"]),
        _number(record["p95_ms"]),
        "-" if memory is None else f"{memory / 1e6:.0f}",
        _number(record["gmacs_per_second"]),
        "-" if share is None else f"{share:.0%}",
        "-" if record["published_top1"] is None else f"{record['published_top1']:.1f}",
        *(_number(record[f"speed_over_{rival}"], 2) for rival in settings.against),
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def records(rows: Sequence[Row], settings: BenchSettings, facts: Facts) -> list[dict[str, Any]]:
    """Return one flat record per cell; what was not measured is None, and `refused` says why."""
    return [_record(row, list(rows), settings, facts) for row in rows]


def _record(row: Row, rows: list[Row], settings: BenchSettings, facts: Facts) -> dict[str, Any]:
    cell, rate = row.cell, facts[f"product_gmacs_per_second_{row.cell.precision}"]
    speed, published = row.gmacs_per_second, row.published
    return {
        "model": cell.model,
        "engine": cell.engine,
        "precision": cell.precision,
        "batch": cell.batch,
        "px": cell.px,
        "device": settings.device,
        "mode": "train" if settings.train else "inference",
        "images_per_second": row.images_per_second,
        "p50_ms": row.p50_ms,
        "p95_ms": row.p95_ms,
        "peak_memory_bytes": row.memory_bytes,
        "macs": row.macs or None,
        "gmacs_per_second": speed,
        "product_share": speed / rate if speed and rate else None,
        "published_top1": None if published is None else published.top1,
        "refused": row.refused,
        **{f"speed_over_{rival}": relative_speed(rows, row, rival) for rival in settings.against},
    }


def fit_growth(rows: Sequence[Row]) -> list[Growth]:
    """Fit the exponent of pixels for each model, engine, precision and batch with three measured sizes or more."""
    groups: dict[Cell, list[Row]] = {}
    for row in rows:
        if row.seconds:
            cell = row.cell
            groups.setdefault(Cell(cell.model, cell.engine, cell.precision, cell.batch, 0), []).append(row)
    return [_fit(key, group) for key, group in groups.items() if len(group) >= FEWEST_SIZES]


def _fit(key: Cell, rows: list[Row]) -> Growth:
    pixels = [row.cell.px**2 for row in rows]
    memory = [row.memory_bytes for row in rows if row.memory_bytes]
    return Growth(
        model=key.model,
        engine=key.engine,
        precision=key.precision,
        batch=key.batch,
        sizes=tuple(row.cell.px for row in rows),
        seconds=growth_exponent(pixels, [row.p50_ms or 0.0 for row in rows]),
        memory=growth_exponent(pixels, memory) if len(memory) == len(rows) else None,
        macs=growth_exponent(pixels, [row.macs for row in rows]),
    )


def tabulate_growth(fits: Sequence[Growth]) -> Table:
    table = Table(title="growth with pixels: exponent e of value = a * pixels ** e")
    for name in ("model", "engine", "precision"):
        table.add_column(name, no_wrap=True)
    for name in ("batch", "sizes, px", "time", "memory", "multiply-adds"):
        table.add_column(name, justify="right")
    for fit in fits:
        sizes, memory = " ".join(map(str, fit.sizes)), _number(fit.memory, 2)
        numbers = (str(fit.batch), sizes, f"{fit.seconds:.2f}", memory, f"{fit.macs:.2f}")
        table.add_row(fit.model, fit.engine, fit.precision, *numbers)
    return table


def describe_growth(fits: Sequence[Growth]) -> list[str]:
    """Say which models are linear in pixels by definition, and how their time grew."""
    lines = []
    for linear, said in ((True, "linear in pixels (exponent about 1)"), (False, "more than linear in pixels")):
        found = [f"{fit.model} {fit.engine} {fit.seconds:.2f}" for fit in fits if fit.is_linear is linear]
        if found:
            kind = "local attention and convolution: " if linear else "attention beyond a neighborhood: "
            lines.append(f"{kind}multiply-adds {said}; exponent of the time: {', '.join(found)}")
    return lines


def write_json(path: Path, rows: Sequence[Row], settings: BenchSettings, facts: Facts, fits: Sequence[Growth]) -> None:
    """Write header, records with the seconds of every round, and fits."""
    cells = [
        record | {"seconds": row.seconds} for record, row in zip(records(rows, settings, facts), rows, strict=True)
    ]
    data = {"run": facts, "cells": cells, "growth": [vars(fit) for fit in fits]}
    with atomic_path(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row], settings: BenchSettings, facts: Facts) -> None:
    """Write one line per cell; the columns of the header repeat, so that files of several machines can be joined."""
    lines = [record | facts for record in records(rows, settings, facts)]
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
