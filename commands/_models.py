"""The model that a command names: a timm name with weights, a hub folder, or a checkpoint of `foveate train`.

A checkpoint of a run holds its recipe: the architecture with its keywords, classes, preprocessing and class names are
read from it, and neither the model's name nor its arguments are needed.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import get_model_traits
from torch import nn

from .._errors import RequestError
from ..export import load_adapter, load_model, merge_lora
from ..train import load_net, load_recipe
from ..train.loading import HUB, trained_meta
from ..train.recipe import Recipe, recipe_data

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".tar")


def open_model(
    name: str | None,
    checkpoint: Path | None,
    pretrained: bool = False,
    *,
    adapter: Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a model in eval mode, with all of its weights. Runs no code from any file.

    Args:
        name: a timm model name, `local-dir:FOLDER`, a folder in hub layout, `hf-hub:ORG/REPO`, or a checkpoint of
            `foveate train`; None where `checkpoint` is one.
        checkpoint: file of weights.
        pretrained: load the published weights that timm knows for the name.
        adapter: folder of a LoRA adapter, merged into the weights.
        img_size: px, a number or (height, width), for which a model of fixed size is built; None: its own.
        arguments: of the model. For a checkpoint of `foveate train` they must be those of its recipe.

    Raises:
        RequestError: there is no such model, or the weights are another model's.
    """
    arguments = dict(arguments or {})
    if checkpoint is None and name is not None and trained_meta(name) is not None:
        checkpoint, name = Path(name), None
    if (meta := trained_meta(checkpoint)) is not None:
        assert checkpoint is not None
        if pretrained:
            raise RequestError(f"weights from the checkpoint {checkpoint} or --pretrained, not both")
        _check_same_model(load_recipe(meta["recipe"]), name, arguments, checkpoint)
        return _merge(load_net(checkpoint, img_size=img_size), adapter)
    name = _checked_name(name, checkpoint)
    model = load_model(name, checkpoint, pretrained=pretrained, adapter=adapter, **arguments)
    if img_size is None or not get_model_traits(model).get("fixed_input_size"):
        return model
    return load_model(name, checkpoint, pretrained=pretrained, adapter=adapter, **arguments | {"img_size": img_size})


def has_weights(name: str | None, checkpoint: Path | None, pretrained: bool) -> bool:
    """Say whether a model that is named this way has weights of its own, not random ones."""
    named = name is not None and (":" in name or os.path.isdir(name) or trained_meta(name) is not None)
    return checkpoint is not None or pretrained or named


def _checked_name(name: str | None, checkpoint: Path | None) -> str:
    if name is None and checkpoint is None:
        raise RequestError("wanted the name of a model, or --checkpoint with a checkpoint of foveate train")
    if name is None:
        if not os.path.exists(checkpoint):  # type: ignore[arg-type]  # one of the two is given
            raise RequestError(f"checkpoint {checkpoint} does not exist")
        raise RequestError(
            f"{checkpoint} does not say which model it holds (only checkpoints of foveate train do): name it"
        )
    if os.path.isdir(name):
        return f"{HUB}{name}"
    if os.path.isfile(name) and name.endswith(CHECKPOINT_SUFFIXES):
        raise RequestError(f"{name} does not say which model it holds: give the model's name, and --checkpoint {name}")
    return name


def _check_same_model(recipe: Recipe, name: str | None, arguments: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a name or arguments other than those of the recipe in the checkpoint."""
    trained = recipe.model.name
    if name is not None and name.partition(".")[0] != trained.partition(".")[0]:
        raise RequestError(f"{checkpoint} is a checkpoint of {trained}, not of {name}")
    known = recipe_data(recipe)["model"]
    for key, value in arguments.items():
        given = tuple(value) if isinstance(value, list) else value
        if key not in known or known[key] != given:
            had = f"was trained with {key}={known[key]}" if key in known else f"was trained without {key}"
            raise RequestError(f"--model-arg {key}={value}: {checkpoint} {had}")


def _merge(model: nn.Module, adapter: Path | None) -> nn.Module:
    if adapter is not None:
        load_adapter(model, adapter)
        merge_lora(model)
    return model.eval()
