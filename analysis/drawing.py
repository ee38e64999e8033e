"""Pictures of views by matplotlib: the image with the query, one panel per view and head; and plots of profiles."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._errors import RequestError
from .._files import atomic_path
from .importance import HeadEffect
from .profiles import HeadProfile
from .views import AttentionView, GateView, Grid, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 6
MOST_PANELS = 144
INCHES = 2.9  # of a panel
NAMED_LAYERS = 24  # more are numbered on the axis of a plot
DPI = 110


def check_matplotlib() -> None:
    """Raise RequestError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise RequestError('pictures need matplotlib: pip install "foveate[look]"')


def picture_of(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(C, H, W), preprocessed, of one or three channels -> (H, W, 3) uint8, with the normalization undone."""
    shift, factor = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    pixels = ((image * factor + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous()


def draw_views(
    picture: Tensor, views: Sequence[View], query: tuple[float, float] | None = None, head: int | None = None
) -> "Figure":
    """Draw the image with the query, and a panel for each view: what that query sees, or the gates.

    Keys of weight 0, which a query does not see, are left blank. The array of a panel's image is the weights on the
    layer's map, (rows, columns), NaN where blank, and its colors reach from 0 to its largest number. Where a layer
    before dropped the query, the title says so.

    Args:
        picture: (H, W, 3) uint8, the image that the model saw.
        views: from `layer_views`, `attention_rollout`, `grad_cam`.
        query: (x, y) px; the center of the image when None. Layers whose queries have no place show query 0.
        head: of all views that have it. None: a panel for each head of a single view, the mean over heads of several.

    Raises:
        RequestError: matplotlib is missing, the query is outside the image, no view has the head, or there are more
            than 144 panels.
    """
    check_matplotlib()
    height, width = picture.shape[:2]
    at = check_query(query, (height, width))
    panels = _panels(views, head)
    if len(panels) >= MOST_PANELS:
        raise RequestError(f"a picture has at most {MOST_PANELS} panels, got {len(panels) + 1}: choose a layer or head")
    figure, axes = _axes(len(panels) + 1, width / height)
    _show_picture(axes[0], picture)
    _mark(axes[0], at, None)
    axes[0].set_title(f"query at x {at[0]:g}, y {at[1]:g}", fontsize=8)
    for axis, (view, chosen) in zip(axes[1:], panels, strict=True):
        if isinstance(view, GateView):
            _draw_gate(axis, view, chosen, picture)
        else:
            _draw_attention(axis, view, chosen, picture, at)
    return figure


def check_query(query: tuple[float, float] | None, size: tuple[int, int]) -> tuple[float, float]:
    """Return the query, or the center of an image of `size` (rows, columns).

    Raises:
        RequestError: the query is outside the image.
    """
    if query is None:
        return size[1] / 2, size[0] / 2
    if not (0 <= query[0] < size[1] and 0 <= query[1] < size[0]):
        wanted = f"0 <= x < {size[1]} and 0 <= y < {size[0]}"
        raise RequestError(f"the query must be inside the image, {wanted}, got {query[0]:g},{query[1]:g}")
    return query


def check_head(views: Sequence[View], head: int | None) -> None:
    """Raise RequestError where no view has the head."""
    if head is not None and not any(0 <= head < view.heads for view in views):
        most = max(view.heads for view in views)
        raise RequestError(f"wanted a head from 0 to {most - 1}, got {head}")


def write_figure(figure: "Figure", out: str | Path) -> None:
    """Write a figure; on error nothing is left behind, and an older file is kept."""
    with atomic_path(Path(out)) as part:
        figure.savefig(part, dpi=DPI)


def _panels(views: Sequence[View], head: int | None) -> list[tuple[View, int | None]]:
    """A view and the number of its head; None: the mean over heads."""
    if not views:
        raise RequestError("nothing to draw: got no view")
    check_head(views, head)
    if head is not None:
        return [(view, head) for view in views if head < view.heads]
    if len({(view.layer, view.op) for view in views}) == 1:
        return [(view, i) for view in views for i in range(view.heads)]
    return [(view, None if view.heads > 1 else 0) for view in views]


def _axes(count: int, proportion: float) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    tall = INCHES / min(max(proportion, 0.5), 2.0)
    figure = Figure(figsize=(columns * (INCHES + 0.7), rows * (tall + 0.7)), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, axes


def _show_picture(axis: "Axes", picture: Tensor, faint: bool = False) -> None:
    pixels = picture.numpy()
    extent = (0, pixels.shape[1], pixels.shape[0], 0)
    if faint:
        axis.imshow(pixels.mean(2), cmap="gray", extent=extent, alpha=0.5, vmin=0, vmax=255)
    else:
        axis.imshow(pixels, extent=extent)
    axis.set_xlabel("x, px", fontsize=7)
    axis.set_ylabel("y, px", fontsize=7)
    axis.tick_params(labelsize=6)


def _mark(axis: "Axes", at: tuple[float, float], cell: tuple[float, float, float, float] | None) -> None:
    """Mark the query, and its cell (left, top, width, height)."""
    from matplotlib.patches import Rectangle

    axis.plot([at[0]], [at[1]], marker="+", color="red", markersize=9)
    if cell is not None:
        axis.add_patch(Rectangle(cell[:2], cell[2], cell[3], fill=False, color="red", linewidth=0.8))


def _overlay(axis: "Axes", values: Tensor, cell: tuple[float, float], unit: str) -> None:
    """Draw numbers of the layer's map (rows, columns) over the image, with a color bar."""
    rows, cols = values.shape
    extent = (0, cols * cell[1], rows * cell[0], 0)
    _with_colors(axis, values, unit, extent=extent, alpha=0.75)


def _with_colors(axis: "Axes", values: Tensor, unit: str, **options: Any) -> None:
    array = np.ma.masked_invalid(values.float().numpy())
    top = float(array.max()) if array.count() else 1.0
    image = axis.imshow(array, vmin=0, vmax=top if top > 0 else 1.0, interpolation="nearest", **options)
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.8)
    bar.set_label(unit, fontsize=7)
    bar.ax.tick_params(labelsize=6)


def _heading(view: View, name: str) -> str:
    same = view.op == view.layer
    return f"{view.title}\n{name}" if same else f"{view.title}\n{view.op}, {name}"


def _draw_attention(
    axis: "Axes", view: AttentionView, head: int | None, picture: Tensor, at: tuple[float, float]
) -> None:
    name = "mean over heads" if head is None else f"head {head}"
    if not view.keys.is_placed:
        _draw_matrix(axis, view, head, at, name)
        return
    _show_picture(axis, picture, faint=True)
    if view.queries.is_placed and view.queries.at(*at) is None:
        axis.set_title(_heading(view, name) + "\nthe query was dropped before", fontsize=8)
        return
    query = view.query_at(*at)
    weights = _of_head(view.weights([query]), head)[0]
    _overlay(axis, view.keys.on_map(weights.masked_fill(weights == 0, torch.nan)), view.keys.cell, view.unit)
    notes = "" if view.queries.is_placed else f", {view.token} {query}"
    first = view.keys.prefix
    notes += f"\n{first} tokens before the map: {float(weights[:first].sum()):.3f}" if first else ""
    axis.set_title(_heading(view, name) + notes, fontsize=8)
    if view.queries.is_placed:
        _mark(axis, at, _cell_of(view.queries, query))
    axis.set_xlim(0, max(picture.shape[1], view.keys.size[1] * view.keys.cell[1]))
    axis.set_ylim(max(picture.shape[0], view.keys.size[0] * view.keys.cell[0]), 0)


def _of_head(weights: Tensor, head: int | None) -> Tensor:  # (heads, queries, keys) -> (queries, keys)
    return weights.mean(0) if head is None else weights[head]


def _cell_of(grid: Grid, token: int) -> tuple[float, float, float, float] | None:
    row, col = grid.places[token].tolist()
    return None if row < 0 else (col * grid.cell[1], row * grid.cell[0], grid.cell[1], grid.cell[0])


def _draw_matrix(axis: "Axes", view: AttentionView, head: int | None, at: tuple[float, float], name: str) -> None:
    """Keys without a place: all weights of the layer; of queries on the image, those of the query alone."""
    placed = view.queries.is_placed
    weights = _of_head(view.weights([view.query_at(*at)] if placed else None), head)
    _with_colors(axis, weights.masked_fill(weights == 0, torch.nan), view.unit, aspect="auto")
    axis.set_title(_heading(view, name), fontsize=8)
    axis.set_xlabel(f"key {view.token}", fontsize=7)
    axis.set_ylabel("the query" if placed else f"query {view.token}", fontsize=7)
    axis.tick_params(labelsize=6)


def _draw_gate(axis: "Axes", view: GateView, head: int | None, picture: Tensor) -> None:
    values = view.values.mean(0) if head is None else view.values[head]
    name = "mean" if head is None else view.names[head]
    axis.set_title(_heading(view, name), fontsize=8)
    if view.cell is not None:
        _show_picture(axis, picture, faint=True)
        _overlay(axis, values, view.cell, view.unit)
        return
    if len(values) == 1:
        axis.bar(range(values.shape[1]), values[0].numpy(), width=1.0)
        axis.set_ylim(0, None)
        axis.set_ylabel(view.unit, fontsize=7)
    else:
        _with_colors(axis, values, view.unit, aspect="auto")
        axis.set_ylabel(view.axes[0], fontsize=7)
    axis.set_xlabel(view.axes[1], fontsize=7)
    axis.tick_params(labelsize=6)


def draw_profiles(profiles: Sequence[HeadProfile], effects: Sequence[HeadEffect] = ()) -> "Figure":
    """Plot mean distance and entropy of every head by layer, and with effects their importance too.

    A point is a head, the mean over images; the lines join the means over the heads of a layer. Importance is the
    Jensen-Shannon divergence between predictions with and without the head.

    Args:
        profiles: from `head_profiles`.
        effects: from `head_effects`.

    Raises:
        RequestError: matplotlib is missing, or there is no profile.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    if not profiles:
        raise RequestError("nothing to draw: got no profile")
    plots = [
        ("mean distance, tokens", [_points(one.profile.mean_distance) for one in profiles], _names(profiles)),
        ("entropy, nats", [_points(one.profile.entropy) for one in profiles], _names(profiles)),
    ]
    if effects:
        by_layer: dict[str, list[float]] = {}
        for effect in effects:
            by_layer.setdefault(f"{effect.layer} {effect.branch}".strip(), []).append(effect.divergence)
        plots.append(("importance, nats", list(by_layer.values()), list(by_layer)))
    figure = Figure(figsize=(10, 3.2 * len(plots)), layout="constrained")
    for i, (label, points, names) in enumerate(plots):
        _plot(figure.add_subplot(len(plots), 1, i + 1), label, points, names)
    return figure


def _points(values: Tensor | None) -> list[float]:
    """(images, heads) -> one number per head; none where tokens have no place, or where a head sees nothing."""
    return [] if values is None else [mean for mean in values.nanmean(0).tolist() if not math.isnan(mean)]


def _names(profiles: Sequence[HeadProfile]) -> list[str]:
    return [f"{one.layer} {one.branch}".strip() for one in profiles]


def _plot(axis: "Axes", label: str, points: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    pairs = [(i, value) for i, values in enumerate(points) for value in values]
    axis.scatter([i for i, _ in pairs], [value for _, value in pairs], s=12, label="head")
    means = [(i, sum(values) / len(values)) for i, values in enumerate(points) if values]
    axis.plot([i for i, _ in means], [mean for _, mean in means], color="tab:orange", label="mean over heads")
    axis.set_ylabel(label)
    axis.set_xlim(-0.5, len(points) - 0.5)
    axis.set_title(label.split(",")[0] + " of every head, by layer", fontsize=9)
    axis.legend(fontsize=7)
    if len(names) <= NAMED_LAYERS:
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=6)
    else:
        axis.set_xlabel("layer, in the order of the calls")
