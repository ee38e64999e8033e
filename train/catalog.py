"""The recipes of the package as a list: model, cost, devices and published accuracy, from their headers and keys."""

import ast
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .._errors import did_you_mean
from .errors import TrainError
from .recipe_files import find_recipe, list_recipes, load_recipe

TRAIN_IMAGES = {"in1k": 1_281_167, "mnist5k": 4000, "cifar10": 50_000, "cub200": 5_994}
PASSES = 3  # multiply-adds of a training step, in forward passes: forward, and backward to inputs and to weights
_NAME = re.compile(r".+_(?P<devices>\d+)xb(?P<batch>\d+)_(?P<data>\w+?)(-.+)?")
_MODEL = re.compile(r"(?P<params>[\d.]+) M parameters, (?P<gmacs>[\d.]+) GMACs")
_TOP1 = re.compile(r"([\d., ]*\d) top-1")


@dataclass(frozen=True)
class Entry:
    """One recipe of the package."""

    name: str
    model: str
    params: float  # millions
    gmacs: float  # of one image at the recipe's size, 10^9 multiply-adds
    epochs: int
    global_batch: int
    devices: int
    published: str | None  # top-1, %; None: not published
    ours: str | None  # None: not reproduced

    @property
    def emacs(self) -> float:
        """Return the cost of training, 10^18 multiply-adds."""
        images = next(count for data, count in TRAIN_IMAGES.items() if f"_{data}" in self.name)
        return self.epochs * images * PASSES * self.gmacs * 1e9 / 1e18


def catalog(pattern: str = "*") -> list[Entry]:
    """Return the recipes whose name, or whose model, matches a shell pattern or holds it as a part.

    Raises:
        TrainError: no recipe matches.
    """
    entries = [read_entry(name) for name in list_recipes()]
    parts = (pattern, f"*{pattern}*")
    found = [e for e in entries if any(fnmatchcase(text, part) for text in (e.name, e.model) for part in parts)]
    if not found:
        raise TrainError(f"no recipe matches {pattern!r}" + did_you_mean(pattern, list_recipes()))
    return found


def read_entry(name: str) -> Entry:
    """Read one recipe of the package: its keys, and the lines of its header."""
    recipe = load_recipe(name)
    header = read_header(name)
    model, said = _MODEL.match(header.get("Model", "")), _NAME.fullmatch(name)
    assert model is not None and said is not None and recipe.global_batch is not None  # a test checks every recipe
    return Entry(
        name=name,
        model=recipe.model.name,
        params=float(model["params"]),
        gmacs=float(model["gmacs"]),
        epochs=recipe.schedule.total_epochs,
        global_batch=recipe.global_batch,
        devices=int(said["devices"]),
        published=_top1(header["Published"]),
        ours=_top1(header["Ours"]),
    )


def read_header(name: str) -> dict[str, str]:
    """Return the lines of a recipe's header by their first word, without running the file."""
    text = ast.get_docstring(ast.parse(find_recipe(name).read_text(encoding="utf-8"))) or ""
    return {line[:11].rstrip(): line[11:] for line in text.splitlines() if line[:1].isupper() and line[10:11] == " "}


def _top1(text: str) -> str | None:
    found = _TOP1.match(text)
    return found[1] if found else None
