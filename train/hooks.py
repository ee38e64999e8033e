"""Hooks that make a run repeatable and resumable: seeds, learning rate, EMA, checkpoints.

All random numbers of an epoch depend on (seed, epoch, process) only, so a resumed run equals an uninterrupted one bit
for bit: shuffling, augmentation in workers, mixup, drop path and dropout.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import registry as registries
from mmengine.dist import all_reduce_params, get_dist_info, master_only
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, Registry
from mmengine.runner import Runner
from torch import nn

from .._errors import did_you_mean, first_line
from ..export.adapters import save_adapter
from ..pruning.hook import KeepMasks
from .checkpoints import ADAPTER, net_weights, write_best, write_epoch
from .errors import TrainError
from .optim import lr_at
from .recipe import Recipe, recipe_data

REGISTERED = (KeepMasks,)  # the import registers the class, so that JSON and YAML recipes can name it


class SeedEpoch(Hook):
    """Seed everything at the start of each epoch, and restart gradient accumulation."""

    priority = "VERY_HIGH"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        seed_everything(self.seed, runner.epoch, runner.rank)
        # counts from 0 to the epoch's length: the last, partial group steps too, and no gradient crosses a checkpoint
        runner.optim_wrapper.initialize_count_status(runner.model, 0, len(runner.train_dataloader))


class LearningRate(Hook):
    """Set every group's learning rate before each optimizer step.

    lr_mult of a group scales the rate that the schedule decays from; lr_scale (timm's layer decay) scales the result.
    """

    priority = "HIGHEST"  # before MMEngine's hook logs it

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        first = batch_idx - batch_idx % self.recipe.accumulate  # first batch of this optimizer step
        epoch = runner.epoch + first / len(runner.train_dataloader)
        for group in runner.optim_wrapper.param_groups:
            top = self.recipe.optimizer.lr * group.get("lr_mult", 1.0)
            group["lr"] = lr_at(epoch, self.recipe.schedule, top) * group.get("lr_scale", 1.0)


class Ema(EMAHook):
    """Average weights and float buffers as timm does: no warm-up, one update per optimizer step."""

    def __init__(self, decay: float, accumulate: int) -> None:
        super().__init__(momentum=1 - decay, interval=accumulate, update_buffers=True, strict_load=True)

    def after_train_epoch(self, runner: Runner) -> None:
        all_reduce_params(self.ema_model.module.buffers(), op="mean")  # BatchNorm statistics differ between processes


class SaveCheckpoints(Hook):
    """Write the checkpoint after an epoch's validation; best.pth and LoRA adapters when top-1 is the best so far."""

    priority = "VERY_LOW"  # after EMA has swapped back and the log line is written

    def __init__(self, recipe: Recipe, work_dir: Path, classes: Sequence[str] | None) -> None:
        self.recipe = recipe
        self.work_dir = work_dir
        self.classes = classes
        self.best: dict[str, float] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["meta"]["best"]

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        improved = self.best is None or metrics["top1"] > self.best["top1"]
        if improved:
            self.best = {"epoch": runner.epoch, "top1": metrics["top1"]}
        due = runner.epoch % self.recipe.checkpoint.interval == 0 or runner.epoch == runner.max_epochs
        if not (improved or due):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        checkpoint = self._snapshot(runner, model)
        if improved:
            write_best(self.work_dir, checkpoint)
            if self.recipe.model.lora is not None:
                save_adapter(model.net, self.work_dir / ADAPTER, net_weights(checkpoint))
        if due:
            write_epoch(self.work_dir, checkpoint, self.recipe.checkpoint.keep)

    def _snapshot(self, runner: Runner, model: nn.Module) -> dict[str, Any]:
        checkpoint = {
            "meta": self._meta(runner),
            "state_dict": model.state_dict(),
            "optimizer": runner.optim_wrapper.state_dict(),
        }
        runner.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        return checkpoint

    def _meta(self, runner: Runner) -> dict[str, Any]:
        return {
            "epoch": runner.epoch,
            "iter": runner.iter,
            "seed": self.recipe.seed,
            "recipe": recipe_data(self.recipe),
            "classes": None if self.classes is None else list(self.classes),
            "processes": get_dist_info()[1],
            "best": self.best,
            "versions": {name: version(name) for name in ("foveate", "torch", "timm", "mmengine")},
        }


def build_hooks(recipe: Recipe) -> list[Hook]:
    """Build the hooks that the recipe names, by their names in MMEngine's registry. Nothing is imported.

    Raises:
        TrainError: unknown hook, invalid arguments, or an argument that names something to import.
    """
    return [_build_hook(request) for request in recipe.hooks]


def _build_hook(request: Mapping[str, Any]) -> Hook:
    kind = request.get("type")
    if not isinstance(kind, str) or kind not in HOOKS.module_dict:
        near = did_you_mean(str(kind).rpartition(".")[2], HOOKS.module_dict)
        raise TrainError(
            f"hooks: no hook is registered as {kind!r}{near} (a Python recipe can import the class of another hook)"
        )
    if (named := _unregistered(request)) is not None:
        raise TrainError(f"hooks: {kind} would import {named!r}; only registered names are allowed")
    try:
        return HOOKS.build(dict(request))
    except Exception as error:  # a hook may refuse its arguments in any way
        raise TrainError(f"hooks: cannot build {kind!r}: {first_line(error)}") from error


def _unregistered(value: Any) -> str | None:
    """Return a name that MMEngine's registries would import: from `_scope_`, or `type`, `ema_type` and similar keys."""
    found: Iterable[Any] = ()
    if isinstance(value, Mapping):
        types = (v for k, v in value.items() if str(k).endswith("type") and isinstance(v, str) and not _registered(v))
        scopes = (v for k, v in value.items() if k == "_scope_")
        found = (*types, *scopes, *map(_unregistered, value.values()))
    elif isinstance(value, list | tuple):
        found = map(_unregistered, value)
    return next((str(name) for name in found if name is not None), None)


def _registered(name: str) -> bool:
    return any(name in registry.module_dict for registry in vars(registries).values() if isinstance(registry, Registry))


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from any tuple of numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
