"""The schema of an op, made of the signature of its public function, and which Python values fit it as they are."""

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor

from ..kernels._launch import PLAIN_TENSORS


class Impl(str, Enum):
    """The body to run. A body requested by name runs or raises."""

    AUTO = "auto"  # fused where it can run, else tiled
    FUSED = "fused"
    TILED = "tiled"
    REFERENCE = "reference"


_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    str | None: "str?",
    Impl | str: "str",
}
_VALUES: dict[str, tuple[type, ...]] = {  # the types of values that no dispatcher has to convert
    "Tensor": PLAIN_TENSORS,
    "int": (int,),
    "SymInt": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str, Impl),
    "int[2]": (int, tuple, list),
    "SymInt[2]": (int, tuple, list),
    "bool[2]": (bool, tuple, list),
}


def schema_of(promise: Callable[..., Any], without: tuple[str, ...] = ()) -> str:
    """Return the schema of a public function, as torch.library.define takes it.

    Args:
        without: arguments to leave out.
    """
    types = schema_types(promise)
    words, keyword_only = [], False
    for name, parameter in inspect.signature(promise).parameters.items():
        if name in without:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        words.append(f"{types[name]} {name}{_default(parameter.default, types[name])}")
    returned = get_type_hints(promise)["return"]
    outputs = "Tensor" if returned is Tensor else f"({', '.join('Tensor' for _ in get_args(returned))})"
    return f"({', '.join(words)}) -> {outputs}"


def schema_types(promise: Callable[..., Any]) -> dict[str, str]:
    """Return the schema's type of each argument of a public function: `Tensor?`, `int[2]`."""
    hints = get_type_hints(promise, include_extras=True)
    return {name: _type_of(hints[name]) for name in inspect.signature(promise).parameters}


def plain_types(schema_type: str) -> tuple[type, ...]:
    """Return the types of the values that the dispatcher would pass on as they are."""
    optional = (type(None),) if schema_type.endswith("?") else ()
    return _VALUES.get(schema_type.rstrip("?"), ()) + optional


def _type_of(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return get_args(hint)[1]
    if hint in _TYPES:
        return _TYPES[hint]
    arms = [arm for arm in get_args(hint) if arm is not type(None)]  # an annotated type or None
    return f"{_type_of(arms[0])}?"


def _default(default: Any, schema_type: str) -> str:
    if default is inspect.Parameter.empty:
        return ""
    if isinstance(default, str):
        return f"='{default.value if isinstance(default, Impl) else default}'"
    return f"=[{default}, {default}]" if schema_type.endswith("[2]") else f"={default}"
