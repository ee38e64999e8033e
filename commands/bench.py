"""`foveate bench [MODELS...]`: speed, latency and memory of models and engines on this machine, with CSV, JSON, PNG."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from timm.models import is_model

from .._errors import RequestError, did_you_mean, printable
from .._files import why_not_writable
from ..backbones import list_models
from ..backbones.published import published_top1
from ..benchmarks import bench_report as report
from ..benchmarks.bench import ENGINES, MODELS, SWEEP_PX, BenchSettings, Row, measure, notes
from ..benchmarks.bench_plots import accuracy_figure, growth_figure, write_png
from ..benchmarks.measuring import PRECISIONS
from ..export.files import require_packages
from ..fusion import cpu_report, keep_memory
from ._options import MAX_BATCH, MAX_PX, split_names
from ._terminal import FAILED

WIDTH = 150  # columns of the table at least: a narrow terminal wraps it
MAX_ROUNDS, MAX_THREADS = 10_000, 4096
_RIVALS = "timm:"
Out = Path | None


def bench_command(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models, or patterns of our names.", show_default=", ".join(MODELS))
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="timm:NAME", help="Divide the speeds by this model's; may be repeated.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help=f"{', '.join(ENGINES)}.", show_default="eager,fused; eager on a GPU or to train")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[
        str | None, typer.Option(help="Images of a call, with commas.", show_default="8; 1 with --sweep")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Height and width, px, with commas.", show_default="each model's own")
    ] = None,
    precision: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}.")] = "float32",
    train: Annotated[bool, typer.Option("--train", help="Forward, backward and optimizer step.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, show_default="torch's own")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=MAX_ROUNDS, help="Measurements of each cell.")] = 5,
    csv: Annotated[Out, typer.Option("--csv", metavar="FILE", help="Write one line per cell.")] = None,
    json: Annotated[Out, typer.Option("--json", metavar="FILE", help="Write all figures.")] = None,
    png: Annotated[
        Out, typer.Option(metavar="FILE", help="Draw published accuracy against speed; growth with --sweep.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help=f"Fit growth with pixels over sizes ({','.join(map(str, SWEEP_PX))}).")
    ] = False,
) -> None:
    """Measure models and engines on this machine: all cells take turns in one process. Freed memory stays in it."""
    settings = BenchSettings(
        models=_models(models),
        against=_rivals(against),
        engines=_names(engine, "--engine") or (("eager", "fused") if device == "cpu" and not train else ("eager",)),
        precisions=_names(precision, "--precision"),
        batches=_numbers(batch, "--batch", MAX_BATCH) or ((1,) if sweep else (8,)),
        sizes=_numbers(size, "--size", MAX_PX) or (SWEEP_PX if sweep else ()),
        device=device,
        train=train,
        rounds=rounds,
    )
    _check_files({"--csv": csv, "--json": json, "--png": png}, settings, sweep)
    if threads is not None:
        torch.set_num_threads(threads)
    rows, facts = _run(settings)
    fits = report.fit_growth(rows) if sweep else []
    _print(rows, settings, facts, fits)
    if csv is not None:
        report.write_csv(csv, rows, settings, facts)
    if json is not None:
        report.write_json(json, rows, settings, facts, fits)
    if not any(row.seconds for row in rows):
        typer.echo("foveate bench: no cell could be measured", err=True)
        raise typer.Exit(FAILED)
    if png is not None:
        _draw(png, rows, settings, facts, fits, sweep)


def _models(given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names, patterns of our models resolved."""
    if not given:
        return MODELS
    found: dict[str, None] = {}
    for name in (text.removeprefix(_RIVALS) for text in given):
        matching = list_models(name) if any(c in name for c in "*?[") else [name]
        if not matching:
            raise RequestError(f"no model matches {name!r}" + did_you_mean(name, list_models()))
        found |= dict.fromkeys(matching)
    return tuple(found)


def _rivals(given: Sequence[str] | None) -> tuple[str, ...]:
    names = [name for text in given or () for name in split_names(text, "--against") or ()]
    names = [name.removeprefix(_RIVALS) for name in names]
    if wrong := [name for name in names if not is_model(name)]:
        raise RequestError(f"--against: wanted timm:NAME, timm has no model {wrong[0]!r}")
    return tuple(dict.fromkeys(names))


def _names(text: str | None, option: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(split_names(text, option) or ()))


def _numbers(text: str | None, option: str, most: int) -> tuple[int, ...]:
    names = _names(text, option)
    if wrong := [name for name in names if not name.isdecimal() or not 1 <= int(name) <= most]:
        raise RequestError(f"{option}: wanted numbers from 1 to {most} with commas between them, got {wrong[0]!r}")
    return tuple(dict.fromkeys(map(int, names)))


def _check_files(files: dict[str, Out], settings: BenchSettings, sweep: bool) -> None:
    """Refuse files that cannot be written, and a picture of nothing, before any work."""
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise RequestError(f"{option} {path}: wanted a file in a folder that exists")
        if (why := why_not_writable(path.absolute().parent)) is not None:
            raise RequestError(f"{option} {path}: {why}")
    given = [str(path.absolute()) for path in files.values() if path is not None]
    if len(set(given)) < len(given):
        raise RequestError("--csv, --json and --png: wanted different files")
    if sweep and len(settings.sizes) < report.FEWEST_SIZES:
        raise RequestError(f"--sweep: wanted at least {report.FEWEST_SIZES} sizes, got {len(settings.sizes)}")
    if files["--png"] is not None:
        require_packages("demo", "matplotlib")
        if not sweep and not any(published_top1(cell.model, cell.px) for cell in settings.cells()):
            raise RequestError("--png: no accuracy is published for these models at these sizes")


def _run(settings: BenchSettings) -> tuple[list[Row], dict[str, Any]]:
    """Measure; progress goes to stderr where that is a terminal."""
    keep_memory()
    cpu_report(measure_again=True)  # the one that is kept may be of a busy machine
    with Console(stderr=True).status("preparing") as status:
        rows = measure(settings, lambda line: status.update(line))
        facts = report.run_facts(settings, shlex.join(["foveate", *sys.argv[1:]]))
    return rows, facts


def _print(rows: list[Row], settings: BenchSettings, facts: dict[str, Any], fits: Sequence[report.Growth]) -> None:
    console = Console(width=max(Console().width, WIDTH + sum(len(name) + 5 for name in settings.against)))
    _say(report.header_lines(facts))
    console.print(report.tabulate(rows, settings, facts))
    _say(notes(rows, settings))
    if fits:
        console.print(report.tabulate_growth(fits))
        _say(report.describe_growth(fits))


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(printable(line))


def _draw(
    png: Path,
    rows: list[Row],
    settings: BenchSettings,
    facts: dict[str, Any],
    fits: Sequence[report.Growth],
    sweep: bool,
) -> None:
    machine = f"{facts.get('gpu') or facts['cpu']}, {facts['threads']} threads, {facts['date']}"
    mode = "training" if settings.train else "inference"
    write_png(growth_figure(rows, fits, machine) if sweep else accuracy_figure(rows, mode, machine), png)
    missing = [] if sweep else [row.cell.model for row in rows if row.seconds and row.published is None]
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        _say([f"not drawn, no accuracy is published at this size: {names}"])
