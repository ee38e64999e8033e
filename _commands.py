"""What the commands share: how they refuse and stop, and limits of their options."""

from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from ._errors import printable

MISTAKE = 2  # exit code
MAX_SEED = 2**32 - 1  # what NumPy takes, too
MAX_PX = 8192  # of an image's side
MAX_BATCH, MAX_BATCHES = 65_536, 1_000_000

_UsageError: Any = typer.BadParameter.__base__  # click's, which newer releases of typer carry inside


class OneLineCommand(TyperCommand):
    """A command whose usage errors are one line on stderr, as all of its errors are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            stop(ctx.info_name, error.format_message())


def stop(command: str, error: object, code: int = MISTAKE) -> NoReturn:
    """Print one line on stderr and exit."""
    typer.echo(f"foveate {command}: {printable(' '.join(str(error).split()))}", err=True)
    raise typer.Exit(code)
