"""The pictures of `foveate bench`: accuracy against speed with the Pareto front, and growth with the image."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import atomic_path
from .bench import Row
from .bench_report import Growth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRONT = "Pareto front"
_MARKERS = "osD^vPX"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point beats in both numbers, by growing first number.

    A point is beaten by another one that is at least as large in both numbers, and larger in one.
    """
    return sorted(
        (i for i, point in enumerate(points) if not any(_beats(other, point) for other in points)),
        key=lambda i: points[i],
    )


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def accuracy_figure(rows: Sequence[Row], mode: str, machine: str) -> "Figure":
    """Draw published top-1 against measured images per second: one panel per batch and precision.

    Args:
        rows: those without a measurement, or without published accuracy at their size, are not drawn.
        mode: what was measured, "inference" or "training".
        machine: title of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    panels: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row.seconds and row.published is not None:
            panels.setdefault((row.cell.batch, row.cell.precision), []).append(row)
    figure = Figure(figsize=(7 * max(len(panels), 1), 5.5), layout="constrained")
    figure.suptitle(machine, fontsize=9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0] if panels else []
    for axis, ((batch, precision), group) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, group)
        axis.set(xlabel=f"{mode}, img/s", ylabel="published top-1 on ImageNet-1k, %", xscale="log")
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(StrMethodFormatter("{x:g}"))
        axis.set_title(f"batch {batch}, {precision}")
    return figure


def _draw_panel(axis: "Axes", rows: list[Row]) -> None:
    points = [(row.images_per_second or 0.0, row.published.top1 if row.published else 0.0) for row in rows]
    for marker, engine in zip(_MARKERS, dict.fromkeys(row.cell.engine for row in rows), strict=False):
        mine = [point for point, row in zip(points, rows, strict=True) if row.cell.engine == engine]
        axis.scatter(*zip(*mine, strict=True), marker=marker, label=engine)
    front = [points[i] for i in pareto_front(points)]
    style: dict[str, Any] = {
        "linestyle": "--",
        "marker": "o",
        "markersize": 12,
        "fillstyle": "none",
        "color": "tab:red",
    }
    axis.plot(*zip(*front, strict=True), label=FRONT, **style)
    for name, point in _labels(rows, points).items():
        axis.annotate(name, point, textcoords="offset points", xytext=(7, 7), fontsize=8)
    axis.margins(0.2)
    axis.legend(fontsize=8)


def _labels(rows: list[Row], points: Sequence[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the fastest point of each model and size; the label has the size where a model has several."""
    sizes: dict[str, set[int]] = {}
    for row in rows:
        sizes.setdefault(row.cell.model, set()).add(row.cell.px)
    fastest: dict[str, tuple[float, float]] = {}
    for row, point in zip(rows, points, strict=True):
        model, px = row.cell.model, row.cell.px
        name = model if len(sizes[model]) == 1 else f"{model} {px} px"
        fastest[name] = max(point, fastest.get(name, point))
    return fastest


def growth_figure(rows: Sequence[Row], fits: Sequence[Growth], machine: str) -> "Figure":
    """Draw latency and peak memory against pixels, both axes logarithmic; the legend has the fitted exponents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    figure.suptitle(machine, fontsize=9)
    time, memory = figure.subplots(1, 2)
    for fit in fits:
        key = (fit.model, fit.engine, fit.precision, fit.batch)
        mine = [r for r in rows if r.seconds and (r.cell.model, r.cell.engine, r.cell.precision, r.cell.batch) == key]
        pixels = [row.cell.px**2 for row in mine]
        name = f"{fit.model} {fit.engine} {fit.precision}, batch {fit.batch}"
        time.plot(pixels, [row.p50_ms for row in mine], marker="o", label=f"{name}: {fit.seconds:.2f}")
        if fit.memory is not None:
            megabytes = [(row.memory_bytes or 0) / 1e6 for row in mine]
            memory.plot(pixels, megabytes, marker="o", label=f"{name}: {fit.memory:.2f}")
    for axis, label in ((time, "latency, ms"), (memory, "peak memory, MB")):
        axis.set(xlabel="pixels of an image", ylabel=label, xscale="log", yscale="log")
        axis.legend(fontsize=8, title="exponent of pixels")
    return figure


def write_png(figure: "Figure", path: Path) -> None:
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
