"""Record a golden: what a model of other code computes in float32 on a CPU, under weights and inputs drawn by det.py.

    python tests/goldens/record.py FAMILY__VARIANT --make MODULE:FUNCTION --path FOLDER_OF_THE_REPOSITORY

writes FAMILY__VARIANT.json and FAMILY__VARIANT.npz beside this file, in the format that README.md here describes.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from recording import Gradients, RecordError, Request, record

from foveate._errors import RequestError, first_line
from foveate._files import atomic_path
from foveate.commands._options import parse_options

HERE = Path(__file__).parent


def check_files(name: str, folder: Path, force: bool) -> tuple[Path, Path]:
    """Return the paths of the JSON and of the arrays; refuse a name without family, and files that exist."""
    if not re.fullmatch(r"[A-Za-z0-9]\w*?__\w[\w.-]*", name):
        raise RecordError(f"NAME wants FAMILY__VARIANT, got {name!r}")
    if not folder.is_dir():
        raise RecordError(f"--out {folder} is not a folder")
    files = folder / f"{name}.json", folder / f"{name}.npz"
    if (there := [path for path in files if path.exists()]) and not force:
        raise RecordError(f"{there[0]} exists; --force replaces it")
    return files


def split(pair: str, option: str) -> tuple[str, str]:
    left, equals, right = pair.partition("=")
    if not (left and equals):
        raise RecordError(f"{option} wants two parts with = between them, got {pair!r}")
    return left, right


def parse_sizes(texts: list[str]) -> tuple[tuple[int, int], ...]:
    for text in texts:
        if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text, re.ASCII):
            raise RecordError(f"--size wants HEIGHTxWIDTH, got {text!r}")
        if texts.count(text) > 1:
            raise RecordError(f"--size {text} is given twice")
    return tuple(tuple(map(int, text.split("x"))) for text in texts)


def parse_factors(pairs: list[str]) -> dict[str, float] | None:
    factors = dict(split(pair, "--mul") for pair in pairs)
    try:
        return {ending: float(text) for ending, text in factors.items()} or None
    except ValueError as error:
        raise RecordError(f"--mul: {first_line(error)}") from error


def parse_stages(pairs: list[str]) -> tuple[tuple[int, str], ...]:
    stages = [split(pair, "--stage") for pair in pairs]
    if wrong := [index for index, _ in stages if not (index.isascii() and index.isdigit())]:
        raise RecordError(f"--stage wants INDEX=MODULE, got {wrong[0]!r} as index")
    if len(dict(stages)) < len(stages):
        raise RecordError("--stage: two modules have one index")
    return tuple((int(index), module) for index, module in stages)


def write(files: tuple[Path, Path], facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    for path in files:
        with atomic_path(path) as part:
            if path.suffix == ".json":
                part.write_text(json.dumps(facts, separators=(",", ":")))
            else:
                np.savez_compressed(part, **arrays)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Repeated = list[str] | None


@app.command()
def main(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the golden: FAMILY__VARIANT.")],
    make: Annotated[str, typer.Option(metavar="MODULE:FUNCTION", help="Function that returns the model.")],
    arg: Annotated[Repeated, typer.Option(metavar="KEY=VALUE", help="Argument of the function.")] = None,
    path: Annotated[Path | None, typer.Option(help="Folder of the repository, to import from.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Name of our model.", show_default="what follows __ in NAME")
    ] = None,
    size: Annotated[Repeated, typer.Option(metavar="HxW", help="Image size in pixels.", show_default="224x224")] = None,
    rename: Annotated[
        Repeated,
        typer.Option(
            metavar="REGEX=TEXT", help="Change the model's keys (re.sub) into those that weights are drawn by."
        ),
    ] = None,
    computed: Annotated[
        Repeated, typer.Option(metavar="ENDING", help="Buffers that the model computes itself, by end of the key.")
    ] = None,
    mul: Annotated[
        Repeated, typer.Option(metavar="ENDING=FACTOR", help="Multiply drawn weights, by end of the key.")
    ] = None,
    gain: Annotated[float, typer.Option(help="Multiply all drawn weights of two or more dimensions.")] = 1.0,
    grad_gain: Annotated[float | None, typer.Option(help="Gain for the gradients.", show_default="--gain")] = None,
    stage: Annotated[
        Repeated,
        typer.Option(
            metavar="INDEX=MODULE",
            help="Record a module's output as the map of our stage INDEX.",
            show_default="the model's own forward_intermediates, if it has that",
        ),
    ] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Modules of --stage return BHWC.")] = False,
    gradients: Annotated[
        Gradients, typer.Option(help="Stored of a gradient beside its norm: a dot product, or 4 samples.")
    ] = Gradients.DOT,
    out: Annotated[Path, typer.Option(help="Folder to write to.", show_default="that of this file")] = HERE,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Record what a model of other code computes, as NAME.json and NAME.npz.

    The code of --make is run as it is: read it first. Options that take several values are repeated.
    """
    try:
        files = check_files(name, out, force)
        request = Request(
            variant=variant or name.partition("__")[2],
            make=make,
            args=parse_options(arg or (), "--arg"),
            sizes=parse_sizes(size or ["224x224"]),
            path=path,
            rename=tuple(split(pair, "--rename") for pair in rename or ()),
            computed=tuple(computed or ()),
            mul=parse_factors(mul or []),
            gain=gain,
            grad_gain=grad_gain,
            stages=parse_stages(stage or []),
            channels_last=channels_last,
            gradients=gradients,
        )
        facts, arrays = record(request)
    except (RecordError, RequestError) as error:
        typer.echo(f"record.py: {error}", err=True)
        raise typer.Exit(2) from error
    write(files, facts, arrays)
    maps, grads = len(facts["inputs"][0]["stages"]), len(facts.get("grads", ()))
    typer.echo(f"{name}: {facts['params']} parameters, {len(facts['inputs'])} inputs, {maps} maps, {grads} gradients")


if __name__ == "__main__":
    app()
