"""`foveate train`: the command line of `train.train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..train import TrainResult, dry_run, train
from ..train.checkpoints import list_checkpoints
from ..train.errors import StoppedError
from ..train.launch import Launcher, is_first
from ._options import parse_options
from ._terminal import stop

Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="Name of a recipe, or path of a recipe file.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the data set; replaces the recipe's data.root.")]
WorkDir = Annotated[Path | None, typer.Option(help="Folder of checkpoints and logs.", show_default="work_dirs/CONFIG")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint in the work dir.")]
Options = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Override a value of the recipe; may be repeated.")
]
StartedBy = Annotated[
    Launcher, typer.Option(help="Program that started the processes; pytorch is torchrun, auto detects it.")
]
Change = Annotated[
    bool, typer.Option("--change-processes", help="Resume with another number of processes, batch_size or accumulate.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N or mps.", show_default="cuda if available, otherwise cpu")
]


def train_command(
    config: Recipe,
    data: Data = None,
    work_dir: WorkDir = None,
    resume: Resume = False,
    cfg_options: Options = None,
    launcher: StartedBy = "auto",
    device: Device = None,
    change_processes: Change = False,
    scale_lr: Annotated[
        bool, typer.Option("--scale-lr", help="Multiply the rates by the global batch over that of the recipe.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Build and check everything, print what it is, and train nothing.")
    ] = False,
) -> None:
    """Train a recipe; --resume continues an interrupted run. Freed memory stays in the process."""
    work_dir = work_dir or Path("work_dirs") / Path(config).stem
    options: dict[str, Any] = {
        "data": data,
        "work_dir": work_dir,
        "resume": resume,
        "cfg_options": parse_options(cfg_options, "--cfg-options", dotted=True),
        "launcher": launcher,
        "device": device,
        "scale_lr": scale_lr,
        "change_processes": change_processes,
    }
    if dry:
        dry_run(config, **options)
        return
    try:
        result = train(config, **options)
    except StoppedError as error:
        stop("foveate train", f"{error}{_how_to_resume(work_dir)}", 128 + error.signal)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{_how_to_resume(work_dir)}") from None
    if is_first(launcher):
        typer.echo(_summary(result))


def _summary(result: TrainResult) -> str:
    facts = "nothing left to train" if result.best_top1 is None else f"best top-1 {result.best_top1:.2f} %"
    weights = f" of the {result.best_weights} weights" if result.best_weights == "averaged" else ""
    return f"{facts}{weights}, {result.seconds:.0f} s; weights: {result.best_checkpoint}"


def _how_to_resume(work_dir: Path) -> str:
    if complete := list_checkpoints(work_dir):
        return f"; {complete[0]} is complete: run the same command with --resume to continue from it"
    return f" before the first checkpoint; {work_dir} holds logs only"
