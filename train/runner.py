"""Train a recipe, or evaluate a checkpoint. Everything is checked before the work starts."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, broadcast_object_list, get_dist_info
from mmengine.hooks import Hook, SyncBuffersHook
from rich.console import Console

from .._files import why_not_writable
from .checkpoints import BEST, build_with_weights, find_resumable, list_epochs, meta_of, read_checkpoint, recipe_of
from .data import build_loaders, build_val_loader
from .engine import RecipeRunner
from .errors import TrainError
from .hooks import Ema, LearningRate, SaveCheckpoints, SeedEpoch, build_hooks, seed_everything
from .interrupt import CtrlC
from .launch import Launcher, check_precision, processes
from .model import Classifier, TopK, build_net, check_lora, check_runs, summarise
from .optim import build_optim_wrapper
from .recipe import Recipe, recipe_data
from .recipe_files import load_recipe
from .report import SCALARS, EpochLog, ProgressBar, read_scalars

_MAY_CHANGE = ("data.root", "data.workers", "checkpoint.interval", "checkpoint.keep", "log.interval")


@dataclass(frozen=True)
class TrainResult:
    """Result of a run. Top-1 in %; None if there was nothing left to train and the log is missing."""

    best_top1: float | None
    last_top1: float | None
    epochs: int
    seconds: float  # of this call
    work_dir: Path
    last_checkpoint: Path
    best_checkpoint: Path
    log: Path  # scalars.jsonl


@dataclass(frozen=True)
class EvalResult:
    top1: float  # %
    top5: float
    loss: float
    images: int
    seconds: float


def train(
    recipe: str | Path | Mapping[str, Any] | Config | Recipe,
    *,
    work_dir: str | Path,
    data: str | Path | None = None,
    resume: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
    launcher: Launcher = "none",
    device: str | None = None,
) -> TrainResult:
    """Train a recipe.

    Args:
        recipe: the name of a recipe of the package, a file, or the content of a file. A .py file runs as Python; .json
            and .yaml files are data and run nothing.
        work_dir: folder of checkpoints and logs; created if missing. A folder that holds a run needs `resume`.
        data: folder of the data set; replaces the recipe's data.root.
        resume: continue from the newest complete checkpoint in work_dir; from scratch if there is none.
        cfg_options: dotted keys to values; they override the recipe.
        launcher, device: see `launch.processes`.

    Raises:
        TrainError: invalid request; before anything is written.
        OSError: the disk is full, or work_dir is not writable.
        DivergedError: the training loss is not finite; checkpoints of earlier epochs are kept.
    """
    start = time.perf_counter()
    loaded = _with_data(load_recipe(recipe, cfg_options), data)
    check_lora(loaded)
    work_dir = Path(work_dir).absolute()
    with processes(launcher, device) as place:
        check_precision(loaded.precision, place)
        console = Console(quiet=get_dist_info()[0] != 0, soft_wrap=True)
        checkpoint = _shared(lambda: _starting_point(work_dir, resume, loaded, console.print))
        _run(loaded, work_dir, checkpoint, place, launcher, console)
        barrier()
        return _result(loaded, work_dir, time.perf_counter() - start)


@torch.inference_mode()
def evaluate(
    checkpoint: str | Path,
    *,
    data: str | Path | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> EvalResult:
    """Measure a checkpoint (EMA weights where EMA was on) on the validation split of its recipe.

    Runs no code from the file. Hooks that its recipe names are not built.

    Raises:
        TrainError: not written by `foveate train`, or its data or the device cannot be used.
    """
    start = time.perf_counter()
    loaded = read_checkpoint(checkpoint)
    recipe = _with_data(load_recipe(recipe_of(loaded), cfg_options), data)
    with processes("none", device) as place:
        check_precision(recipe.precision, place)
        loader = build_val_loader(recipe, meta_of(loaded, "classes")["classes"], pin_memory=place.type == "cuda")
        net = build_with_weights(recipe, loaded)
        model = Classifier(recipe, net).to(place).eval()
        rows = [row for batch in loader for row in model.val_step(batch)]
    return EvalResult(**summarise(rows), images=len(rows), seconds=time.perf_counter() - start)


def _run(
    recipe: Recipe, work_dir: Path, checkpoint: Path | None, place: torch.device, launcher: str, console: Console
) -> None:
    seed_everything(recipe.seed)
    named_hooks = build_hooks(recipe)
    net = build_net(recipe).to(place)
    model = Classifier(recipe, net).to(place)
    check_runs(model, recipe)
    optim_wrapper = build_optim_wrapper(net, recipe)
    train_loader, val_loader, classes = build_loaders(recipe, pin_memory=place.type == "cuda")
    log, save = EpochLog(work_dir, console), SaveCheckpoints(recipe, work_dir, classes)
    with CtrlC() as ctrl_c, ProgressBar(console) as bar:
        runner = RecipeRunner(
            device=place,
            model=model,
            work_dir=str(work_dir),
            train_dataloader=train_loader,
            val_dataloader=val_loader,
            train_cfg={"by_epoch": True, "max_epochs": recipe.schedule.total_epochs},
            val_cfg={},
            val_evaluator={"type": TopK},  # built by the runner, so that MMEngine's messages go to its log
            optim_wrapper=optim_wrapper,
            default_hooks={"checkpoint": None, "param_scheduler": None, "logger": _iteration_log(recipe)},
            custom_hooks=[*_training_hooks(recipe, launcher), *named_hooks, log, save, bar, ctrl_c],
            load_from=None if checkpoint is None else str(checkpoint),
            resume=checkpoint is not None,
            launcher=launcher,
            randomness={"seed": recipe.seed},
            cfg=Config(recipe_data(recipe)),
        )
        with closing(runner):
            runner.train()


def _training_hooks(recipe: Recipe, launcher: str) -> list[Hook]:
    hooks: list[Hook] = [SeedEpoch(recipe.seed), LearningRate(recipe)]
    hooks += [Ema(recipe.ema, recipe.accumulate)] if recipe.ema else []
    return hooks + ([SyncBuffersHook()] if launcher != "none" else [])


def _iteration_log(recipe: Recipe) -> dict[str, Any]:
    return {"type": "LoggerHook", "interval": recipe.log.interval}


def _with_data(recipe: Recipe, data: str | Path | None) -> Recipe:
    return recipe if data is None else load_recipe(recipe, {"data.root": str(data)})


def _starting_point(work_dir: Path, resume: bool, recipe: Recipe, say: Callable[[str], None]) -> Path | None:
    """Check that work_dir can hold the run, and return the checkpoint to resume, if any."""
    if (why := why_not_writable(work_dir)) is not None:
        raise TrainError(f"work_dir {work_dir} cannot be written: {why}")
    if not resume:
        if runs := list_epochs(work_dir):
            raise TrainError(f"work_dir {work_dir} holds a run ({runs[0].name}): resume it, or use another work_dir")
        return None
    path = find_resumable(work_dir, say)
    if path is None:
        say(f"nothing to resume in {work_dir}: starting from scratch")
        return None
    loaded = read_checkpoint(path)
    if "optimizer" not in loaded:
        raise TrainError(f"checkpoint {path} cannot be resumed: it holds no optimizer state")
    _check_same_run(meta_of(loaded, "epoch", "iter", "recipe", "processes", "best"), recipe, path)
    say(f"resuming from {path}")
    return path


def _check_same_run(meta: dict[str, Any], recipe: Recipe, path: Path) -> None:
    then, now = _flat(recipe_data(load_recipe(meta["recipe"]))), _flat(recipe_data(recipe))
    for key in sorted((then.keys() | now.keys()) - set(_MAY_CHANGE)):
        if then.get(key) != now.get(key):
            raise TrainError(
                f"{path} was trained with {key}={then.get(key)}, the recipe says {now.get(key)}; "
                "resume with the same recipe, or start in another work_dir"
            )
    if meta["processes"] != get_dist_info()[1]:
        raise TrainError(f"{path} was trained by {meta['processes']} processes, now there are {get_dist_info()[1]}")


def _flat(data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return flat


def _shared(decide: Callable[[], Path | None]) -> Path | None:
    """Let process 0 decide, and broadcast its result or its error."""
    answer: list[Any] = [None, None]
    if get_dist_info()[0] == 0:
        try:
            answer[0] = decide()
        except TrainError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise TrainError(answer[1])
    return answer[0]


def _result(recipe: Recipe, work_dir: Path, seconds: float) -> TrainResult:
    top1 = [record["val_top1"] for record in read_scalars(work_dir / SCALARS)]
    return TrainResult(
        best_top1=max(top1, default=None),
        last_top1=top1[-1] if top1 else None,
        epochs=recipe.schedule.total_epochs,
        seconds=seconds,
        work_dir=work_dir,
        last_checkpoint=list_epochs(work_dir)[0],
        best_checkpoint=work_dir / BEST,
        log=work_dir / SCALARS,
    )
