"""What every command prints: a table of facts on success, one line on stderr and an exit code otherwise."""

from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from .._errors import RequestError, ResultError, printable

MISTAKE, FAILED, INTERRUPTED = 2, 1, 130  # exit codes; 130 is what shells report for Ctrl-C

_UsageError: Any = typer.BadParameter.__base__  # click's; newer releases of typer hold a copy of click


class OneLineCommand(TyperCommand):
    """A command whose errors are one line on stderr: usage errors, invalid requests, a full disk, Ctrl-C."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            stop(f"foveate {ctx.info_name}", error.format_message())

    def invoke(self, ctx: Any) -> Any:
        where = f"foveate {ctx.info_name}"
        try:
            return super().invoke(ctx)
        except ResultError as error:
            stop(where, error, FAILED)
        except (RequestError, OSError) as error:  # OSError: no permission, no space
            stop(where, error)
        except KeyboardInterrupt as error:
            stop(where, str(error) or "interrupted", INTERRUPTED)


class OneLineGroup(TyperGroup):
    """The `foveate` command itself: an unknown command or option is one line on stderr."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            stop("foveate", error.format_message())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            stop("foveate", error.format_message())


def stop(where: str, error: object, code: int = MISTAKE) -> NoReturn:
    """Print one line on stderr and exit."""
    typer.echo(f"{where}: {printable(' '.join(str(error).split()))}", err=True)
    raise typer.Exit(code)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print a table of two columns: what was measured or written, and its value."""
    table = Table(show_header=False, title=title)
    for row in facts.items():
        table.add_row(*map(Text, row))  # Text: a path may hold brackets
    Console().print(table)
