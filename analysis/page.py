"""One HTML page with the weights of all layers: a slider of layers, a choice of heads, a query at the pointer.

Page      page.html, with the data in place of one line. It loads nothing: no network, no other file.
Weights   16 bits each, in units of 1 / 65535 of the largest weight of its query and head: the error is at most 7.7e-6
          of that weight. Only keys that a query sees are stored, where that is shorter.
Size      where a layer's weights of all queries do not fit, every second, third, ... row and column of its queries is
          kept; the page says so. Keys are never left out.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._errors import RequestError
from .._files import atomic_path
from .drawing import check_head, check_query
from .views import AttentionView, Grid, View

STEPS = 65535  # of a weight, beside 0
CHUNK = 1 << 24  # weights in memory at a time
SAMPLED = 4  # rows and columns of queries that tell how many keys a query sees
PLACE = '"DATA"'  # in page.html


def write_page(
    picture: Tensor,
    views: Sequence[View],
    out: str | Path,
    *,
    query: tuple[float, float] | None = None,
    head: int | None = None,
    title: str = "foveate look",
    budget_bytes: int = 12_000_000,
) -> list[str]:
    """Write views as one self-contained HTML page.

    Cost: all weights that are kept are computed, a layer at a time; see `AttentionView.weights`.

    Args:
        picture: (H, W, 3) uint8, the image that the model saw.
        views: from `layer_views`, `attention_rollout`, `grad_cam`.
        out: the file.
        query: (x, y) px that the page begins with, pinned; the center, not pinned, when None.
        head: that the page begins with; the mean over heads when None.
        title: of the page.
        budget_bytes: of all weights in the file; at least one query of every layer is stored.

    Returns:
        What was left out, a line for each layer with fewer queries.

    Raises:
        RequestError: there is no view, the query is outside the image, or no view has the head.
    """
    if not views:
        raise RequestError("nothing to draw: got no view")
    height, width = picture.shape[:2]
    at = check_query(query, (height, width))
    check_head(views, head)
    steps = _steps(views, budget_bytes)
    encoded = [_encoded(view, step) for view, step in zip(views, steps, strict=True)]
    data = {
        "title": title,
        "picture": _png(picture),
        "size": [height, width],
        "query": list(at),
        "pinned": query is not None,
        "head": -1 if head is None else head,
        "views": encoded,
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")  # no end of the script
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    with atomic_path(Path(out)) as part:
        part.write_text(page.replace(PLACE, text, 1), encoding="utf-8")
    return [f"{one['title']}: {one['note']}" for one in encoded if one.get("note")]


def _png(picture: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _encoded(view: View, step: int) -> dict[str, Any]:
    about = {"title": view.title, "op": view.op, "unit": view.unit, "heads": view.heads}
    if isinstance(view, AttentionView):
        return about | _encoded_attention(view, step)
    maps, rows, cols = view.values.shape
    values = np.nan_to_num(view.values.float().numpy(), nan=0.0).reshape(-1)
    shape = {"maps": maps, "rows": rows, "cols": cols, "axes": list(view.axes), "names": list(view.names)}
    return about | shape | {"kind": "gate", "cell": view.cell, "values": _packed(values, "<f4")}


def _encoded_attention(view: AttentionView, step: int) -> dict[str, Any]:
    kept = _kept(view.queries, step)
    starts, keys, weights, scales = _rows(view, kept)
    whole = len(keys) == len(kept) * len(view.keys.places)
    found = {
        "kind": "attention",
        "token": view.token,
        "queries": _grid(view.queries, kept) | {"numbers": _packed(kept.numpy(), "<u4")},
        "keys": _grid(view.keys, torch.arange(len(view.keys.places))),
        "count": len(kept),
        "starts": _packed(starts, "<u4"),
        "seen": None if whole else _packed(keys, "<u2" if len(view.keys.places) <= 1 << 16 else "<u4"),
        "wide": len(view.keys.places) > 1 << 16,
        "weights": [_packed(one, "<u2") for one in weights],
        "scales": _packed(scales, "<f4"),
    }
    if len(kept) < len(view.queries.places):
        what = f"every {_ordinal(step)} row and column of the queries" if view.queries.is_placed else "some queries"
        found["note"] = f"{what} is stored, {len(kept)} of {len(view.queries.places)}, to keep the page small"
    return found


def _ordinal(step: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(step, f"{step}th")


def _grid(grid: Grid, tokens: Tensor) -> dict[str, Any]:
    places = grid.places[tokens]
    return {
        "size": list(grid.size),
        "cell": list(grid.cell),
        "prefix": grid.prefix,
        "rows": _packed(places[:, 0].numpy(), "<i4"),
        "cols": _packed(places[:, 1].numpy(), "<i4"),
    }


def _packed(array: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array).astype(dtype).tobytes()).decode()


def _rows(view: AttentionView, kept: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compressed rows of the queries `kept`: where each begins, its keys, their weights per head, scales per head.

    Returns:
        starts (n + 1,), keys (entries,), weights (heads, entries) in steps of 1 / 65535 of scales (heads, n).
    """
    count = len(view.keys.places)
    chunks: list[tuple[np.ndarray, ...]] = []
    for few in kept.split(max(1, CHUNK // max(view.heads * count, 1))):
        weights = view.weights(few).float()
        seen = (weights != 0).any(0)
        if float(seen.float().mean()) > view.heads / (view.heads + 1):  # all keys are shorter than a list of them
            seen = torch.ones_like(seen)
        rows, keys = seen.nonzero().unbind(1)
        largest = weights.abs().amax(-1)
        units = (weights / largest.clamp(min=torch.finfo(torch.float32).tiny)[..., None] * STEPS).round()
        packed = (seen.sum(1), keys, units[:, rows, keys].clamp(min=0).int(), largest)
        chunks.append(tuple(part.numpy() for part in packed))
    counts, every_key, every_unit, scales = (np.concatenate(parts, axis=-1) for parts in zip(*chunks, strict=True))
    return np.concatenate([[0], counts.cumsum()]), every_key, every_unit, scales


# How much fits


def _kept(grid: Grid, step: int) -> Tensor:
    """The tokens of every `step`-th row and column; of those without a place, as many in the proportion."""
    places, number = grid.places, torch.arange(len(grid.places))
    if not grid.is_placed:
        return number[:: step * step]
    kept = torch.ones(len(places), dtype=torch.bool)
    for axis in (0, 1):
        first = min(step // 2, (grid.size[axis] - 1) // 2)
        kept &= places[:, axis] % step == first % step
    if not kept.any():  # tokens were dropped, and none lies on these lines
        kept[len(kept) // 2] = True
    return number[kept | (places[:, 0] < 0)]


def _steps(views: Sequence[View], budget_bytes: int) -> list[int]:
    """Steps between the queries that are kept of each view: small views leave their share to the others."""
    seen = [_seen(view) if isinstance(view, AttentionView) else 0 for view in views]
    steps = [1] * len(views)
    left, order = float(budget_bytes), sorted(range(len(views)), key=lambda i: _bytes(views[i], seen[i], 1))
    for done, i in enumerate(order):
        share = left / (len(order) - done)
        limit = max(views[i].queries.size) if seen[i] and views[i].queries.is_placed else 1 << 10  # type: ignore[union-attr]
        while seen[i] and steps[i] < limit and _bytes(views[i], seen[i], steps[i]) > share:
            steps[i] += 1
        left -= _bytes(views[i], seen[i], steps[i])
    return steps


def _seen(view: AttentionView) -> int:
    """The most keys that any of a few queries sees."""
    grid = view.queries
    few = _kept(grid, max(1, math.ceil(max(grid.size) / SAMPLED))) if grid.is_placed else torch.arange(1)
    return max(1, int((view.weights(few[:: max(1, len(few) // 16)]) != 0).any(0).sum(-1).max()))


def _bytes(view: View, seen: int, step: int) -> float:
    """Of the weights of a view in the file, in base64."""
    if not isinstance(view, AttentionView):
        return 4 / 3 * 4 * view.values.numel()
    queries, count = len(_kept(view.queries, step)), len(view.keys.places)
    entries = seen * (2 * view.heads + 2) if seen < count else count * 2 * view.heads
    return 4 / 3 * (queries * (entries + 4 * view.heads + 16) + 8 * count)
