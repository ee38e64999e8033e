"""Weights to start from: a checkpoint of `foveate train`, a hub folder, or a file in an official layout or ours.

timm's loader and the checkpoint filters of the families load them, strictly but for the classifier: of everything else,
no tensor may be missing or left over. What is dropped or resized is reported.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from .._errors import first_line
from .._files import UnreadableFileError, read_json
from .._timm import pretrained_cfg
from .._torch_files import read_weights
from .._weights import prefers_averages, read_state_dict, some
from ..export.adapters import CONFIG as ADAPTER_CONFIG
from ..export.adapters import merge_lora
from ..export.errors import ExportError
from ..export.hub_files import CONFIG, check_hub_config, read_hub_weights
from ..export.inputs import without_warnings
from ..export.weights import explain_mismatch
from .errors import TrainError
from .recipe import ModelRecipe, Recipe
from .recipe_files import load_recipe

HUB = "local-dir:"  # timm's prefix of a folder in hub layout
NET = "net."  # what names in a checkpoint of `foveate train` begin with
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")  # in official files and in timm's
_OF_OTHER_WEIGHTS = (  # entries of a pretrained_cfg that describe published weights
    *("url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "state_dict", "custom_load"),
    *("license", "origin_url", "description", "notes", "label_names", "label_descriptions", "label_offset"),
    *("test_input_size", "test_crop_pct", "test_pool_size"),
)

Say = Callable[[str], None]
Make = Callable[[int, dict[str, Any] | None], nn.Module]


@dataclass(frozen=True)
class Start:
    """Weights, by the names of their file, and what they are, for messages."""

    weights: dict[str, Tensor]
    origin: str


def start_net(model: ModelRecipe, make: Make, build: Callable[[Recipe], nn.Module], say: Say) -> nn.Module:
    """Create the recipe's model with the weights of `model.checkpoint`, and say what was dropped or resized.

    Args:
        make: creates the model from a number of classes and an overlay of its pretrained_cfg; None: random weights.
        build: builds the model of another recipe, to merge LoRA adapters in a checkpoint.
        say: called with one line at a time.

    Raises:
        TrainError: the weights cannot be read, or do not fit the model.
    """
    assert model.checkpoint is not None
    start = read_start(model.checkpoint, model.name, build)
    source, classes = _load_strictly(model, start, make)
    net = source if classes == model.num_classes else _with_new_classifier(source, make(model.num_classes, None))
    say(f"weights of {start.origin}")
    if classes == 0:
        say(f"they have no classifier: that of {model.num_classes} classes starts at random")
    elif classes != model.num_classes:
        say(f"their classifier of {classes} classes is dropped, that of {model.num_classes} classes starts at random")
    for line in _describe_changes(start.weights, source):
        say(line)
    return net


def read_start(source: str, name: str, build: Callable[[Recipe], nn.Module]) -> Start:
    """Read weights for the model `name`. Runs no code from any file. See `start_net`.

    Raises:
        TrainError: `source` is nothing that holds weights, is damaged, or needs more than tensors to load.
    """
    path = Path(source.removeprefix(HUB))
    try:
        if source.startswith(HUB) or os.path.isdir(path):  # unlike Path.is_dir, False for any name
            return _read_folder(path, name)
        meta = read_meta(path)
        if meta is None:
            return Start(read_state_dict(path, use_ema=prefers_averages(name)), str(path))
        weights = read_weights(path, lambda content: content["state_dict"])
    except UnreadableFileError as error:
        raise TrainError(f"model.checkpoint {path} {error}") from error
    weights = {key.removeprefix(NET): value for key, value in weights.items() if key.startswith(NET)}
    recipe = load_recipe(meta["recipe"])
    origin = f"{path}, a checkpoint of {recipe.model.name} after {meta.get('epoch')} epochs"
    return Start(weights if recipe.model.lora is None else _merged(recipe, weights, build), origin)


def read_meta(path: Path) -> dict[str, Any] | None:
    """Return the meta data of a checkpoint of `foveate train`; None for other files. Reads no tensors.

    Raises:
        UnreadableFileError: no regular file, damaged, or it needs more than tensors and plain data.
    """
    if path.suffix == ".safetensors":
        return None
    return read_weights(path, lambda content: content["meta"] if _is_ours(content) else None)


def trained_meta(path: str | Path | None) -> dict[str, Any] | None:
    """Return the meta data of a checkpoint of `foveate train`; None for anything else, missing files included."""
    if path is None or not os.path.isfile(path):
        return None
    with suppress(UnreadableFileError):
        return read_meta(Path(path))
    return None


def trained_cfg(cfg: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pretrained_cfg of a trained model: its class names and origin in place of the published weights'.

    Args:
        cfg: the model's, with the recipe's preprocessing.
        meta: of the checkpoint.
    """
    recipe = load_recipe(meta["recipe"])
    kept = {key: value for key, value in cfg.items() if key not in _OF_OTHER_WEIGHTS}
    classes = meta.get("classes")
    names = {"label_names": tuple(classes)} if classes else {}
    return {**kept, **names, "license": "unknown", "description": _describe_training(recipe, meta)}


def _describe_training(recipe: Recipe, meta: Mapping[str, Any]) -> str:
    model = recipe.model
    origin = model.checkpoint or ("published weights" if model.pretrained else "random weights")
    best = meta.get("best") or {}
    top1 = f", top-1 {best['top1']:.2f} % in epoch {best['epoch']:g}" if {"top1", "epoch"} <= best.keys() else ""
    version = (meta.get("versions") or {}).get("foveate", "")
    return (
        f"{model.name} trained by foveate {version} on {recipe.data.root or recipe.data.source} from {origin}: "
        f"{meta.get('epoch')} of {recipe.schedule.total_epochs} epochs{top1}"
    )


def _is_ours(content: Any) -> bool:
    meta = content.get("meta") if isinstance(content, dict) else None
    return (
        isinstance(meta, dict) and isinstance(meta.get("recipe"), dict) and isinstance(content.get("state_dict"), dict)
    )


def _read_folder(folder: Path, name: str) -> Start:
    if (folder / CONFIG).exists():
        try:
            check_hub_config(folder)
            weights = read_hub_weights(folder, use_ema=prefers_averages(name))
        except ExportError as error:
            raise TrainError(f"model.checkpoint: {error}") from error
        return Start(weights, f"{folder}, a hub folder of {read_json(folder / CONFIG, 2**24)['architecture']}")
    if (folder / ADAPTER_CONFIG).exists():
        raise TrainError(
            f"model.checkpoint {folder} holds a LoRA adapter without its model: merge the two with foveate convert "
            "--adapter"
        )
    if runs := sorted(folder.glob("*.pth")) if folder.is_dir() else []:
        best = next((path for path in runs if path.name == "best.pth"), runs[-1])
        raise TrainError(f"model.checkpoint {folder} is a folder of checkpoints: name one of them, such as {best}")
    found = "is a folder" if folder.is_dir() else "does not exist, or is not a folder"
    raise TrainError(f"model.checkpoint {folder} {found}; wanted a file, or a folder in timm's hub layout ({CONFIG})")


def _merged(recipe: Recipe, weights: dict[str, Tensor], build: Callable[[Recipe], nn.Module]) -> dict[str, Tensor]:
    net = build(replace(recipe, model=replace(recipe.model, pretrained=False, checkpoint=None)))
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainError(f"the checkpoint's weights do not fit its {recipe.model.name}: {first_line(error)}") from error
    return merge_lora(net).state_dict()


def _load_strictly(model: ModelRecipe, start: Start, make: Make) -> tuple[nn.Module, int]:
    """Create the model with the classifier of the file, and load everything. Return its number of classes too."""
    classes = _count_classes(start.weights, model.name)
    failed: Exception | None = None
    for count in (classes,) if classes else (0, model.num_classes):
        try:
            with without_warnings():
                return make(count, _overlay(start.weights, count, model)), count
        except TrainError:
            raise
        except Exception as error:  # checkpoint filters raise many types
            failed = failed or error
    make(model.num_classes, None)  # raises if the recipe is at fault, and not the file
    assert failed is not None
    raise TrainError(
        f"model.checkpoint: {start.origin} does not fit {model.name}: {explain_mismatch(failed)}"
    ) from failed


def _overlay(weights: dict[str, Tensor], classes: int, model: ModelRecipe) -> dict[str, Any]:
    """Return what timm's loader has to know about the weights: the number of their classes and input channels."""
    cfg = get_pretrained_cfg(model.name)
    nowhere_else = {"source": None, "url": None, "file": None, "hf_hub_id": None, "custom_load": False}
    overlay: dict[str, Any] = {
        **nowhere_else,
        "num_classes": classes,
        "label_offset": None,
        "state_dict": dict(weights),
    }
    if cfg is not None and (channels := _count_channels(weights, cfg.first_conv)) is not None:
        overlay["input_size"] = (channels, *cfg.input_size[1:])
    return overlay


def _count_classes(weights: Mapping[str, Tensor], name: str) -> int:
    cfg = get_pretrained_cfg(name)
    own = _names(None if cfg is None else cfg.classifier)
    keys = (*(f"{name}.weight" for name in own), *_HEADS)
    return next((len(weights[key]) for key in keys if key in weights and weights[key].dim()), 0)


def _count_channels(weights: Mapping[str, Tensor], first_conv: Any) -> int | None:
    """Return the input channels of weights in our layout; None where the first convolution has another name."""
    stems = [weights[key] for name in _names(first_conv) if (key := f"{name}.weight") in weights]
    return stems[0].shape[1] if stems and stems[0].dim() == 4 and stems[0].shape[1] in (1, 3) else None


def _names(entry: Any) -> tuple[str, ...]:
    return () if not entry else (entry,) if isinstance(entry, str) else tuple(entry)


def _with_new_classifier(source: nn.Module, target: nn.Module) -> nn.Module:
    """Copy everything but the classifier from `source` to `target`, strictly. Return `target`."""
    heads = tuple(f"{name}." for name in _names(pretrained_cfg(target).get("classifier")))
    kept = {key: value for key, value in source.state_dict().items() if not key.startswith(heads or ("\0",))}
    try:
        left = target.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise TrainError(f"model.num_classes: cannot replace the classifier: {explain_mismatch(error)}") from error
    wrong = [key for key in left.missing_keys if not key.startswith(heads or ("\0",))] + left.unexpected_keys
    if wrong:
        raise TrainError(f"model.num_classes: cannot replace the classifier alone: {some(wrong)} would change too")
    return target


def _describe_changes(weights: Mapping[str, Tensor], net: nn.Module) -> list[str]:
    """Say which tensors of a file were resized, and which have no place in the model.

    Names of official layouts differ from ours. There the tensors of both sides are compared by the last part of their
    names.
    """
    have = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    want = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    resized = [f"{name} {have[name]} -> {want[name]}" for name in want if name in have and have[name] != want[name]]
    only_have, only_want = _by_leaf(have, want), _by_leaf(want, have)
    ignored = []
    for leaf, shapes in only_have.items():
        if leaf not in only_want:
            ignored += [name for name in have if name not in want and name.rpartition(".")[2] == leaf]
        else:
            resized += [f"{leaf} {a} -> {b}" for a, b in sorted(_pairs(shapes, only_want[leaf]))]
    lines = [f"resized: {some(resized)}"] if resized else []
    return lines + ([f"not in the model, ignored: {some(sorted(ignored))}"] if ignored else [])


def _pairs(old: Counter, new: Counter) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pair the shapes of either side alone that agree in the first dimension and in their number."""
    left = list((new - old).elements())
    pairs = []
    for shape in (old - new).elements():
        match = next((other for other in left if len(other) == len(shape) and other[:1] == shape[:1]), None)
        if match is not None:
            left.remove(match)
            pairs.append((shape, match))
    return pairs


def _by_leaf(shapes: Mapping[str, tuple[int, ...]], other: Mapping[str, Any]) -> dict[str, Counter]:
    """Count the shapes of the names that `other` does not have, by the last part of the name."""
    counts: dict[str, Counter] = {}
    for name, shape in shapes.items():
        if name not in other:
            counts.setdefault(name.rpartition(".")[2], Counter())[shape] += 1
    return counts
