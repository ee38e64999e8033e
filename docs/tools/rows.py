"""One row of facts for each model: what the tables of the documentation show.

`model_row` is the only function here that knows where the facts come from: license and weights are those of timm's
registry, the numbers are those of the tables in docs/models.md.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import timm
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, model_entrypoint

TABLE = Path(__file__).parents[1] / "models.md"
NONE = "-"


@dataclass(frozen=True)
class Row:
    """One model as a table shows it; "-" is not published."""

    name: str
    params: str  # millions
    gmacs: str
    top1: str  # %
    license: str
    weights: str


def model_row(name: str) -> Row:
    """Return the facts of a model."""
    top1, params, gmacs, said = published().get(name, (NONE,) * 4)
    if not params[:1].isdigit():  # the table points to docstrings
        stated = re.search(r"([\d.]+) M parameters", model_entrypoint(name).__doc__ or "")
        params, gmacs = (f"{stated[1]}" if stated else NONE), NONE
    cfgs = list(get_arch_pretrained_cfgs(name).values())
    tags = [cfg.tag for cfg in cfgs if cfg.tag and (cfg.url or cfg.hf_hub_id)]
    licenses = {cfg.license for cfg in cfgs if cfg.license}
    weights = ", ".join(map(_linked, (cfg for cfg in cfgs if cfg.tag in tags))) or said
    return Row(
        name, params if params == NONE else f"{params} M", gmacs, top1, ", ".join(sorted(licenses)) or NONE, weights
    )


def _linked(cfg: PretrainedCfg) -> str:
    link = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    return f"[{cfg.tag}]({link})"


@lru_cache(maxsize=1)
def published() -> dict[str, tuple[str, str, str, str]]:
    """Read the tables of docs/models.md: names to (top-1, parameters in millions, GMACs, weights)."""
    found = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[0].startswith("`"):
            continue
        names = list(names_of(cells[0]))
        for i, name in enumerate(names):
            top1, params, gmacs = (_part(cell, i, len(names)) for cell in cells[1:4])
            found[name] = (top1, params, gmacs, cells[4])
    return found


def names_of(cell: str) -> Iterator[str]:
    """Yield the models that a cell such as "`nat_isotropic_small` `_base`" or "`eca_resnet18` `34`" names."""
    first = ""
    for code in re.findall(r"`([^`]+)`", cell):
        if first and not timm.is_model(code):
            stem = first.rpartition("_")[0] if code.startswith("_") else first.rstrip("0123456789")
            code = stem + code
        first = first or code
        options = [part.split(",") for part in re.findall(r"\{([^}]*)\}", code)]
        pattern = re.sub(r"\{[^}]*\}", "{}", code)
        yield from (pattern.format(*choice) for choice in product(*options))


def _part(cell: str, index: int, count: int) -> str:
    """Return the entry of one of `count` models in a cell; a single entry holds for all."""
    parts = cell.removesuffix(" M").split(" / ")
    return parts[index if len(parts) == count else 0]
