"""Prune timm models: scores with and without data, masks that are kept in fine-tuning, and smaller layers."""

from ..backbones._pruning import AttentionLayout, Projection, Prunable
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
    "AttentionLayout",
    "HeadImportance",
    "Plan",
    "Projection",
    "Prunable",
    "PruningError",
    "compress",
    "declared",
    "group_of_weights",
    "head_importance",
    "plan",
    "share_of_larger",
]
