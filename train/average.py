"""Moving averages of the weights (EMA): timm's, updated once after each optimizer step."""

from typing import Any

import torch
from mmengine.dist import all_reduce_params, get_dist_info
from mmengine.hooks import Hook
from mmengine.runner import Runner
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .parallel import load_model_state, model_state
from .together import unwrapped

_PREFIX = "module."  # of the raw weights' names in a checkpoint


class Ema(Hook):
    """Average weights and float buffers after each optimizer step, and let validation measure them too.

    With the warm-up the decay of step n is at most 1 - n ** (-2/3): a short run averages a part of its steps, and the
    first values, which are random, are forgotten. The first step copies the weights.
    """

    priority = "NORMAL"

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True, sharded: bool = False) -> None:
        """Args:
        model: not sharded yet, which could not be copied.
        """
        self.average = ModelEmaV3(model, decay=decay, use_warmup=warmup, foreach=not sharded)
        self.average.requires_grad_(False)
        self.sharded = sharded
        self.steps = 0

    def before_train(self, runner: Runner) -> None:
        runner.val_loop.average = self.average.module

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.optim_wrapper.stepped:
            self.steps += 1
            self.average.update(unwrapped(runner.model), step=self.steps)

    def after_train_epoch(self, runner: Runner) -> None:
        all_reduce_params(self.average.module.buffers(), op="mean")  # BatchNorm statistics differ between processes

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Put the averages in the place of the raw weights, which go to ema_state_dict."""
        raw = {f"{_PREFIX}{name}": value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = model_state(self.average.module, self.sharded)
        checkpoint["ema_state_dict"] = raw | {"steps": torch.tensor(self.steps)}
        checkpoint["meta"]["weights"] = "averaged"
        if get_dist_info()[1] > 1:
            checkpoint["process"]["averaged_buffers"] = _buffers(self.average.module)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        averages = checkpoint["state_dict"]
        checkpoint["state_dict"] = raw_weights(checkpoint)
        load_model_state(self.average.module, averages, self.sharded)
        self.steps = int(checkpoint["ema_state_dict"]["steps"])
        _load_buffers(self.average.module, checkpoint["process"].get("averaged_buffers"))


class Buffers(Hook):
    """Make BatchNorm statistics those of all processes after an epoch, and save those of each within an epoch."""

    priority = "NORMAL"

    def after_train_epoch(self, runner: Runner) -> None:
        all_reduce_params(runner.model.buffers(), op="mean")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["process"]["buffers"] = _buffers(unwrapped(runner.model))

    def after_resume(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Load this process's statistics, after the weights, with those of process 0."""
        _load_buffers(unwrapped(runner.model), checkpoint["process"].get("buffers"))


def raw_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of the raw weights in a checkpoint with averages."""
    given = checkpoint["ema_state_dict"].items()
    return {name.removeprefix(_PREFIX): value for name, value in given if name.startswith(_PREFIX)}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def _load_buffers(model: nn.Module, given: dict[str, Tensor] | None) -> None:
    if given is None:
        return
    for name, buffer in model.named_buffers():
        buffer.copy_(given[name])
