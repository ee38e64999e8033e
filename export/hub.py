"""Save a model in timm's hub layout: model.safetensors and config.json in one folder."""

from copy import deepcopy
from pathlib import Path
from shutil import copymode
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from .._errors import first_line
from .._files import atomic_path
from .._timm import pretrained_cfg, set_pretrained_cfg
from .errors import ExportError
from .files import check_empty_folder
from .inputs import data_config
from .metadata import check_labels


def save_hub(
    model: nn.Module,
    folder: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    model_args: dict[str, Any] | None = None,
    labels: tuple[str, ...] | None = None,
) -> Path:
    """Write weights and configuration, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The folder is written atomically, after the model was loaded from it and its weights were compared.

    Args:
        model: made by `timm.create_model`; its keyword arguments are saved too.
        folder: must be new or empty.
        img_size: height and width of the saved preprocessing, in pixels; None: the model's own size.
        model_args: more arguments to save, if the model was changed after it was created.
        labels: class names, in the order of the logits; None: those of the model's pretrained_cfg, if it has any.

    Raises:
        ExportError: the folder is not empty, there are more or fewer labels than classes, or the saved model cannot be
            loaded again.
        OSError: the disk is full, or the folder cannot be written; nothing is written.
    """
    folder = Path(folder)
    check_empty_folder(folder)
    if not hasattr(model, "pretrained_cfg"):
        raise ExportError(f"{type(model).__name__} was not made by timm.create_model: unknown architecture")
    plain = deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors needs contiguous tensors
    if labels is not None:
        _set_labels(plain, labels)
    config = None if img_size is None else data_config(model, img_size)
    with atomic_path(folder) as part:
        _save(plain, part, model_args, config)
        copymode(part / "config.json", part / "model.safetensors")  # safetensors makes the file private to the user
        _check_comes_back(plain, part)
    return folder


def _set_labels(model: nn.Module, labels: tuple[str, ...]) -> None:
    check_labels(model, labels)
    other = {key: value for key, value in pretrained_cfg(model).items() if key != "label_descriptions"}
    set_pretrained_cfg(model, {**other, "num_classes": len(labels), "label_names": labels})


def _save(model: nn.Module, folder: Path, model_args: dict[str, Any] | None, config: dict[str, Any] | None) -> None:
    try:
        save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True, data_config=config)
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"{folder.name}: {first_line(error)}") from error


def _check_comes_back(model: nn.Module, folder: Path) -> None:
    try:
        saved = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    except Exception as error:
        raise ExportError(f"the model cannot be loaded from its files: {first_line(error)}") from error
    lost = [name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])]
    if lost:
        raise ExportError(f"{len(lost)} tensors change when the model is loaded from its files, the first is {lost[0]}")
