"""`python -m foveate`: the command line where no script is installed."""

from .commands.main import app

app(prog_name="foveate")
