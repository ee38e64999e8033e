"""The `foveate` command: one thin sub-command a door; each imports what it needs when it runs."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Efficient-attention vision backbones: train, export, demo."""
