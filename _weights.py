"""A model's weights from a checkpoint: which entry holds the state dict, and which prefixes its names carry."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import is_model, model_entrypoint, split_model_name_tag
from torch import Tensor

from ._errors import printable
from ._files import UnreadableFileError
from ._torch_files import read_weights
from ._unpickle import StoredTensor

_AVERAGES, _RAW = ("state_dict_ema", "model_ema"), ("state_dict", "model")  # where training scripts put the weights
_PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put in front of a name
_NAMES_SHOWN = 3


def read_state_dict(path: str | Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the state dict of a .pth, .pth.tar, .bin or .safetensors file. Runs no code from the file.

    Prefixes of DataParallel and torch.compile are removed, and so is a prefix that every name shares (`backbone.` of a
    training wrapper). Only the weights of a checkpoint are read.

    Args:
        use_ema: take moving averages of the weights where the file holds both averages and raw weights.

    Raises:
        UnreadableFileError: missing, damaged, without tensors, or it needs more than tensors to load.
    """
    return _without_shared_prefix(_bare(read_weights(path, lambda content: _checked(content, use_ema))))


def unwrap(checkpoint: Mapping[str, Any], *, use_ema: bool = False) -> dict[str, Any]:
    """Return the state dict inside a loaded checkpoint, without prefixes of DataParallel and torch.compile.

    Args:
        checkpoint: a state dict, or a mapping with a state dict in one of its usual entries.
        use_ema: prefer moving averages of the weights to raw weights.
    """
    return _bare(_entry(checkpoint, use_ema))


def prefers_averages(name: str) -> bool:
    """Whether a family's published weights are the moving averages of its training files; most are."""
    architecture, _ = split_model_name_tag(name)
    family = sys.modules[model_entrypoint(architecture).__module__] if is_model(architecture) else None
    return getattr(family, "USE_EMA", True)


def some(names: list[str]) -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _entry(content: Any, use_ema: bool) -> Any:
    if not isinstance(content, Mapping):
        return content
    keys = (*_AVERAGES, *_RAW) if use_ema else (*_RAW, *_AVERAGES)
    return next((content[key] for key in keys if content.get(key) is not None), content)


def _bare(state: Mapping[str, Any]) -> dict[str, Any]:
    bare = {}
    for name, value in state.items():
        while name.startswith(_PREFIXES):
            name = name[name.index(".") + 1 :]
        bare[name] = value
    return bare


def _without_shared_prefix(state: dict[str, Any]) -> dict[str, Any]:
    first, _, rest = next(iter(state)).partition(".")
    if not rest or not all(name.startswith(f"{first}.") for name in state):
        return state
    return {name[len(first) + 1 :]: value for name, value in state.items()}


def _checked(content: Any, use_ema: bool) -> dict[str, Any]:
    state = _entry(content, use_ema)
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not (named and state and all(isinstance(value, Tensor | StoredTensor) for value in state.values())):
        raise UnreadableFileError(f"holds no state dict: wanted names and tensors, got {_contents(state)}")
    return state


def _contents(state: Any) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    other = {name: value for name, value in state.items() if not isinstance(value, Tensor | StoredTensor)} or state
    return some([f"{printable(str(name)[:80])} ({type(value).__name__})" for name, value in other.items()]) or "nothing"
