"""All figures of the documentation by name. `python docs/tools/figures.py FOLDER` writes them as SVG files."""

import sys
from collections.abc import Callable
from pathlib import Path

import gate_figures as gates
import interval_figures as intervals
import pattern_figures as patterns
from panels import Panel, draw

FIGURES: dict[str, Callable[[], list[Panel]]] = {
    "van": gates.large_kernel,
    "nat": patterns.neighborhood,
    "biformer": patterns.routed,
    "litv2": patterns.hilo,
    "davit": patterns.dual,
    "halonet": patterns.halo,
    "eca-net": gates.channels,
    "ela": gates.strips,
    "agent-attention": patterns.agents,
    "moh": gates.heads,
    "flowformer": patterns.flow,
    "quantizable-vit": patterns.clipped,
    "sparsifiner": patterns.sparsified,
    "dependencyvit": patterns.reverse,
    "grouped-query-vit": gates.grouped,
    "ulsam": gates.subspaces,
    "ninformer": gates.mixed_gate,
    "mixer-vit": patterns.biased,
    "clear": patterns.circle,
    "routing": patterns.clusters,
    "kernelized": patterns.kernelized,
    "dcal": patterns.rollout,
    "pooling": gates.pooling,
    "intervals": intervals.per_query,
    "tiles": intervals.tiles,
}


def main(folder: str) -> None:
    for name, panels in FIGURES.items():
        Path(folder, f"{name}.svg").write_bytes(draw(panels()))


if __name__ == "__main__":
    main(*sys.argv[1:])
