"""Merge results of attention to disjoint sets of keys, as if the keys had been one set.

Papers     Rabe and Staats 2021, arXiv:2112.05682; Hassani et al. 2025, arXiv:2504.16922 (additional keys).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._attend import accumulator
from ._checks import check_alike, check_device

OP = "merge_attention"


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention of the same queries to disjoint sets of keys.

    Plain differentiable torch: gradients flow to all outputs and log-sum-exps. A result whose log-sum-exp is -inf has
    seen no key and changes nothing, whatever its output holds.

    Cost: one pass over the outputs.

    Args:
        outs: outputs, each (..., heads, head_dim), one shape, dtype and device; at least one.
        lses: their log-sum-exps, each (..., heads), natural logarithms of sums of exp(logit), floating point.

    Returns:
        The output, shape and dtype of outs[0], and its log-sum-exp, (..., heads), float32, or float64 where one of the
        arguments is. Queries that see no key in any set: 0 and -inf.

    Raises:
        ValueError: there is no output, the numbers of outs and lses differ, or shapes, dtypes or devices disagree.
    """
    _check(outs, lses)
    wide = torch.promote_types(accumulator(outs[0].dtype), accumulator(lses[0].dtype))
    logs = torch.stack([lse.to(wide) for lse in lses])  # (sets, ..., heads)
    top = logs.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)  # exp(-inf - 0) is 0, exp(-inf - -inf) is NaN
    parts = (logs - top).exp()
    total = parts.sum(0)
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, -torch.inf, top + total.log())
    weights = (parts / total)[..., None]
    seen = (logs > -torch.inf)[..., None]
    sum_of_outs = sum(w * torch.where(s, out, 0).to(wide) for w, s, out in zip(weights, seen, outs, strict=True))
    return sum_of_outs.to(outs[0].dtype), lse


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outs) != len(lses) or len(outs) == 0:
        raise ValueError(f"{OP}: outs and lses must be as many, at least one, got {len(outs)} and {len(lses)}")
    first = outs[0]
    if first.dim() < 2:
        raise ValueError(f"{OP}: outs must be (..., heads, head_dim), got shape {tuple(first.shape)}")
    check_alike(OP, **{f"outs[{i}]": out for i, out in enumerate(outs)})
    check_alike(OP, **{f"lses[{i}]": lse for i, lse in enumerate(lses)})
    check_device(OP, "lses[0]", lses[0], "outs[0]", first)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != first.shape:
            raise ValueError(
                f"{OP}: outs[{i}] must have the shape of outs[0] {tuple(first.shape)}, got {tuple(out.shape)}"
            )
        if lse.shape != first.shape[:-1]:
            raise ValueError(f"{OP}: lses[{i}] must be {tuple(first.shape[:-1])}, as outs[0], got {tuple(lse.shape)}")
