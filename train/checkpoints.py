"""Checkpoints: written atomically, made of tensors and plain data only, loaded without running code.

A work_dir holds epoch_N.pth (the newest few, with everything a resumed run needs), epoch_N_iter_M.pth (within an epoch:
N epochs and M iterations are done; one file, removed after the epoch), best.pth (weights only), the folder adapter (its
LoRA adapters, if the recipe has them) and last_checkpoint (name of the newest).

Keys: meta, state_dict (averaged weights where EMA is on; in best.pth whichever validated better: meta.weights),
optimizer, ema_state_dict (then the raw weights and the number of averaged steps), processes (within an epoch: what each
process adds, such as its sum of losses).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from timm.models import get_model_traits
from torch import Tensor, nn

from .._errors import first_line
from .._files import PART, UnreadableFileError, atomic_path
from .._timm import pretrained_cfg, set_pretrained_cfg
from .._torch_files import read_weights, save_torch
from ..export.adapters import has_lora, merge_lora, save_adapter
from ..export.weights import write_weights
from .errors import TrainError
from .loading import NET as _NET
from .loading import trained_cfg
from .model import build_net
from .recipe import Recipe
from .recipe_files import load_recipe

POINTER = "last_checkpoint"
BEST = "best.pth"
ADAPTER = "adapter"  # folder of the best LoRA adapters, as peft reads them
_EPOCH = re.compile(r"epoch_(\d+)(?:_iter_(\d+))?\.pth")
_META = {
    **{"epoch": int, "iter": int, "seed": int, "processes": int, "recipe": dict, "versions": dict},
    **{"classes": list | None, "best": dict | None},
    **{"batch": int, "batches": int, "images": int, "pending": bool, "weights": str},
}


def write_epoch(work_dir: Path, checkpoint: dict[str, Any], keep: int) -> Path:
    """Write epoch_N.pth and its name to last_checkpoint, then remove all but the newest `keep` files."""
    path = _write(work_dir, checkpoint, f"epoch_{checkpoint['meta']['epoch']}.pth")
    for old in (*list_epochs(work_dir)[keep:], *_list_within(work_dir)):
        old.unlink()
    return path


def write_within(work_dir: Path, checkpoint: dict[str, Any]) -> Path:
    """Write a checkpoint within an epoch and its name to last_checkpoint, then remove the one before it."""
    meta = checkpoint["meta"]
    done = meta["epoch"] - meta["pending"]  # an epoch whose validation is pending is not done
    path = _write(work_dir, checkpoint, f"epoch_{done}_iter_{meta['iter']}.pth")
    for old in _list_within(work_dir):
        if old != path:
            old.unlink()
    return path


def write_best(work_dir: Path, checkpoint: dict[str, Any]) -> Path:
    path = work_dir / BEST
    weights = {key: checkpoint[key] for key in ("meta", "state_dict")}
    with atomic_path(path) as part:
        save_torch(weights, part)
    return path


def list_epochs(work_dir: Path) -> list[Path]:
    """Return the files of whole epochs in a work_dir, newest first."""
    return [path for path in list_checkpoints(work_dir) if "_iter_" not in path.name]


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Return the files from which a run can be resumed, newest first; those within epochs are among them."""
    found = {path: match for path in work_dir.glob("epoch_*.pth") if (match := _EPOCH.fullmatch(path.name))}
    return sorted(found, key=lambda path: (int(found[path][1]), int(found[path][2] or -1)), reverse=True)


def _list_within(work_dir: Path) -> list[Path]:
    return [path for path in list_checkpoints(work_dir) if "_iter_" in path.name]


def _write(work_dir: Path, checkpoint: dict[str, Any], name: str) -> Path:
    path = work_dir / name
    with atomic_path(path) as part:
        save_torch(checkpoint, part)
    with atomic_path(work_dir / POINTER) as part:
        part.write_text(f"{name}\n")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU. Runs no code from the file.

    Raises:
        TrainError: missing, truncated, or not written by `foveate train`.
    """
    path = Path(path)
    try:
        checkpoint = read_weights(path)
    except UnreadableFileError as error:
        raise TrainError(f"checkpoint {path} {error}") from error
    if not isinstance(checkpoint, dict) or not {"meta", "state_dict"} <= checkpoint.keys():
        raise TrainError(f"checkpoint {path} was not written by foveate train: no meta and state_dict in it")
    _check_kinds(path, checkpoint)
    return checkpoint


def _check_kinds(path: Path, checkpoint: dict[str, Any]) -> None:
    meta, state = checkpoint["meta"], checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise TrainError(
            f"checkpoint {path} was not written by foveate train: its state_dict does not map names to tensors"
        )
    wrong = [key for key, kind in _META.items() if isinstance(meta, dict) and not isinstance(meta.get(key), kind)]
    if not isinstance(meta, dict) or any(key in meta for key in wrong):
        raise TrainError(f"checkpoint {path} was not written by foveate train: its meta is malformed")


def meta_of(checkpoint: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return the meta data of a checkpoint.

    Raises:
        TrainError: one of the keys is missing.
    """
    if missing := [key for key in keys if key not in checkpoint["meta"]]:
        raise TrainError(f"the checkpoint was not written by foveate train: its meta has no {missing[0]}")
    return checkpoint["meta"]


def find_resumable(work_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint, or None; pass a message about each damaged one to `say`."""
    for part in work_dir.glob(f".*{PART}"):  # left by a killed process
        rmtree(part)
    candidates = list_checkpoints(work_dir)
    for path in candidates:
        try:
            read_checkpoint(path)
        except TrainError as error:
            say(f"{error}; trying the previous one")
            continue
        return path
    if candidates:
        raise TrainError(f"{work_dir}: all of its {len(candidates)} checkpoints are damaged; use another work_dir")
    return None


def recipe_of(checkpoint: dict[str, Any]) -> Recipe:
    """Return the recipe that a checkpoint was trained with. It is plain data, checked like a recipe file."""
    return load_recipe(meta_of(checkpoint, "recipe")["recipe"])


def net_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of the timm model: EMA weights where EMA was on."""
    return {k.removeprefix(_NET): v for k, v in checkpoint["state_dict"].items() if k.startswith(_NET)}


def load_net(path: str | Path, *, img_size: int | tuple[int, int] | None = None) -> nn.Module:
    """Build the model that a checkpoint was trained with, in eval mode, with its weights (EMA where EMA was on).

    Its pretrained_cfg has the recipe's preprocessing, the class names, and where the weights come from. LoRA adapters
    are merged into the weights. Runs no code from the file. Hooks that its recipe names are not built.

    Args:
        img_size: of a model with a fixed size, px, a number or (height, width): what depends on it is resized; None:
            the recipe's.

    Raises:
        TrainError: not written by `foveate train`, or its weights do not fit its recipe.
    """
    checkpoint = read_checkpoint(path)
    recipe = recipe_of(checkpoint)
    net = build_with_weights(recipe, checkpoint)
    net = merge_lora(net) if has_lora(net) else net
    if img_size is not None and get_model_traits(net).get("fixed_input_size"):
        keywords = {**recipe.model.keywords, "img_size": img_size}
        model = replace(recipe.model, pretrained=False, checkpoint=str(path), lora=None, keywords=keywords)
        net = build_net(replace(recipe, model=model, data=replace(recipe.data, img_size=img_size)))
    set_pretrained_cfg(net, trained_cfg(pretrained_cfg(net), checkpoint["meta"]))
    return net.eval()


def build_with_weights(recipe: Recipe, checkpoint: dict[str, Any]) -> nn.Module:
    """Build the recipe's model with the checkpoint's weights; other weights that the recipe names are not read."""
    net = build_net(from_scratch(recipe))
    try:
        net.load_state_dict(net_weights(checkpoint))
    except RuntimeError as error:
        raise TrainError(f"the checkpoint's weights do not fit its {recipe.model.name}: {first_line(error)}") from error
    return net


def from_scratch(recipe: Recipe) -> Recipe:
    """Return the recipe without its initial weights."""
    return replace(recipe, model=replace(recipe.model, pretrained=False, checkpoint=None))


def export_adapter(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the LoRA adapters of a checkpoint, and its classifier, to a folder that peft reads.

    Raises:
        TrainError: not a checkpoint of `foveate train`, or its recipe has no model.lora.
        OSError: the disk is full.
    """
    loaded = read_checkpoint(checkpoint)
    recipe = recipe_of(loaded)
    if recipe.model.lora is None:
        raise TrainError(f"checkpoint {checkpoint} has no adapters: its recipe has no model.lora")
    if not Path(folder).absolute().parent.is_dir():
        raise TrainError(f"{folder}: the folder {Path(folder).parent} does not exist")
    return save_adapter(build_with_weights(recipe, loaded), folder)


def export_weights(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the model's state dict, as timm loads it, to a .safetensors or .pth file; LoRA adapters are merged.

    Raises:
        TrainError: not a checkpoint of `foveate train`, or `out` has another suffix or no folder.
    """
    out = Path(out)
    if out.suffix not in (".safetensors", ".pth"):
        raise TrainError(f"{out}: wanted a name that ends in .safetensors or .pth")
    if not out.parent.is_dir():
        raise TrainError(f"{out}: the folder {out.parent} does not exist")
    loaded = read_checkpoint(checkpoint)
    recipe = recipe_of(loaded)
    weights = net_weights(loaded)
    if recipe.model.lora is not None:
        weights = merge_lora(build_with_weights(recipe, loaded)).state_dict()
    write_weights(weights, out, recipe.model.name)
    return out
