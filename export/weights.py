"""Read a model's weights, and explain in one line why a file does not fit a model."""

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .._errors import first_line
from .._files import IS_FOLDER, UnreadableFileError, atomic_path
from .._torch_files import save_torch
from .._weights import read_state_dict, some
from .errors import ExportError

_SHAPE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")


def read_model_weights(path: str | Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the state dict of a file, see `read_state_dict`. Runs no code from the file.

    Raises:
        ExportError: the file is missing, truncated, holds no tensors, or needs more than tensors to load.
    """
    path = Path(path)
    try:
        return read_state_dict(path, use_ema=use_ema)
    except UnreadableFileError as error:
        hint = f"; name the model local-dir:{path} to load it" if str(error) == IS_FOLDER else ""
        raise ExportError(f"checkpoint {path} {error}{hint}") from error


def write_safetensors(weights: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write contiguous tensors, with texts as metadata.

    Raises:
        OSError: the disk is full.
    """
    try:
        save_file(weights, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"{path.name}: {first_line(error)}") from error


def write_weights(weights: dict[str, Tensor], out: Path, architecture: str) -> None:
    """Write a state dict atomically: as torch.save does where `out` ends in .pth, as safetensors otherwise.

    Raises:
        OSError: the disk is full; an existing file is left unchanged.
    """
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}  # may share memory
    with atomic_path(out) as part:
        if out.suffix == ".pth":
            save_torch(weights, part)
        else:
            write_safetensors(weights, part, architecture=architecture)


def explain_mismatch(error: Exception) -> str:
    """Condense torch's load_state_dict error, which lists every key, to counts and a few names."""
    missing, unknown = (_keys_after(f"{kind} key(s) in state_dict", error) for kind in ("Missing", "Unexpected"))
    shapes = _SHAPE_MISMATCH.findall(str(error))
    facts = []
    if missing:
        facts.append(f"it lacks {some(missing)}")
    if unknown:
        facts.append(f"it has {some(unknown)} that the model does not have")
    if shapes:
        facts.append(
            "other shapes: " + some([f"{name} {have} in the file, {want} wanted" for name, have, want in shapes])
        )
    if not facts:
        says_it = isinstance(error, ValueError)  # raised by our checkpoint filters
        return first_line(error) if says_it else f"{type(error).__name__}: {first_line(error)}"
    return "; ".join(facts) + ("" if missing or unknown else _hint(shapes))


def _keys_after(heading: str, error: Exception) -> list[str]:
    return [key for line in str(error).splitlines() if heading in line for key in re.findall(r'"([^"]+)"', line)]


def _hint(shapes: list[tuple[str, str, str]]) -> str:
    """Return advice where only the rows of one layer differ: a classifier with another number of classes."""
    layers = {name.rpartition(".")[0] for name, _, _ in shapes}
    rows = {have.strip("[]").split(", ")[0] for _, have, _ in shapes}
    same_columns = all(have.split(", ")[1:] == want.split(", ")[1:] for _, have, want in shapes)
    return f"; for its {rows.pop()} classes pass num_classes" if len(layers) == len(rows) == 1 and same_columns else ""
