"""`foveate soup OUT FILES...`: the average of the weights of several checkpoints of one model."""

from pathlib import Path
from typing import Annotated

import typer

from .._errors import RequestError
from ..train.soup import average_checkpoints, check_soup_target, has_statistics, update_statistics, write_soup
from ._terminal import print_facts
from .train import Device

AVERAGED = "averaged; --update-bn measures them on training images"


def soup_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .pth (a checkpoint) or .safetensors.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Checkpoints of foveate train, or weights.")],
    update_bn: Annotated[
        bool, typer.Option("--update-bn", help="Measure statistics of BatchNorm again, on training images.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set for --update-bn.", show_default="that of the recipe")
    ] = None,
    device: Device = None,
) -> None:
    """Average the weights of checkpoints of one model. The result of checkpoints of foveate train is one too."""
    if data is not None and not update_bn:
        raise RequestError("--data: has no effect without --update-bn")
    check_soup_target(out)
    soup = average_checkpoints(files)
    statistics = has_statistics(soup)
    if update_bn and not statistics:
        raise RequestError("--update-bn: the model has no statistics of BatchNorm")
    if update_bn:
        soup = update_statistics(soup, data, device=device)
    write_soup(soup, out)
    facts = {"written": str(out), "averaged": f"{len(files)} checkpoints"}
    if statistics:
        facts["BatchNorm"] = "measured again" if update_bn else AVERAGED
    print_facts("foveate soup", facts)
