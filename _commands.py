"""What the commands share: how they stop, and limits of their options."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from ._errors import printable

MISTAKE = 2  # exit code
MAX_SEED = 2**63 - 1  # what torch's generators take
MAX_PX = 8192  # of an image's side
MAX_BATCH, MAX_BATCHES = 65_536, 1_000_000


def stop(command: str, error: object, code: int = MISTAKE) -> NoReturn:
    """Print one line on stderr and exit."""
    typer.echo(f"foveate {command}: {printable(str(error))}", err=True)
    raise typer.Exit(code)


@contextmanager
def writing(command: str) -> Iterator[None]:
    """Turn a full disk, a missing permission or too little memory into one line."""
    try:
        yield
    except OSError as error:
        stop(command, error)
