"""`foveate recipes [PATTERN]`: the recipes of the package, with model, cost and published accuracy."""

from typing import Annotated

import typer

from ..train.catalog import Entry, catalog

_TITLES = ("recipe", "model", "params M", "GMACs", "epochs", "batch", "devices", "EMACs", "published", "ours")


def recipes_command(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Part of the name of a recipe or model, or a shell pattern.")
    ] = "*",
) -> None:
    """List the recipes of the package.

    batch: images of an optimizer step. devices: those of the published run, where it is known. EMACs: cost of training,
    10^18 multiply-adds. published, ours: top-1, %.
    """
    rows = [_TITLES, *map(_row, catalog(pattern))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())


def _row(entry: Entry) -> tuple[str, ...]:
    numbers = (f"{entry.params:.1f}", f"{entry.gmacs:.1f}" if entry.gmacs >= 1 else f"{entry.gmacs:.2g}")
    counts = map(str, (entry.epochs, entry.global_batch, entry.devices))
    return entry.name, entry.model, *numbers, *counts, f"{entry.emacs:.2g}", entry.published or "-", entry.ours or "-"
