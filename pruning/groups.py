"""The module group of each weight, as the model's family declares it."""

import re
from collections.abc import Sequence

from torch import nn

from ..backbones._pruning import Prunable
from .errors import PruningError
from .timm_groups import TIMM_GROUPS

GROUPS = ("qkv", "prj", "mlp", "conv", "depthwise", "gate")
"""Names of module groups of weights."""
USUAL = ("qkv", "prj", "mlp", "conv")  # the default groups: matrices, as in DIMAP's paper


def declared(model: nn.Module) -> Prunable:
    """Return the pruning declaration of the model's family.

    Raises:
        PruningError: there is none.
    """
    own = getattr(type(model), "prunable", None)
    if isinstance(own, Prunable):
        return own
    for family, groups in TIMM_GROUPS.items():
        if isinstance(model, family):
            return groups
    raise PruningError(
        f"{type(model).__name__} declares no module groups: give its class an attribute `prunable` "
        "(foveate.pruning.Prunable)"
    )


def group_of_weights(model: nn.Module, groups: Sequence[str] | None = None, *, strict: bool = True) -> dict[str, str]:
    """Return parameter name -> module group, in the model's order.

    Args:
        groups: names of groups; None: QKV, PRJ, MLP and convolutions, as far as the model has them.
        strict: refuse a group without weights in this model.

    Raises:
        PruningError: no pruning declaration, an unknown group, or a group without weights.
    """
    family = declared(model)
    strict = strict and groups is not None
    found: dict[str, str] = {}
    for group in USUAL if groups is None else groups:
        if group not in GROUPS:
            raise PruningError(f"unknown group {group!r}; known: {', '.join(GROUPS)}")
        pattern = getattr(family, group)
        names = [] if pattern is None else [n for n, _ in model.named_parameters() if re.fullmatch(pattern, n)]
        if strict and not names:
            raise PruningError(f"group {group}: {type(model).__name__} has no such weights; {_present(model)}")
        found |= dict.fromkeys(names, group)
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def _present(model: nn.Module) -> str:
    return "it has " + ", ".join(dict.fromkeys(group_of_weights(model, GROUPS, strict=False).values()))
