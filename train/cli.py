"""`foveate train`: the command line of `train.train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .._commands import stop
from .checkpoints import list_epochs
from .errors import TrainError
from .launch import Launcher
from .recipe_files import parse_options
from .report import DivergedError
from .runner import TrainResult, train

Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe's name, or the path of a recipe file.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the data set, in place of the recipe's data.root.")]
WorkDir = Annotated[Path | None, typer.Option(help="Folder of checkpoints and logs.", show_default="work_dirs/CONFIG")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint in the work dir.")]
Options = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Override a recipe's value; repeat for more.")
]
StartedBy = Annotated[Launcher, typer.Option(help="What started the processes; torchrun is pytorch.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N or mps.", show_default="cuda if available, otherwise cpu")
]

DIVERGED, INTERRUPTED = 1, 130  # exit codes; 130 is what shells report for Ctrl-C


def train_command(
    config: Recipe,
    data: Data = None,
    work_dir: WorkDir = None,
    resume: Resume = False,
    cfg_options: Options = None,
    launcher: StartedBy = "none",
    device: Device = None,
) -> None:
    """Train a recipe, and keep its checkpoints so that it can be resumed."""
    work_dir = work_dir or Path("work_dirs") / Path(config).stem
    try:
        result = train(
            config,
            data=data,
            work_dir=work_dir,
            resume=resume,
            cfg_options=parse_options(cfg_options or ()),
            launcher=launcher,
            device=device,
        )
    except (TrainError, OSError) as error:  # OSError: no permission, no space
        stop("train", error)
    except DivergedError as error:
        stop("train", error, DIVERGED)
    except KeyboardInterrupt:
        stop("train", _how_to_resume(work_dir), INTERRUPTED)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(_in_words(result))


def _in_words(result: TrainResult) -> str:
    facts = "nothing left to train" if result.best_top1 is None else f"best top-1 {result.best_top1:.2f} %"
    return f"{facts}, {result.seconds:.0f} s; weights: {result.best_checkpoint}"


def _how_to_resume(work_dir: Path) -> str:
    if complete := list_epochs(work_dir):
        return f"interrupted; {complete[0]} is complete: the same command with --resume goes on from there"
    return f"interrupted before the first checkpoint; {work_dir} holds logs only"
