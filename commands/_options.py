"""Options that commands share, and how their text is read: key=value pairs, and names separated by commas."""

import ast
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .._errors import RequestError, first_line
from .._model_args import check_model_args

MAX_SEED = 2**32 - 1  # NumPy's limit
MAX_PX = 8192  # of an image's side
MAX_BATCH, MAX_BATCHES = 65_536, 1_000_000

ModelName = Annotated[str, typer.Argument(help="timm model name, local-dir:FOLDER or hf-hub:ORG/REPO.")]
OptionalModel = Annotated[
    str | None,
    typer.Argument(help="timm model name, hub folder, hf-hub:ORG/REPO, or a checkpoint of foveate train."),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights, .pth or .safetensors.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download the weights that timm knows for the name.")]


def parse_size(text: str) -> int | tuple[int, int]:
    """Read an image size: one number for squares, or HEIGHTxWIDTH.

    Raises:
        typer.BadParameter: anything else, or a side beyond 8192 px.
    """
    sides = [side.strip() for side in text.lower().split("x")]
    if len(sides) > 2 or not all(side.isdecimal() and len(side) <= 5 and 1 <= int(side) <= MAX_PX for side in sides):
        wanted = f"wanted px from 1 to {MAX_PX}: a number, or HEIGHTxWIDTH such as 224x320"
        raise typer.BadParameter(f"{wanted}, got {text[:40]!r}")
    height, width = int(sides[0]), int(sides[-1])
    return height if len(sides) == 1 else (height, width)


ImgSize = Annotated[  # int, (height, width) or None
    Any,
    typer.Option(
        parser=parse_size,
        metavar="PX|HxW",
        help="Image size, px: a number for squares, or HEIGHTxWIDTH.",
        show_default="the model's own",
    ),
]
ModelArgs = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Argument of the model; may be repeated.")
]

_WORDS = {"true": True, "false": False, "none": None}
_LONGEST = 10_000  # characters of a value


def name_weights(model: str | None, checkpoint: Path | None, pretrained: bool) -> str:
    """Return where a model's weights came from, for a report."""
    if checkpoint is not None:
        return str(checkpoint)
    if model is not None and (":" in model or os.path.exists(model)):
        return model
    return "published" if pretrained else "random: neither --checkpoint nor --pretrained given"


def parse_options(pairs: Iterable[str] | None, option: str, *, dotted: bool = False) -> dict[str, Any]:
    """Read `key=value` pairs. A value is a Python literal (3, 1e-4, (32, 64), None), otherwise text.

    The last value counts where a key is given twice.

    Args:
        option: the name of the command's option, for messages.
        dotted: keys may be dotted paths.

    Raises:
        RequestError: no key, a key that is not an identifier, or a value that is not plain data.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not all(part.isidentifier() for part in (key.split(".") if dotted else [key])):
            raise RequestError(f"{option} wants key=value, got {pair[:100]!r}")
        parsed[key] = _parse_value(text.strip(), f"{option} {key}")
    return parsed


def parse_model_args(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Read the `key=value` pairs of --model-arg.

    Raises:
        RequestError: see `parse_options` and `check_model_args`.
    """
    arguments = parse_options(pairs, "--model-arg")
    check_model_args(arguments, "--model-arg")
    return arguments


def split_names(text: str | None, option: str) -> list[str] | None:
    """Split a comma-separated option; None where it is not given.

    Raises:
        RequestError: a name is empty.
    """
    names = None if text is None else [name.strip() for name in text.split(",")]
    if names is not None and not all(names):
        raise RequestError(f"{option}: wanted names with commas between them, got {text!r}")
    return names


def _parse_value(text: str, where: str) -> Any:
    if len(text) > _LONGEST:
        raise RequestError(f"{where}: a value has at most {_LONGEST} characters, got {len(text)}")
    if text.lower() in _WORDS:  # in any case: the text "false" would be true
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    except (TypeError, RecursionError, MemoryError) as error:  # {[1]: 2}, and brackets nested hundreds deep
        raise RequestError(f"{where}: {first_line(error)} in {text[:40]!r}") from error
