"""A model's weights from a checkpoint file: which entry holds them, under which names."""

import sys
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict, is_model, model_entrypoint, split_model_name_tag
from torch import Tensor

from ._errors import printable
from ._files import UnreadableFileError
from ._torch_files import read_weights
from ._unpickle import StoredTensor

_AVERAGES, _RAW = ("state_dict_ema", "model_ema"), ("state_dict", "model")
_NAMES_SHOWN = 3


def read_state_dict(path: str | Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the state dict of a .pth, .pth.tar, .bin or .safetensors file. Runs no code from the file.

    Prefixes of DataParallel and torch.compile are cut. Of checkpoints, nothing but the weights is read.

    Args:
        use_ema: take moving averages of the weights where the file holds them beside the raw ones.

    Raises:
        UnreadableFileError: missing, damaged, without tensors, or it needs more than tensors to load.
    """
    return clean_state_dict(read_weights(path, lambda content: _state_dict(content, use_ema)))


def prefers_averages(name: str) -> bool:
    """Whether a family's published weights are the moving averages of its training files: most are."""
    architecture, _ = split_model_name_tag(name)
    family = sys.modules[model_entrypoint(architecture).__module__] if is_model(architecture) else None
    return getattr(family, "USE_EMA", True)


def _state_dict(content: Any, use_ema: bool) -> dict[str, Any]:
    state = content
    if isinstance(content, dict):
        keys = (*_AVERAGES, *_RAW) if use_ema else _RAW
        key = next((key for key in keys if content.get(key) is not None), None)
        state = content if key is None else content[key]
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not (named and state and all(isinstance(value, Tensor | StoredTensor) for value in state.values())):
        raise UnreadableFileError(f"holds no state dict: wanted names and tensors, got {_contents(state)}")
    return state


def _contents(state: Any) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    other = {name: value for name, value in state.items() if not isinstance(value, Tensor | StoredTensor)} or state
    return some([f"{printable(str(name)[:80])} ({type(value).__name__})" for name, value in other.items()]) or "nothing"


def some(names: list[str]) -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
