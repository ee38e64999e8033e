"""Train a recipe, or evaluate a checkpoint. Everything is checked before the work starts."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, get_dist_info
from mmengine.hooks import Hook
from rich.console import Console

from ..fusion import keep_memory
from .average import Buffers, Ema
from .checkpoints import (
    BEST,
    build_with_weights,
    find_resumable,
    list_checkpoints,
    list_epochs,
    meta_of,
    read_checkpoint,
    recipe_of,
)
from .data import build_val_loader, end_workers
from .dcal import DcalLosses
from .describe import scale_rate
from .engine import RecipeRunner
from .errors import TrainError
from .hooks import LearningRate, MixingEnds, Seeds
from .interrupt import Signals
from .launch import Launcher, check_precision, processes, resolve
from .lock import RunLock
from .loop import BothLoop, EpochLoop
from .losses import TopK, summarise
from .model import Classifier, check_lora
from .optim import build_optim_wrapper
from .parallel import compile_net, shard
from .prepare import Parts, build_parts
from .recipe import Recipe, recipe_data
from .recipe_files import load_recipe, load_recipe_with_notes
from .report import SCALARS, EpochLog, ProgressBar, StepLog, read_scalars
from .saving import SaveCheckpoints
from .streams import StreamEpoch
from .together import Flags, on_first, storage_errors
from .unreadable import Unreadable

_MAY_CHANGE = (
    *("data.root", "data.workers", "data.max_unreadable", "log.interval", "log.tensorboard", "val_interval"),
    *("checkpoint.interval", "checkpoint.keep", "checkpoint.every_minutes"),
)
# May change too: the new schedule holds for the rest of the run.
_LENGTH = tuple(f"schedule.{key}" for key in ("epochs", "cooldown_epochs", "warmup_epochs", "step_epochs"))
_WITH_PROCESSES = ("batch_size", "accumulate")  # may change together with the number of processes


@dataclass(frozen=True)
class TrainResult:
    """Result of a run. Top-1 in %; None if there was nothing left to train and the log is missing."""

    best_top1: float | None  # of the weights or of their averages, whichever was better
    best_weights: str | None  # "raw" or "averaged"
    last_top1: float | None  # of the weights in last_checkpoint: averages where EMA is on
    epochs: int
    seconds: float  # of this call
    work_dir: Path
    last_checkpoint: Path
    best_checkpoint: Path
    log: Path  # scalars.jsonl


@dataclass(frozen=True)
class EvalResult:
    """Accuracy of a model on a validation split."""

    top1: float  # %
    top5: float
    loss: float
    images: int  # that were read
    seconds: float
    unreadable: int = 0  # images that could not be read; they are in no other number
    map: float | None = None  # mean average precision in %, with loss.multi_label


def train(
    recipe: str | Path | Mapping[str, Any] | Config | Recipe,
    *,
    work_dir: str | Path,
    data: str | Path | None = None,
    resume: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
    launcher: Launcher = "auto",
    device: str | None = None,
    change_processes: bool = False,
    scale_lr: bool = False,
    keep_freed_memory: bool = True,
) -> TrainResult:
    """Train a recipe.

    Args:
        recipe: the name of a recipe of the package, a file, or the content of a file. A .py file runs as Python; .json
            and .yaml files are data and run nothing.
        work_dir: folder of checkpoints and logs; created if missing. A folder that holds a run needs `resume`.
        data: folder of the data set; replaces the recipe's data.root.
        resume: continue from the newest complete checkpoint in work_dir; from scratch if there is none. Another number
            of epochs extends or shortens the run.
        cfg_options: dotted keys to values; they override the recipe.
        launcher, device: see `launch.processes`.
        change_processes: a resumed run may have another number of processes than before (and other batch_size and
            accumulate).
        scale_lr: multiply the learning rates by the run's global batch over that of the recipe.
        keep_freed_memory: let this process keep freed memory until it ends, see `foveate.keep_memory`; on a CPU a step
            is up to a quarter faster.

    Raises:
        TrainError: invalid request; before anything is written.
        FolderInUseError: another process trains in work_dir.
        StorageError: the disk is full, or work_dir is not writable; older checkpoints are complete.
        DivergedError: the loss or the gradient of a step is not finite; older checkpoints are kept.
        StoppedError: SIGTERM, SIGUSR1 or SIGHUP arrived; a checkpoint was written, from which the run can be resumed.
    """
    start = time.perf_counter()
    loaded, notes = load_recipe_with_notes(recipe, cfg_options)
    loaded = _with_data(loaded, data)
    check_lora(loaded)
    work_dir = Path(work_dir).absolute()
    if keep_freed_memory:
        keep_memory()
    with storage_errors(work_dir), processes(launcher, device) as place, RunLock(work_dir) as lock:
        check_precision(loaded.precision, place)
        loaded = scale_rate(loaded, get_dist_info()[1]) if scale_lr else loaded
        console, say = _speaker()
        for note in notes:
            say(note)

        def decide() -> Path | None:
            lock.take()
            return _starting_point(work_dir, resume, change_processes, loaded, console.print)

        checkpoint = on_first(decide)
        _run(build_parts(loaded, checkpoint, place, say), work_dir, checkpoint, resolve(launcher), console)
        barrier()
        return _result(loaded, work_dir, time.perf_counter() - start)


def dry_run(
    recipe: str | Path | Mapping[str, Any] | Config | Recipe,
    *,
    work_dir: str | Path,
    data: str | Path | None = None,
    resume: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
    launcher: Launcher = "auto",
    device: str | None = None,
    change_processes: bool = False,
    scale_lr: bool = False,
) -> None:
    """Build and check everything that `train` would, read one batch of each split, print the lines, and train nothing.

    Nothing is written. The arguments and errors are those of `train`.
    """
    loaded, notes = load_recipe_with_notes(recipe, cfg_options)
    loaded = _with_data(loaded, data)
    check_lora(loaded)
    work_dir = Path(work_dir).absolute()
    with processes(launcher, device) as place:
        check_precision(loaded.precision, place)
        loaded = scale_rate(loaded, get_dist_info()[1]) if scale_lr else loaded
        console, say = _speaker()
        for note in notes:
            say(note)
        checkpoint = on_first(lambda: _starting_point(work_dir, resume, change_processes, loaded, console.print))
        parts = build_parts(loaded, checkpoint, place, say)
        build_optim_wrapper(parts.model.net, loaded)
        parts.model.data_preprocessor(next(iter(parts.train_loader)), training=True)
        parts.model.data_preprocessor(next(iter(parts.val_loader)))
        say("dry run: everything was built and one batch of each split was read; no step was taken")


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

    Images that cannot be read are counted in `unreadable` and in no other number.

    Raises:
        TrainError: not written by `foveate train`, or its data or the device cannot be used, or more images than
            data.max_unreadable cannot be read.
    """
    start = time.perf_counter()
    loaded = read_checkpoint(checkpoint)
    recipe = _with_data(load_recipe(recipe_of(loaded), cfg_options), data)
    with processes("none", device) as place:
        check_precision(recipe.precision, place)
        loader = build_val_loader(recipe, meta_of(loaded, "classes")["classes"], pin_memory=place.type == "cuda")
        net = build_with_weights(recipe, loaded)
        model = Classifier(recipe, net).to(place).eval()
        rows: list[list[float]] = []
        skipped: list[tuple[str, str]] = []
        for batch in loader:
            skipped += batch.skipped
            _check_read(batch.error, skipped, recipe.data.max_unreadable)
            rows += model.val_step(batch)
    metrics = summarise(rows)
    missing = int(metrics.pop("unreadable", 0))
    return EvalResult(**metrics, images=len(rows) - missing, unreadable=missing, seconds=time.perf_counter() - start)


def _check_read(error: str, skipped: list[tuple[str, str]], most: int) -> None:
    if error:
        raise TrainError(error)
    if len(skipped) > most:
        name, why = skipped[-1]
        raise TrainError(
            f"data: {len(skipped)} validation images cannot be read, the last is {name}: {why}; data.max_unreadable is "
            f"{most}"
        )


def _speaker() -> tuple[Console, Callable[[str], None]]:
    """Return the console of process 0 (quiet in the others), and a function that prints a line as it is."""
    console = Console(quiet=get_dist_info()[0] != 0, soft_wrap=True)
    return console, partial(console.print, highlight=False, markup=False)


def _run(parts: Parts, work_dir: Path, checkpoint: Path | None, launcher: str, console: Console) -> None:
    recipe, model, flags = parts.recipe, parts.model, Flags()
    place = next(model.parameters()).device
    ema = [Ema(model, recipe.ema, recipe.ema_warmup is not False, _sharded(recipe))] if recipe.ema else []
    for part in (model, *(hook.average.module for hook in ema)) if _sharded(recipe) else ():
        shard(part.net, place)
    compile_net(model.net, recipe.engine)
    say = partial(console.print, highlight=False)
    unreadable = Unreadable(recipe.data.max_unreadable, work_dir, flags, say)
    ours = [Seeds(recipe.seed), LearningRate(recipe), unreadable, *ema, *_optional_hooks(recipe, launcher)]
    ours += [EpochLog(recipe, work_dir, console, unreadable), SaveCheckpoints(recipe, work_dir, parts.classes, flags)]
    steps = StepLog(console, recipe.log.interval)
    with Signals(flags) as signals, ProgressBar(console) as bar:
        runner = RecipeRunner(
            recipe=recipe,
            device=place,
            named_hooks=parts.named_hooks,
            model=model,
            work_dir=str(work_dir),
            train_dataloader=parts.train_loader,
            val_dataloader=parts.val_loader,
            train_cfg=_loop(recipe),
            val_cfg={"type": BothLoop},
            val_evaluator={"type": TopK},  # built by the runner, so that MMEngine's messages go to its log
            optim_wrapper=build_optim_wrapper(model.net, recipe, flags),
            default_hooks={"checkpoint": None, "param_scheduler": None, "logger": _iteration_log(recipe)},
            custom_hooks=[*ours[:-2], *parts.named_hooks, *ours[-2:], steps, bar, signals],
            load_from=None if checkpoint is None else str(checkpoint),
            resume=checkpoint is not None,
            launcher=launcher,
            log_processor={"log_with_hierarchy": True},  # TensorBoard gets train/loss and val/loss, not loss twice
            randomness={"seed": recipe.seed},
            cfg=Config(recipe_data(recipe)),
        )
        with closing(runner):
            try:
                runner.train()
            finally:
                end_workers(parts.train_loader, parts.val_loader)


def _optional_hooks(recipe: Recipe, launcher: str) -> list[Hook]:
    hooks: list[Hook] = [] if recipe.augment.mixup_off_epoch is None else [MixingEnds(recipe.augment.mixup_off_epoch)]
    hooks += [StreamEpoch()] if recipe.data.streams else []
    hooks += [DcalLosses()] if recipe.loss.branches else []
    return hooks + ([Buffers()] if launcher != "none" else [])


def _loop(recipe: Recipe) -> dict[str, Any]:
    epochs = recipe.schedule.total_epochs
    return {"type": EpochLoop, "max_epochs": epochs, "val_interval": recipe.val_interval, "seed": recipe.seed}


def _sharded(recipe: Recipe) -> bool:
    return recipe.engine.parallel == "fsdp"


def _iteration_log(recipe: Recipe) -> dict[str, Any]:
    return {"type": "LoggerHook", "interval": recipe.log.interval}


def _with_data(recipe: Recipe, data: str | Path | None) -> Recipe:
    return recipe if data is None else load_recipe(recipe, {"data.root": str(data)})


def _starting_point(
    work_dir: Path, resume: bool, change_processes: bool, recipe: Recipe, say: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint to resume, if any; refuse a folder that holds another run."""
    if not resume:
        if runs := list_checkpoints(work_dir):
            raise TrainError(f"work_dir {work_dir} holds a run ({runs[0].name}): resume it, or use another work_dir")
        return None
    path = find_resumable(work_dir, say)
    if path is None:
        say(f"nothing to resume in {work_dir}: starting from scratch")
        return None
    loaded = read_checkpoint(path)
    if "optimizer" not in loaded:
        raise TrainError(f"checkpoint {path} cannot be resumed: it holds no optimizer state")
    meta = meta_of(loaded, "epoch", "iter", "recipe", "processes", "best")
    _check_same_run(meta, recipe, path, change_processes)
    _say_length(meta, recipe, path, say)
    say(f"resuming from {path}" + _said_of_processes(meta, recipe))
    return path


def _check_same_run(meta: dict[str, Any], recipe: Recipe, path: Path, change_processes: bool) -> None:
    then, now = _flat(recipe_data(load_recipe(meta["recipe"]))), _flat(recipe_data(recipe))
    may_change = {*_MAY_CHANGE, *_LENGTH, *(_WITH_PROCESSES if change_processes else ())}
    for key in sorted((then.keys() | now.keys()) - may_change):
        if then.get(key) != now.get(key):
            raise TrainError(
                f"{path} was trained with {key}={then.get(key)}, the recipe says {now.get(key)}; "
                "resume with the same recipe, or start in another work_dir"
            )
    if meta["processes"] != get_dist_info()[1] and not change_processes:
        raise TrainError(
            f"{path} was trained by {meta['processes']} processes, now there are {get_dist_info()[1]}; "
            "--change-processes allows it"
        )


def _say_length(meta: dict[str, Any], recipe: Recipe, path: Path, say: Callable[[str], None]) -> None:
    """Say that the run has another length than before.

    Raises:
        TrainError: it has more epochs than it should.
    """
    if meta["epoch"] > recipe.schedule.total_epochs:
        raise TrainError(f"{path} has {meta['epoch']} epochs, the recipe asks for {recipe.schedule.total_epochs}")
    then, now = _flat(recipe_data(load_recipe(meta["recipe"]))), _flat(recipe_data(recipe))
    for key in _LENGTH:
        if then[key] != now[key]:
            say(f"{key} was {then[key]} and is {now[key]}: from epoch {meta['epoch'] + 1} on the new schedule holds")


def _said_of_processes(meta: dict[str, Any], recipe: Recipe) -> str:
    """Return what changes with the number of processes, or nothing."""
    then, now = load_recipe(meta["recipe"]), get_dist_info()[1]
    before, after = (r.batch_size * r.accumulate * p for r, p in ((then, meta["processes"]), (recipe, now)))
    if (meta["processes"], then.batch_size, then.accumulate) == (now, recipe.batch_size, recipe.accumulate):
        return ""
    return (
        f", with {now} process{'es' if now > 1 else ''} instead of {meta['processes']}: global batch {after} instead "
        f"of {before}, optimizer.lr stays {recipe.optimizer.lr:g}, and the run is not bit for bit that of before"
    )


def _flat(data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return flat


def _result(recipe: Recipe, work_dir: Path, seconds: float) -> TrainResult:
    records = read_scalars(work_dir / SCALARS)
    top1 = [record["val_top1"] for record in records if "val_top1" in record]
    raw = [record["raw_top1"] for record in records if "raw_top1" in record]
    best = max([*top1, *raw], default=None)
    return TrainResult(
        best_top1=best,
        best_weights=None if best is None else "averaged" if raw and best in top1 else "raw",
        last_top1=top1[-1] if top1 else None,
        epochs=recipe.schedule.total_epochs,
        seconds=seconds,
        work_dir=work_dir,
        last_checkpoint=list_epochs(work_dir)[0],
        best_checkpoint=work_dir / BEST,
        log=work_dir / SCALARS,
    )
