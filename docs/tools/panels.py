"""Panels of numbers, and the SVG files that the pages show."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

INCHES = 2.3  # width of a panel
QUERY = "#d62728"


@dataclass(frozen=True)
class Panel:
    """One axis of a figure: a matrix of numbers, or lines where `lines` names them."""

    title: str
    values: Tensor  # (rows, columns); with `lines`, one row a line
    query: tuple[int, int] | None = None  # the token that is marked, (row, column)
    cell: tuple[int, int] | None = None  # tokens between two lines of the grid, (rows, columns)
    labels: tuple[str, str] = ("column", "row")  # of x and y
    lines: tuple[str, ...] = ()


def draw(panels: Sequence[Panel]) -> bytes:
    """Draw panels side by side. Equal panels give equal bytes."""
    matplotlib.rcParams["svg.hashsalt"] = "foveate"
    figure = Figure(figsize=(INCHES * len(panels), INCHES + 0.3), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        (_draw_lines if panel.lines else _draw_matrix)(axis, panel)
        axis.set_title(panel.title, fontsize=8)
        axis.set_xlabel(panel.labels[0], fontsize=7)
        axis.set_ylabel(panel.labels[1], fontsize=7)
        axis.tick_params(labelsize=6)
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _draw_matrix(axis: Axes, panel: Panel) -> None:
    values = panel.values.detach().to(torch.float64)
    axis.imshow(values.numpy(), cmap="Blues", vmin=min(0.0, float(values.min())), interpolation="none")
    rows, cols = values.shape
    for length, step, line in zip((rows, cols), panel.cell or (rows, cols), (axis.axhline, axis.axvline), strict=True):
        for place in range(step, length, step):
            line(place - 0.5, color="#999999", linewidth=0.4)
    if panel.query is not None:
        axis.plot(panel.query[1], panel.query[0], marker="s", color=QUERY, markersize=3)


def _draw_lines(axis: Axes, panel: Panel) -> None:
    for name, line in zip(panel.lines, panel.values.detach().to(torch.float64), strict=True):
        axis.plot(line.numpy(), label=name, linewidth=1)
    axis.legend(fontsize=6, frameon=False)
