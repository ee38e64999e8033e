"""Train and fine-tune from recipes: timm's models, data and optimizers in MMEngine's loop."""

from .checkpoints import export_adapter, export_weights, load_net
from .errors import DivergedError, MissingPackageError, StoppedError, StorageError, TrainError
from .lock import FolderInUseError
from .recipe import Recipe
from .recipe_files import find_recipe, list_recipes, load_recipe
from .report import read_scalars
from .runner import EvalResult, TrainResult, dry_run, evaluate, train
from .validate import Validation, ValidationRequest, validate

__all__ = [
    "DivergedError",
    "EvalResult",
    "FolderInUseError",
    "MissingPackageError",
    "Recipe",
    "StoppedError",
    "StorageError",
    "TrainError",
    "TrainResult",
    "Validation",
    "ValidationRequest",
    "dry_run",
    "evaluate",
    "export_adapter",
    "export_weights",
    "find_recipe",
    "list_recipes",
    "load_net",
    "load_recipe",
    "read_scalars",
    "train",
    "validate",
]
