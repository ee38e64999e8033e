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
from .errors import ExportError
from .files import check_empty_folder
from .inputs import data_config


def save_hub(
    model: nn.Module, folder: str | Path, *, img_size: int | None = None, model_args: dict[str, Any] | None = None
) -> Path:
    """Write weights and configuration so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the model.

    The folder appears in one step, after the saved model was made again from it and its weights found equal.

    Args:
        model: made by `timm.create_model`; the keyword arguments it was made with are saved as well.
        folder: must not exist, or be empty.
        img_size: height and width that the saved preprocessing asks for, in pixels; the model's own when None.
        model_args: arguments to save besides those (or in their place), where the model was changed after it was made.

    Raises:
        ExportError: the folder is taken, or the saved model would not come back.
        OSError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    check_empty_folder(folder)
    if not hasattr(model, "pretrained_cfg"):
        raise ExportError(f"{type(model).__name__} was not made by timm.create_model, its architecture has no name")
    plain = deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no other layout
    config = None if img_size is None else data_config(model, img_size)
    with atomic_path(folder) as part:
        _save(plain, part, model_args, config)
        copymode(part / "config.json", part / "model.safetensors")  # safetensors makes it private to the user
        _check_comes_back(plain, part)
    return folder


def _save(model: nn.Module, folder: Path, model_args: dict[str, Any] | None, config: dict[str, Any] | None) -> None:
    try:
        save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True, data_config=config)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"{folder.name}: {first_line(error)}") from error


def _check_comes_back(model: nn.Module, folder: Path) -> None:
    try:
        saved = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    except Exception as error:
        raise ExportError(f"the model would not come back from its files: {first_line(error)}") from error
    lost = [name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])]
    if lost:
        raise ExportError(f"{len(lost)} tensors would not come back as they are, {lost[0]} the first")
