"""timm's optimizers and learning-rate schedule for MMEngine's loop."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from .._errors import did_you_mean, first_line
from .errors import TrainError
from .recipe import OptimizerRecipe, Recipe, ScheduleRecipe
from .stepper import Stepper
from .together import Flags


def build_optimizer(net: nn.Module, recipe: OptimizerRecipe) -> Optimizer:
    """Create timm's optimizer with the parameter groups of a timm model.

    Raises:
        TrainError: unknown optimizer, an argument that it does not have, a pattern of lr_mult or also_decay that
            matches no parameter, or a pattern of lr_mult that matches a parameter of another.
    """
    if recipe.opt not in list_optimizers():
        raise TrainError(
            f"optimizer.opt: unknown optimizer {recipe.opt!r}" + did_you_mean(recipe.opt, map(str, list_optimizers()))
        )
    names = ("betas", "eps", "momentum", "layer_decay")
    given = {name: value for name in names if (value := getattr(recipe, name)) is not None}
    info = get_optimizer_info(recipe.opt)
    for name in ("betas", "eps", "momentum"):
        if name in given and not getattr(info, f"has_{name}"):  # timm would drop it
            raise TrainError(f"optimizer.{name}: {recipe.opt} does not have this argument, got {given[name]}")
    try:
        optimizer = create_optimizer_v2(net, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **given)
    except TypeError as error:
        raise TrainError(f"optimizer: {recipe.opt} does not take these arguments: {first_line(error)}") from error
    _split_groups(optimizer, "lr_mult", _factors(net, recipe.lr_mult), 1.0)
    decayed = _decayed(net, optimizer, recipe.also_decay)
    _split_groups(optimizer, "weight_decay", dict.fromkeys(decayed, recipe.weight_decay), None)
    return optimizer


def _factors(net: nn.Module, lr_mult: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """Return the parameters that a pattern matches, each with its factor of the learning rate."""
    factors: dict[nn.Parameter, float] = {}
    for pattern, factor in lr_mult.items():
        matched = _matched(net, "lr_mult", pattern)
        if twice := [name for name, p in matched.items() if p in factors]:
            raise TrainError(f"optimizer.lr_mult: {pattern!r} matches {twice[0]}, as another pattern does")
        factors |= dict.fromkeys(matched.values(), factor)
    return factors


def _decayed(net: nn.Module, optimizer: Optimizer, patterns: Sequence[str]) -> set[nn.Parameter]:
    """Return the parameters that a pattern matches; each pattern must add one that had no weight decay."""
    without = {p for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        matched = set(_matched(net, "also_decay", pattern).values())
        if not matched & without:
            raise TrainError(f"optimizer.also_decay: {pattern!r} matches parameters that have weight decay anyway")
        found |= matched
    return found


def _matched(net: nn.Module, key: str, pattern: str) -> dict[str, nn.Parameter]:
    matched = {name: p for name, p in net.named_parameters() if fnmatchcase(name, pattern)}
    if not matched:
        raise TrainError(f"optimizer.{key}: {pattern!r} matches no parameter of the model")
    return matched


def _split_groups(optimizer: Optimizer, key: str, values: Mapping[nn.Parameter, float], default: float | None) -> None:
    """Move parameters with their own value of the option `key` to new groups, with the other options of the old group.

    Args:
        default: value of all other parameters; None: that of their group.
    """
    for group in list(optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            value = values.get(parameter, group[key] if default is None else default)
            parts.setdefault(value, []).append(parameter)
        group[key], group["params"] = parts.popitem()
        for value, parameters in parts.items():
            optimizer.add_param_group({**options, "params": parameters, key: value})


def build_optim_wrapper(net: nn.Module, recipe: Recipe, flags: Flags | None = None) -> Stepper:
    """Wrap the optimizer with clipping, accumulation and, for fp16, loss scaling."""
    optimizer = build_optimizer(net, recipe.optimizer)
    head = net.get_classifier() if recipe.optimizer.clip_mode == "agc" else None  # type: ignore[operator]  # timm's
    return Stepper(
        optimizer,
        flags or Flags(),
        accumulate=recipe.accumulate,
        clip=recipe.optimizer.clip_grad,
        clip_mode=recipe.optimizer.clip_mode or "norm",
        unclipped=list(head.parameters()) if isinstance(head, nn.Module) else (),
        scaler=torch.amp.GradScaler() if recipe.precision == "fp16" else None,
    )


def lr_at(epoch: float, schedule: ScheduleRecipe, lr: float) -> float:
    """Return the learning rate after `epoch` epochs, fractions included.

    As in timm, the decay runs from epoch 0 to `epochs`, the warm-up replaces its first part (and so ends with a small
    step down), and the cool-down keeps the last rate. Steps multiply the rate after every `step_epochs`, never below
    min_lr. With `per` "epoch" the rate is that of the start of the epoch.
    """
    epoch = max(0.0, epoch - schedule.delay_epochs)
    if schedule.per == "epoch":
        epoch = math.floor(epoch + 1e-9)  # a fraction of batches may round below a whole epoch
    if epoch < schedule.warmup_epochs:
        start = schedule.warmup_lr or 0.0
        return start + (lr - start) * epoch / schedule.warmup_epochs
    if schedule.kind == "constant":
        return lr
    if schedule.kind == "step":
        assert schedule.step_rate is not None and schedule.step_epochs is not None  # checked by the recipe
        return max(schedule.min_lr, lr * schedule.step_rate ** int(min(epoch, schedule.epochs) / schedule.step_epochs))
    done = min(epoch / schedule.epochs, 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return schedule.min_lr + (lr - schedule.min_lr) * left
