"""Parameters and multiply-adds of every model at its own image size, recorded in figures.csv.

    python -m foveate.backbones.figures        # counts them again and writes the file; a new model needs it

Counting takes minutes for all models; reading the file takes no time. A test counts them again.
"""

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs

from .._files import atomic_path
from .._timm import pretrained_cfg
from ..attention_ops.macs import count_macs
from . import list_models
from .published import full_name

FILE = Path(__file__).with_name("figures.csv")


@dataclass(frozen=True)
class Figures:
    """What one model costs at one image size; by definition, see attention_ops/macs.py."""

    model: str
    px: int  # height and width
    params: int
    macs: int  # of one image, forward


def weights_of(model: str) -> list[PretrainedCfg]:
    """Return timm's entries for a model, one for each set of weights, the default first."""
    return list(get_arch_pretrained_cfgs(model).values())


def recorded_figures() -> dict[tuple[str, int], Figures]:
    """Return the content of figures.csv, by model and image size."""
    return {(figures.model, figures.px): figures for figures in _read()}


def count_figures(weights: str) -> Figures:
    """Build a model on the meta device and count.

    Args:
        weights: a timm name with the tag of the weights; they decide the image size.
    """
    with torch.device("meta"):
        model = timm.create_model(weights).eval()
        size = pretrained_cfg(model)["input_size"]
        macs = count_macs(model, torch.zeros(1, *size))
    return Figures(weights.partition(".")[0], size[-1], sum(p.numel() for p in model.parameters()), macs)


def sizes(models: Iterable[str]) -> dict[tuple[str, int], str]:
    """Return all image sizes that models have weights for: (model, px) to a name that builds it."""
    found: dict[tuple[str, int], str] = {}
    for model in models:
        for cfg in weights_of(model):
            found.setdefault((model, cfg.input_size[-1]), f"{model}.{cfg.tag}" if cfg.tag else full_name(cfg))
    return found


@lru_cache(maxsize=1)
def _read() -> tuple[Figures, ...]:
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return tuple(Figures(row["model"], *(int(row[name]) for name in ("px", "params", "macs"))) for row in rows)


def main() -> None:
    counted = [count_figures(weights) for weights in sizes(list_models()).values()]
    with atomic_path(FILE) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Figures))
        writer.writerows(astuple(figures) for figures in counted)


if __name__ == "__main__":
    main()
