"""Search for the ratio that meets a cost: bisection with a measurement of every candidate."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .._modes import evaluating
from .counts import example_image
from .errors import PruningError
from .plan import Plan

HIGHEST_RATIO = 0.99


def macs_of(plan: Plan, model: nn.Module) -> float:
    """Return the multiply-adds of one image, in 1e9, by non-zero weights."""
    return plan.counts.macs_after / 1e9


@dataclass(frozen=True)
class Latency:
    """Measures the median time of one batch on the model's device, in ms."""

    batch: int = 1
    rounds: int = 9
    img_size: int | tuple[int, int] | None = None

    def __call__(self, plan: Plan, model: nn.Module) -> float:
        return self.of(plan.cut(model))

    @torch.inference_mode()
    def of(self, model: nn.Module) -> float:
        image = example_image(model, self.img_size)
        images = image.expand(self.batch, -1, -1, -1).contiguous()
        taken = []
        with evaluating(model):
            for turn in range(self.rounds + 2):  # two to warm up
                start = time.perf_counter()
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if turn >= 2:
                    taken.append(1e3 * (time.perf_counter() - start))
        return statistics.median(taken)


def plan_until(
    model: nn.Module,
    make_plan: Callable[[float], Plan],
    cost: Callable[[Plan, nn.Module], float],
    target: float,
    *,
    unit: str,
    steps: int = 8,
) -> Plan:
    """Return the plan with the lowest ratio whose cost is at most `target`; precision of the ratio: 1 / 2^steps.

    Args:
        make_plan: maps a ratio to a plan; may raise PruningError if the ratio is too high.
        cost: cost of a plan; decreases with the ratio.
        unit: unit of the target, for messages.

    Raises:
        PruningError: no ratio meets the target.
    """
    if not 0 < target < math.inf:
        raise PruningError(f"the target must be a number above 0 {unit}, got {target:g}")
    found = make_plan(0.0)
    least = cost(found, model)
    if least <= target:
        return found
    lowest: Plan | None = None
    low, high = 0.0, HIGHEST_RATIO
    for _ in range(steps):
        ratio = (low + high) / 2
        try:
            plan = make_plan(ratio)
        except PruningError:
            high = ratio
            continue
        reached = cost(plan, model)
        least = min(least, reached)
        if reached <= target:
            lowest, high = plan, ratio
        else:
            low = ratio
    if lowest is None:
        raise PruningError(f"no ratio brings the model to {target:g} {unit}: the lowest cost was {least:.4g} {unit}")
    return lowest
