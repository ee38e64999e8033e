"""`foveate list [PATTERN]`: the models, what they cost, their published accuracy and weights, and what runs here."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
import typer
from timm.models import PretrainedCfg

from .._errors import RequestError, did_you_mean
from .._torch import has_bfloat16_products
from ..attention_ops._op import OPS, Impl
from ..attention_ops.calibration import name_of
from ..backbones import list_models
from ..backbones.figures import recorded_figures, weights_of
from ..backbones.published import FILE_ONLY, OTHERS_LOAD, full_name, published_top1
from ..export.published import weights_url
from ..fusion import cpu_report
from ..kernels._launch import why_no_triton

_TITLES = ("model", "px", "params M", "GMACs", "top-1", "license", "weights")
_LEFT = (0, 5, 6)  # columns of text


@dataclass(frozen=True)
class Listed:
    """One set of weights, or a model without any. Unpublished fields are None."""

    name: str
    model: str
    px: int  # height and width of its images
    params: int
    macs: int  # of one image
    top1: float | None  # %, on ImageNet-1k, as published
    source: str | None  # of top1
    license: str | None  # of the official weights
    weights: str  # a URL, "file only", or why there are none


@dataclass(frozen=True)
class Body:
    """A body that ops have, and whether it runs on this machine."""

    name: str
    ops: list[str]
    why_not: str | None  # None: it runs


def list_command(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Part of a name, or a shell pattern.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the models: parameters, multiply-adds, published top-1, license and weights; and the op bodies that run.

    px: height and width for which the figures are. GMACs: 10^9 multiply-adds of one image, counted by definition.
    top-1: % on ImageNet-1k as published. weights: a URL, or "file only" where the authors' link is not a file.
    """
    listed, bodies = find_models(pattern), list(op_bodies())
    if as_json:
        typer.echo(json.dumps({"models": list(map(asdict, listed)), "bodies": list(map(asdict, bodies))}, indent=1))
        return
    typer.echo("\n".join(_aligned([_TITLES, *map(_cells, listed)])))
    typer.echo(f"\n{len({entry.model for entry in listed})} models; op bodies on this machine:")
    for body in bodies:
        typer.echo(f"  {body.name:<17}{'runs' if body.why_not is None else 'does not run: ' + body.why_not}")
        typer.echo(f"  {'':<17}{', '.join(body.ops)}")


def find_models(pattern: str) -> list[Listed]:
    """Return the sets of weights whose names match a shell pattern or hold it, in order of the models' names.

    Raises:
        RequestError: nothing matches.
    """
    every = [_listed(model, cfg) for model in list_models() for cfg in weights_of(model)]
    wanted = pattern.lower()
    found = [e for e in every if fnmatchcase(e.name, wanted) or fnmatchcase(e.name, f"*{wanted}*")]
    if not found:
        raise RequestError(f"no model matches {pattern!r}" + did_you_mean(wanted, list_models()))
    return found


def _listed(model: str, cfg: PretrainedCfg) -> Listed:
    name, px = full_name(cfg), cfg.input_size[-1]
    figures, published = recorded_figures()[model, px], published_top1(name, px)
    weights = weights_url(cfg) or _without_url(model)
    return Listed(
        name=name,
        model=model,
        px=px,
        params=figures.params,
        macs=figures.macs,
        top1=None if published is None else published.top1,
        source=None if published is None else published.source,
        license=None if weights.startswith("none") else cfg.license,
        weights=weights,
    )


def _without_url(model: str) -> str:
    if model.startswith(FILE_ONLY):
        return "file only"
    others = next((names for family, names in OTHERS_LOAD.items() if model.startswith(family)), None)
    return "none published" if others is None else f"none published; timm's {others} load"


def _cells(entry: Listed) -> tuple[str, ...]:
    gmacs = entry.macs / 1e9
    numbers = (str(entry.px), f"{entry.params / 1e6:.1f}", f"{gmacs:.2f}" if gmacs < 10 else f"{gmacs:.1f}")
    return entry.name, *numbers, "-" if entry.top1 is None else f"{entry.top1:.1f}", entry.license or "-", entry.weights


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield lines of columns; they are not cut to the width of the terminal, so that a URL stays whole."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        pairs = enumerate(zip(row, widths, strict=True))
        cells = (cell.ljust(width) if i in _LEFT else cell.rjust(width) for i, (cell, width) in pairs)
        yield "  ".join(cells).rstrip()


def op_bodies() -> Iterator[Body]:
    """Say which bodies of the attention ops, and which products on the CPU, run on this machine.

    Cost: a second where the CPU was not calibrated yet, see `foveate.cpu_report`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    why = why_no_triton(torch.empty(0, device=device))
    if why is not None and device == "cpu":
        why += ", and torch sees no CUDA device"
    kernels = [name for name, op in OPS.items() if Impl.FUSED in op.bodies]
    yield Body("tiled, reference", sorted(OPS), None)
    yield Body("fused (Triton)", sorted(kernels), why)
    if others := sorted(set(OPS) - set(kernels)):
        yield Body("fused (Triton)", others, "no kernel is written")
    yield from _products()


def _products() -> Iterator[Body]:
    """Yield what multiplies in the op `dense` and in fused models, by dtype."""
    report = cpu_report()
    for dtype in (torch.float32, torch.bfloat16):
        name = name_of(dtype)
        shapes = [key for key in report.rates if key[0] == name]
        faster = [f"{key[1]}x{key[2]}x{key[3]}" for key in shapes if report.takes_product(*key[1:], dtype)]
        why = None
        if dtype is torch.bfloat16 and not has_bfloat16_products():
            why = "this CPU has no bfloat16 products"
        elif report.setting != "auto":
            why = None if report.setting == "onednn" else f"FOVEATE_PRODUCTS={report.setting}"
        elif not faster:
            why = "torch's own were faster at every measured shape" if shapes else "oneDNN has none here"
        used = [f"dense and fuse, {name}" + (f", at {len(faster)} of {len(shapes)} shapes" if shapes else "")]
        yield Body("oneDNN products", used, why)
