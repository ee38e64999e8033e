"""The rows of the tables of models: what `foveate list` says, as text. "-" is not published."""

from collections import defaultdict
from functools import lru_cache

from foveate.commands.list import Listed, find_models

TITLES = ("model", "px", "parameters", "GMACs", "top-1, %", "license of the weights", "weights")
NONE = "-"


def model_rows(name: str) -> list[tuple[str, ...]]:
    """Return a row for each set of weights of a model, in the order of TITLES."""
    return [_row(entry) for entry in _by_model()[name]]


@lru_cache(maxsize=1)
def _by_model() -> dict[str, list[Listed]]:
    found = defaultdict(list)
    for entry in find_models("*"):
        found[entry.model].append(entry)
    return dict(found)


def _row(entry: Listed) -> tuple[str, ...]:
    gmacs = entry.macs / 1e9
    counts = f"{entry.params / 1e6:.1f} M", f"{gmacs:.2f}" if gmacs < 10 else f"{gmacs:.1f}"
    top1 = NONE if entry.top1 is None else f"{entry.top1:.1f}"
    return f"`{entry.name}`", str(entry.px), *counts, top1, entry.license or NONE, _linked(entry.weights)


def _linked(weights: str) -> str:
    """Return a link where weights have a URL."""
    return f"[download]({weights})" if weights.startswith("http") else weights
