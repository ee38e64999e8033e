"""What benchmarks of whole models are asked for, and how the command line says it."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from timm.models import is_model

S = TypeVar("S", bound="ModelSettings")


@dataclass(frozen=True)
class ModelSettings:
    """Models, images and rounds of one run.

    Raises:
        ValueError: a model is unknown, or a number is below 1.
    """

    models: tuple[str, ...] = ()
    batch: int = 8
    img_size: int = 224
    threads: int | None = None  # None: torch's own
    rounds: int = 5

    def __post_init__(self) -> None:
        if unknown := [name for name in self.models if not is_model(name)]:
            raise ValueError(f"unknown models: {', '.join(unknown)}")
        sizes = {name: getattr(self, name) for name in ("batch", "img_size", "rounds", "threads")}
        if small := [f"{name} {size}" for name, size in sizes.items() if size is not None and size < 1]:
            raise ValueError(f"wanted at least 1, got {', '.join(small)}")


def add_model_options(parser: argparse.ArgumentParser, default: ModelSettings) -> None:
    parser.add_argument("--models", nargs="+", default=default.models, metavar="NAME", help="timm model names")
    parser.add_argument("--batch", type=int, default=default.batch, help="images per step (default %(default)s)")
    parser.add_argument("--img-size", type=int, default=default.img_size, help="px (default %(default)s)")


def parse_model_settings(
    kind: type[S], parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[S, Path | None]:
    """Read the command line; an invalid request exits with one line and code 2."""
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    if out is not None and not out.absolute().parent.is_dir():
        parser.error(f"--out {out}: the folder {out.parent} does not exist")
    try:
        return kind(**options | {"models": tuple(options["models"])}), out
    except ValueError as error:
        parser.error(str(error))
