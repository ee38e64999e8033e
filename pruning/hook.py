"""Fine-tuning under a plan: what was zeroed stays zero. A recipe names the hook:

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
    """Zero a plan's weights before training and after every optimiser step.

    Args:
        plan: the file that `Plan.save` or `foveate prune` wrote.

    Raises:
        PruningError: the file is no plan; at the start of training: it is of another model.
    """

    priority = "ABOVE_NORMAL"  # after the optimiser, before weights are averaged and saved

    def __init__(self, plan: str) -> None:
        self.plan = Plan.load(plan)
        self.gone: list[tuple[Tensor, Tensor]] = []  # parameters, and where they are zero

    def before_run(self, runner: Runner) -> None:
        self.plan.apply(_net(runner.model))  # averages of weights start from this

    def before_train(self, runner: Runner) -> None:
        net = self.plan.apply(_net(runner.model))  # once more: weights may have been loaded
        parameters = dict(net.named_parameters())
        self.gone = [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in self.plan.masks.items()]

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        for parameter, gone in self.gone:
            parameter.masked_fill_(gone, 0)


def _net(model: nn.Module) -> nn.Module:
    """The timm model inside the wrappers of training."""
    model = model.module if is_model_wrapper(model) else model
    return getattr(model, "net", model)
