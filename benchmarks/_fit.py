"""What follows from timings: constants of the kernels (cost model of tiles, fastest value), and growth with size."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

V = TypeVar("V")
MARGIN = 0.02  # of the time; a value that gains less is noise, and the one in use stays
_STEP_OVERHEADS = torch.arange(0, 48.5, 0.5, dtype=torch.float64)
_PROGRAM_OVERHEADS = torch.arange(0, 1005, 5, dtype=torch.float64)


@dataclass(frozen=True)
class Timed:
    """One kernel with one choice of tiles, in the numbers of the cost model.

    Args:
        group: the layer and the kernel; times are compared inside a group only.
        logits: computed by all programs.
        loaded: owners and walked tokens of all steps of all programs.
        owned: owners of all programs.
        us: measured.
    """

    group: Hashable
    logits: float
    loaded: float
    owned: float
    us: float


def fit_costs(timed: Sequence[Timed]) -> tuple[float, float]:
    """Return (PROGRAM_OVERHEAD, STEP_OVERHEAD), in logits.

    The model: us = a * (logits + STEP_OVERHEAD * loaded + PROGRAM_OVERHEAD * owned), with a number a for each group.
    The two overheads are those of least squared error of log(us), on a grid of 5 and of 0.5.

    Raises:
        ValueError: no group has three timings, so that nothing follows from them.
    """
    groups: dict[Hashable, list[Timed]] = {}
    for one in timed:
        groups.setdefault(one.group, []).append(one)
    if max((len(group) for group in groups.values()), default=0) < 3:
        raise ValueError("fit_costs: at least three timings of one layer and kernel are needed")
    error = torch.zeros(len(_PROGRAM_OVERHEADS), len(_STEP_OVERHEADS), dtype=torch.float64)
    for group in groups.values():
        logs = torch.stack([_log_error(one) for one in group])
        error += ((logs - logs.mean(0)) ** 2).sum(0)
    best = int(error.argmin())
    rows, cols = best // len(_STEP_OVERHEADS), best % len(_STEP_OVERHEADS)
    return float(_PROGRAM_OVERHEADS[rows]), float(_STEP_OVERHEADS[cols])


def _log_error(one: Timed) -> torch.Tensor:
    """(program overheads, step overheads): the logarithm of the time over the model's work."""
    work = one.logits + _PROGRAM_OVERHEADS[:, None] * one.owned + _STEP_OVERHEADS * one.loaded
    return math.log(one.us) - work.log()


def fastest(times: Mapping[str, Mapping[V, float]], now: V) -> V:
    """Return the value of least time over all groups, as geometric mean of us / (us of the value in use).

    A value that a group does not have (the kernel did not run with it) cannot be chosen. `now` stays where no value
    gains MARGIN.

    Raises:
        ValueError: there is no group, or one without a time for `now`.
    """
    if not times or any(now not in group for group in times.values()):
        raise ValueError(f"fastest: every group needs a time for the value in use, {now!r}")
    common = set.intersection(*(set(group) for group in times.values()))
    ratios = {value: _mean_ratio(times, value, now) for value in next(iter(times.values())) if value in common}
    best = min(ratios, key=lambda value: ratios[value])
    return best if ratios[best] < 1 - MARGIN else now


def _mean_ratio(times: Mapping[str, Mapping[V, float]], value: V, now: V) -> float:
    logs = [math.log(group[value] / group[now]) for group in times.values()]
    return math.exp(sum(logs) / len(logs))


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return e of value = a * size ** e: the slope of least squares of log(value) over log(size).

    Raises:
        ValueError: fewer than two different sizes, or a number that is not above 0.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(f"growth_exponent: wanted values above 0 at two or more sizes, got {values} at {sizes}")
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
