"""Prune timm models: honest data-free scores, masks that survive fine-tuning, and shapes that shrink."""

from .criteria import CRITERIA, share_of_larger
from .errors import PruningError
from .groups import GROUPS, declared, group_of_weights
from .heads import HeadImportance, head_importance
from .plan import Plan
from .planning import plan
from .sparse import compress

__all__ = [
    "CRITERIA",
    "GROUPS",
    "HeadImportance",
    "Plan",
    "PruningError",
    "compress",
    "declared",
    "group_of_weights",
    "head_importance",
    "plan",
    "share_of_larger",
]
