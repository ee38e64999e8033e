"""Read a checkpoint's tensors, and say in one line why a file or a model does not fit.

Only tensors are ever unpickled (`weights_only=True`). MMEngine's checkpoints need its log buffers besides: those few
classes are allowed by name, and nothing else is.
"""

import re
from pathlib import Path

import torch
from timm.models import load_state_dict
from torch import Tensor

from .._errors import first_line
from .errors import ExportError

_SHAPE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")
_NAMES_SHOWN = 3


def read_checkpoint(path: str | Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the state dict of a .pth, .pth.tar, .bin or .safetensors file.

    Where the file holds raw weights and their moving averages, `use_ema` takes the averages.

    A prefix that every key shares (`backbone.` of a training wrapper, `module.` of DDP) is cut.

    Raises:
        ExportError: the file is missing, truncated, holds no tensors, or needs more than tensors to load.
    """
    path = Path(path)
    if path.is_dir():
        raise ExportError(f"checkpoint {path} is a folder; name the model local-dir:{path} to load it")
    if not path.is_file():
        raise ExportError(f"checkpoint {path} does not exist")
    try:
        state = _load(path, use_ema)
    except Exception as error:  # torch and safetensors raise eight types for one fact
        raise ExportError(f"checkpoint {path} {_why_unreadable(error)}") from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ExportError(f"checkpoint {path} holds no state dict: wanted names and tensors, got {_contents(state)}")
    return _without_wrapper(state)


def explain_mismatch(error: Exception) -> str:
    """Condense torch's load_state_dict error, which lists every key, to counts and a few names."""
    missing, unknown = (_keys_after(f"{kind} key(s) in state_dict", error) for kind in ("Missing", "Unexpected"))
    shapes = _SHAPE_MISMATCH.findall(str(error))
    facts = []
    if missing:
        facts.append(f"it lacks {_some(missing)}")
    if unknown:
        facts.append(f"it has {_some(unknown)} that the model does not know")
    if shapes:
        facts.append(
            "other shapes: " + _some([f"{name} {have} in the file, {want} wanted" for name, have, want in shapes])
        )
    if not facts:
        says_it = isinstance(error, ValueError)  # as our families' checkpoint filters do
        return first_line(error) if says_it else f"{type(error).__name__}: {first_line(error)}"
    return "; ".join(facts) + ("" if missing or unknown else _hint(shapes))


def _load(path: Path, use_ema: bool) -> dict[str, Tensor]:
    try:
        return load_state_dict(str(path), use_ema)
    except RuntimeError as error:
        if "mmengine.logging.history_buffer" not in str(error):
            raise
        with torch.serialization.safe_globals(_mmengine_log_types()):
            return load_state_dict(str(path), use_ema)


def _mmengine_log_types() -> list:
    import numpy as np
    from mmengine.logging import HistoryBuffer

    multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
    arrays = [np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar]
    return [HistoryBuffer, getattr, *arrays, np.dtypes.Float64DType, np.dtypes.Int64DType]


def _without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    first, _, rest = next(iter(state)).partition(".")
    if not rest or not all(key.startswith(first + ".") for key in state):
        return state
    return {key[len(first) + 1 :]: value for key, value in state.items()}


def _why_unreadable(error: Exception) -> str:
    blocked = re.search(r"Unsupported globals: (.*?)\. No automatic", str(error))
    if blocked:
        kinds = _some(blocked[1].split(", "))
        return f"needs more than tensors ({kinds}), which could run code; save its state_dict() and use that file"
    return f"cannot be read, truncated or not a checkpoint: {type(error).__name__}: {first_line(error)}"


def _contents(state: dict) -> str:
    return _some([f"{name} ({type(value).__name__})" for name, value in state.items()]) if state else "nothing"


def _keys_after(heading: str, error: Exception) -> list[str]:
    return [key for line in str(error).splitlines() if heading in line for key in re.findall(r'"([^"]+)"', line)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _hint(shapes: list[tuple[str, str, str]]) -> str:
    """Only the rows of one layer differ: a classifier for another number of classes."""
    layers = {name.rpartition(".")[0] for name, _, _ in shapes}
    rows = {have.strip("[]").split(", ")[0] for _, have, _ in shapes}
    same_columns = all(have.split(", ")[1:] == want.split(", ")[1:] for _, have, want in shapes)
    return f"; for its {rows.pop()} classes pass num_classes" if len(layers) == len(rows) == 1 and same_columns else ""
