"""The `foveate` command: its list of commands."""

from typing import Annotated

import typer

from .._version import __version__
from ._terminal import OneLineCommand, OneLineGroup
from .bench import bench_command
from .convert import convert_command
from .demo import demo_command
from .export import export_command
from .list import list_command
from .look import look_command
from .outliers import outliers_command
from .predict import predict_command
from .probe import probe_command
from .prune import prune_command
from .recipes import recipes_command
from .soup import soup_command
from .train import train_command
from .validate import validate_command

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.command("train", cls=OneLineCommand)(train_command)
app.command("validate", cls=OneLineCommand)(validate_command)
app.command("probe", cls=OneLineCommand)(probe_command)
app.command("soup", cls=OneLineCommand)(soup_command)
app.command("recipes", cls=OneLineCommand)(recipes_command)
app.command("list", cls=OneLineCommand)(list_command)
app.command("export", cls=OneLineCommand)(export_command)
app.command("convert", cls=OneLineCommand)(convert_command)
app.command("predict", cls=OneLineCommand)(predict_command)
app.command("prune", cls=OneLineCommand)(prune_command)
app.command("look", cls=OneLineCommand)(look_command)
app.command("outliers", cls=OneLineCommand)(outliers_command)
app.command("bench", cls=OneLineCommand)(bench_command)
app.command("demo", cls=OneLineCommand)(demo_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Vision backbones with efficient attention: train, validate, export and more."""
