"""Select single weights: the lowest scores of all weights that are ranked together."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .criteria import Scope, Scores
from .errors import PruningError

Masks = dict[str, Tensor]  # parameter name -> bool, of the parameter's shape; True: kept
Thresholds = dict[str, float]  # what is ranked together -> the lowest score that is kept


def bucket(name: str, group: str, scope: Scope) -> str:
    """Return the name of the ranking that a weight belongs to."""
    return {"layer": name, "group": group, "model": "model"}[scope]


def keep_highest(scores: Scores, groups: Mapping[str, str], ratio: float, scope: Scope) -> tuple[Masks, Thresholds]:
    """Drop exactly the lowest `ratio` of each ranking's weights; of equal scores the first are dropped.

    Raises:
        PruningError: a layer would be left without a weight.
    """
    buckets: dict[str, list[str]] = {}
    for name in scores:
        buckets.setdefault(bucket(name, groups[name], scope), []).append(name)
    masks, thresholds = {}, {}
    for label, names in buckets.items():
        ranked = torch.cat([scores[name].flatten() for name in names])
        kept = torch.ones_like(ranked, dtype=torch.bool)
        kept[lowest(ranked, round(ratio * ranked.numel()))] = False
        thresholds[label] = float(ranked[kept].min()) if kept.any() else float("inf")
        for name, part in zip(names, kept.split([scores[name].numel() for name in names]), strict=True):
            masks[name] = part.view(scores[name].shape)
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        raise PruningError(f"ratio {ratio:g} would leave {empty[0]} without a weight ({len(empty)} layers); lower it")
    return masks, thresholds


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` lowest entries of a flat tensor; of equal entries the first. Cost: linear."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    limit = scores.kthvalue(count).values
    below = (scores < limit).nonzero().flatten()
    equal = (scores == limit).nonzero().flatten()
    return torch.cat([below, equal[: count - len(below)]])


def two_of_four(scores: Scores) -> Masks:
    """Keep the two highest of every four neighboring weights in a row: the pattern of sparse tensor cores.

    Only matrices and 1x1 convolutions with a multiple of four inputs; other weights get no mask.
    """
    masks = {}
    for name, score in scores.items():
        columns = score[0].numel()
        if columns % 4 == 0 and columns == score.shape[1]:
            fours = score.reshape(-1, 4)
            best = fours.argsort(dim=1, descending=True, stable=True)[:, :2]
            masks[name] = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, best, True).view(score.shape)
    return masks


def stage_of(name: str) -> str:
    """Return the stage that a parameter belongs to, by its name."""
    found = re.match(r"((?:stages|layers|levels|blocks)\.\d+|layer\d+)(?=\.)", name)
    return found[1] if found else name.partition(".")[0]
