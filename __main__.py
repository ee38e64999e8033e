"""`python -m foveate`: the command line where no script is installed."""

from .cli import app

app(prog_name="foveate")
