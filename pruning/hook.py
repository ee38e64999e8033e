"""Keep the pruned weights of a plan at zero in fine-tuning. A recipe names the hook:

from foveate.pruning.hook import KeepMasks

hooks = [dict(type=KeepMasks, plan="OUT/plan.json")]  # in .json and .yaml recipes: type KeepMasks
"""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from .plan import Plan


@HOOKS.register_module()
class KeepMasks(Hook):
    """Zero the weights of a plan before training and after every optimizer step.

    Args:
        plan: path of a file written by `Plan.save` or `foveate prune`.

    Raises:
        PruningError: the file is not a plan, or (at the start of training) it belongs to another model.
    """

    priority = "ABOVE_NORMAL"  # after the optimizer, before weights are averaged and saved

    def __init__(self, plan: str) -> None:
        self.plan = Plan.load(plan)
        self.gone: list[tuple[Tensor, Tensor]] = []  # parameter, and mask of its zeros

    def before_run(self, runner: Runner) -> None:
        self.plan.apply(_net(runner.model))  # EMA starts from these weights

    def before_train(self, runner: Runner) -> None:
        net = self.plan.apply(_net(runner.model))  # again: weights may have been loaded
        parameters = dict(net.named_parameters())
        self.gone = [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in self.plan.masks.items()]

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        for parameter, gone in self.gone:
            parameter.masked_fill_(gone, 0)


def _net(model: nn.Module) -> nn.Module:
    """Return the timm model inside the wrappers of training."""
    inner: Any = model.module if is_model_wrapper(model) else model
    return getattr(inner, "net", inner)
