"""Build and check the parts of a run, and say what they are, before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from torch.utils.data import DataLoader

from .checkpoints import read_checkpoint
from .data import build_loaders
from .dcal import check_branches
from .describe import Run, describe_run
from .hooks import build_hooks, seed_everything
from .model import Classifier, build_net, check_runs
from .parallel import prepare_net
from .phases import check_phase, start_phase
from .recipe import Recipe
from .teacher import Teacher


@dataclass(frozen=True)
class Parts:
    """What a run is built from."""

    recipe: Recipe
    model: Classifier
    train_loader: DataLoader
    val_loader: DataLoader
    classes: list[str] | None
    named_hooks: list[Hook]


def build_parts(recipe: Recipe, checkpoint: Path | None, place: torch.device, say: Callable[[str], None]) -> Parts:
    """Build the parts of a run, and pass the lines of `describe_run` to `say`.

    Args:
        checkpoint: from which the run is resumed, for the number of epochs that are left.

    Raises:
        TrainError: a part that cannot be built, or that does not run.
    """
    seed_everything(recipe.seed)
    named_hooks = build_hooks(recipe)
    notes: list[str] = []
    net = prepare_net(build_net(recipe, notes.append), recipe, place)
    check_branches(net, recipe)
    start_phase(net, recipe)
    teacher = None if recipe.distill is None else Teacher(recipe, recipe.distill, place)
    model = Classifier(recipe, net, teacher).to(place)
    check_runs(model, recipe)
    check_phase(model, recipe)
    train_loader, val_loader, classes = build_loaders(recipe, pin_memory=place.type == "cuda", keeps_workers=True)
    done = 0 if checkpoint is None else read_checkpoint(checkpoint)["meta"]["epoch"]
    for line in describe_run(Run(recipe, model, train_loader, val_loader, get_dist_info()[1], place, notes, done)):
        say(line)
    return Parts(recipe, model, train_loader, val_loader, classes, named_hooks)
