"""Read a folder in timm's hub layout, of unknown origin: config.json as data, weights as tensors."""

from pathlib import Path
from typing import Any

from timm.models import is_model, split_model_name_tag
from torch import Tensor

from .._errors import printable
from .._files import UnreadableFileError, read_json
from .._model_args import check_model_args
from .errors import ExportError
from .weights import read_model_weights

CONFIG = "config.json"
_LARGEST_BYTES = 2**24  # of a config.json
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # timm's order
_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")


def check_hub_config(folder: Path) -> None:
    """Refuse a config.json that is not safe to pass to timm. Runs nothing from the file.

    Raises:
        ExportError: missing, not JSON, an unknown architecture, or arguments of timm's loader among the model's.
    """
    where = folder / CONFIG
    try:
        config = read_json(where, _LARGEST_BYTES)
        if not isinstance(config, dict) or not isinstance(name := config.get("architecture"), str):
            raise UnreadableFileError("names no architecture")
        _check_name(name)
        arguments = config.get("model_args", {})
        if not isinstance(arguments, dict) or not isinstance(config.get("pretrained_cfg", {}), dict):
            raise UnreadableFileError("has model_args or a pretrained_cfg that is not a section of keys")
        check_model_args(arguments, "model_args")
        if "of" in arguments:
            _check_name(arguments["of"])
    except ValueError as error:
        raise ExportError(f"{where} {error}") from error


def read_hub_weights(folder: Path, *, use_ema: bool) -> dict[str, Tensor]:
    """Return the state dict of a hub folder, from the file that timm would read. Runs no code from it."""
    found = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    found += [path for suffix in _SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    if not found:
        raise ExportError(f"{folder} holds no weights; looked for {', '.join(_WEIGHTS)}")
    return read_model_weights(found[0], use_ema=use_ema)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not is_model(split_model_name_tag(name)[0]):
        raise UnreadableFileError(f"names an unknown architecture, {printable(str(name)[:60])}")
