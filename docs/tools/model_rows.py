"""One row of facts for each model, as the tables of the documentation show it: what `foveate list` says."""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from foveate.commands.list import Listed, find_models

NONE = "-"


@dataclass(frozen=True)
class Row:
    """One model; "-" is not published."""

    name: str
    params: str
    gmacs: str  # of its default image size
    top1: str  # %, of every set of weights
    license: str
    weights: str


def model_row(name: str) -> Row:
    """Return the facts of a model with all its sets of weights."""
    sets = _by_model()[name]
    first, gmacs = sets[0], sets[0].macs / 1e9
    accuracies = dict.fromkeys(f"{entry.top1:.1f}" for entry in sets if entry.top1 is not None)
    licenses = dict.fromkeys(entry.license for entry in sets if entry.license)
    return Row(
        name,
        f"{first.params / 1e6:.1f} M",
        f"{gmacs:.1f}" if gmacs >= 1 else f"{gmacs:.2f}",
        " / ".join(accuracies) or NONE,
        ", ".join(licenses) or NONE,
        ", ".join(dict.fromkeys(map(_linked, sets))),
    )


@lru_cache(maxsize=1)
def _by_model() -> dict[str, list[Listed]]:
    found = defaultdict(list)
    for entry in find_models("*"):
        found[entry.model].append(entry)
    return dict(found)


def _linked(entry: Listed) -> str:
    label = entry.name.partition(".")[2] or "weights"
    return f"[{label}]({entry.weights})" if entry.weights.startswith("http") else entry.weights
