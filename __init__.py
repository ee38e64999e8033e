"""Vision backbones with efficient attention as timm models, on one set of 2-D attention ops.

Importing the package registers every model with timm: `timm.create_model("nat_mini")`.
"""

from . import backbones
from ._version import __version__
from .attention_ops import reattend
from .backbones import list_models
from .fusion import cpu_report, fuse, keep_memory, unfuse

__all__ = ["__version__", "backbones", "cpu_report", "fuse", "keep_memory", "list_models", "reattend", "unfuse"]
