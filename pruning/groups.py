"""Which weights of a model form which module group, as its family declares."""

import re
from collections.abc import Sequence

from torch import nn

from ..backbones._pruning import Prunable
from .errors import PruningError
from .timm_groups import TIMM_GROUPS

GROUPS = ("qkv", "prj", "mlp", "conv", "depthwise", "gate")
USUAL = ("qkv", "prj", "mlp", "conv")  # what goes unless the caller names groups: matrices, as in DIMAP's paper


def declared(model: nn.Module) -> Prunable:
    """Return what the model's family declares.

    Raises:
        PruningError: the family declares nothing.
    """
    own = getattr(type(model), "prunable", None)
    if isinstance(own, Prunable):
        return own
    for family, groups in TIMM_GROUPS.items():
        if isinstance(model, family):
            return groups
    raise PruningError(
        f"{type(model).__name__} declares no module groups: give its class an attribute `prunable` "
        "(foveate.backbones._pruning.Prunable)"
    )


def group_of_weights(model: nn.Module, groups: Sequence[str] | None = None, *, strict: bool = True) -> dict[str, str]:
    """Return parameter name -> module group, in the model's order.

    Args:
        groups: names of groups; QKV, PRJ, MLP and convolutions, as far as the model has them, when None.
        strict: refuse a group of which the model has no weights.

    Raises:
        PruningError: the model declares nothing, or not this group.
    """
    family = declared(model)
    strict = strict and groups is not None
    found = {}
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
