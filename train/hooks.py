"""Hooks that make a run repeatable (seeds, learning rate, end of mixing), and hooks that a recipe names.

The random numbers of a step depend on (seed, epoch, batch, process) only, those of an image's augmentation on (seed,
epoch, place in the epoch). So a resumed run equals an uninterrupted one bit for bit, from any step on.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mmengine import registry as registries
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, Registry
from mmengine.runner import Runner

from .._errors import RequestError, did_you_mean, first_line
from ..pruning.hook import KeepMasks
from .errors import TrainError
from .images import seed_everything
from .optim import lr_at
from .recipe import Recipe
from .together import unwrapped

__all__ = ["REGISTERED", "LearningRate", "MixingEnds", "Seeds", "build_hooks", "seed_everything", "start_hook"]

REGISTERED = (KeepMasks,)  # the import registers the class, so that JSON and YAML recipes can name it


class Seeds(Hook):
    """Seed everything before each step, and restart gradient accumulation in each epoch."""

    priority = "VERY_HIGH"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        # counts up to the epoch's length: the last, partial group steps too, and no gradient crosses a checkpoint
        batches = len(runner.train_dataloader)
        runner.optim_wrapper.initialize_count_status(runner.model, runner.train_loop.batch, batches)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(self.seed, runner.epoch, batch_idx, runner.rank)


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


class MixingEnds(Hook):
    """Turn mixup and cutmix off after some epochs; targets stay smoothed."""

    priority = "VERY_HIGH"

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def before_train_epoch(self, runner: Runner) -> None:
        unwrapped(runner.model).data_preprocessor.mix.mixup_enabled = runner.epoch < self.epochs


def start_hook(hook: Hook, stage: str, runner: Runner) -> None:
    """Call a hook that a recipe names, before the first step.

    Raises:
        TrainError: it does not start, for example because of an argument that it checks only now.
    """
    try:
        getattr(hook, stage)(runner)
    except (RequestError, OSError):
        raise
    except Exception as error:  # a hook may fail in any way
        name = type(hook).__name__
        raise TrainError(f"hooks: {name} cannot start: {type(error).__name__}: {first_line(error)}") from error


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
