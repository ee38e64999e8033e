"""Prune timm models: honest data-free scores, masks that survive fine-tuning, and shapes that shrink."""

from .criteria import CRITERIA, share_of_larger
from .errors import PruningError
from .groups import GROUPS, declared, group_of_weights
from .plan import Plan
from .planning import plan

__all__ = [
    "CRITERIA",
    "GROUPS",
    "Plan",
    "PruningError",
    "declared",
    "group_of_weights",
    "plan",
    "share_of_larger",
]
