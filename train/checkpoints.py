"""Checkpoints that are either complete or absent, hold nothing but tensors and plain data, and load with weights_only.

A work_dir holds epoch_N.pth (the newest few, everything a resumed run needs), best.pth (weights alone) and
last_checkpoint (the name of the newest). Keys: meta, state_dict (EMA weights where EMA is on), optimizer,
ema_state_dict (then the raw weights and the EMA's step count).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._errors import first_line
from .._files import PART, atomic_path
from .errors import TrainError
from .model import build_net
from .recipe import Recipe, read_recipe

POINTER = "last_checkpoint"
BEST = "best.pth"
_EPOCH = re.compile(r"epoch_(\d+)\.pth")
_NET = "net."  # Classifier's attribute


def write_epoch(work_dir: Path, checkpoint: dict[str, Any], keep: int) -> Path:
    """Write epoch_N.pth, point last_checkpoint at it, then remove all but the newest `keep`."""
    path = work_dir / f"epoch_{checkpoint['meta']['epoch']}.pth"
    with atomic_path(path) as part:
        torch.save(checkpoint, part)
    with atomic_path(work_dir / POINTER) as part:
        part.write_text(f"{path.name}\n")
    for old in list_epochs(work_dir)[keep:]:
        old.unlink()
    return path


def write_best(work_dir: Path, checkpoint: dict[str, Any]) -> Path:
    path = work_dir / BEST
    weights = {key: checkpoint[key] for key in ("meta", "state_dict")}
    with atomic_path(path) as part:
        torch.save(weights, part)
    return path


def list_epochs(work_dir: Path) -> list[Path]:
    """Return the epoch files of a work_dir, newest first."""
    found = {int(m[1]): path for path in work_dir.glob("epoch_*.pth") if (m := _EPOCH.fullmatch(path.name))}
    return [found[epoch] for epoch in sorted(found, reverse=True)]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU; nothing in it can run code.

    Raises:
        TrainError: missing, truncated, or not a checkpoint of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise TrainError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, end of file, class not allowed: torch raises a type for each
        raise TrainError(f"checkpoint {path} is truncated or damaged: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or not {"meta", "state_dict"} <= checkpoint.keys():
        raise TrainError(f"checkpoint {path} was not written by foveate train: no meta and state_dict in it")
    return checkpoint


def find_resumable(work_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint, None where there is none; say which ones had to be passed over."""
    for part in work_dir.glob(f".*{PART}"):  # what a killed process was writing
        rmtree(part)
    candidates = list_epochs(work_dir)
    for path in candidates:
        try:
            read_checkpoint(path)
        except TrainError as error:
            say(f"{error}; trying the one before")
            continue
        return path
    if candidates:
        raise TrainError(f"{work_dir}: none of its {len(candidates)} checkpoints is complete; use another work_dir")
    return None


def recipe_of(checkpoint: dict[str, Any]) -> Recipe:
    return read_recipe(checkpoint["meta"]["recipe"])


def net_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the timm model's own state dict: EMA weights where EMA was on."""
    return {k.removeprefix(_NET): v for k, v in checkpoint["state_dict"].items() if k.startswith(_NET)}


def load_net(path: str | Path) -> nn.Module:
    """Build the model that a checkpoint was trained with, in eval mode, with its weights (EMA where EMA was on)."""
    checkpoint = read_checkpoint(path)
    net = build_net(from_scratch(recipe_of(checkpoint)))
    net.load_state_dict(net_weights(checkpoint))
    return net.eval()


def from_scratch(recipe: Recipe) -> Recipe:
    """Return the recipe without the weights it starts from: for a model that is about to be given others."""
    return replace(recipe, model=replace(recipe.model, pretrained=False, checkpoint=None))


def export_weights(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the model's plain state dict, as timm loads it, to a .safetensors or .pth file."""
    out = Path(out)
    if out.suffix not in (".safetensors", ".pth"):
        raise TrainError(f"{out}: wanted a name that ends in .safetensors or .pth")
    if not out.parent.is_dir():
        raise TrainError(f"{out}: the folder {out.parent} does not exist")
    loaded = read_checkpoint(checkpoint)
    weights = {name: tensor.contiguous() for name, tensor in net_weights(loaded).items()}
    architecture = {"format": "pt", "architecture": recipe_of(loaded).model.name}
    with atomic_path(out) as part:
        if out.suffix == ".pth":
            torch.save(weights, part)
        else:
            save_file(weights, part, metadata=architecture)
    return out
