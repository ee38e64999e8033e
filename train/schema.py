"""Read plain data into frozen dataclasses, strictly.

Unknown names, missing names, wrong types and values out of range are refused; the message names the dotted key, what
was expected and what was found. An int is accepted for a float and a list for a tuple; nothing else is converted.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .._errors import did_you_mean, printable
from .errors import TrainError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_SHOWN = 200  # characters of a name or value that a message repeats
_WORDS = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}
_HOLDS = {
    "at_least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at_most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
}


class UnknownKeyError(TrainError):
    """A key that its section does not have; `name` is the key without its section."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def limited(default: Any = MISSING, **limits: float) -> Any:
    """Declare a field with limits (at_least, above, at_most, below) for its number, or for each of its numbers."""
    return field(default=default, metadata=limits)


def read(cls: type[T], data: object, where: str = "") -> T:
    """Make a `cls` from a mapping with its field names as keys; `where` is the dotted key of the mapping."""
    try:
        return _read(cls, data, where)
    except UnknownKeyError as error:
        elsewhere = [] if where else [path for path in _paths(cls) if path.rpartition(".")[2] == error.name]
        if not elsewhere:
            raise
        known = str(error).partition(";")[0]
        raise TrainError(f"{known}; did you mean {' or '.join(elsewhere)}?") from None


def _paths(cls: Any, where: str = "") -> list[str]:
    """Return the dotted keys of a section and of the sections inside it."""
    paths = []
    for name, hint in get_type_hints(cls).items():
        paths.append(_dotted(where, name))
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and is_dataclass(part):
                paths += _paths(part, _dotted(where, name))
    return paths


def _read(cls: type[T], data: object, where: str) -> T:
    if not isinstance(data, Mapping):
        raise _wrong(where or "recipe", "a section of keys", data)
    known = {f.name: f for f in fields(cls)}
    for name in data:
        if name not in known:
            near = did_you_mean(_dotted(where, name), [_dotted(where, k) for k in known])
            raise UnknownKeyError(f"unknown key {_dotted(where, name)}{near}", str(name))
    hints = get_type_hints(cls)
    values = {}
    for name, declared in known.items():
        key = _dotted(where, name)
        if name in data:
            values[name] = _convert(hints[name], data[name], key)
            _check_limits(values[name], declared.metadata, key)
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise TrainError(f"missing key {key}: wanted {_describe(hints[name])}")
    return cls(**values)


def _convert(hint: Any, value: object, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _convert_union(hint, value, key)
    if isinstance(hint, type) and is_dataclass(hint):
        return read(hint, value, key)
    if origin is tuple and isinstance(value, list | tuple):
        of = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(of) == len(value):
            return tuple(_convert(h, v, key) for h, v in zip(of, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    elif origin is Literal and value in args:
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif hint in (int, str, bool, NoneType) and type(value) is hint:
        return value
    raise _wrong(key, _describe(hint), value)


def _convert_union(hint: Any, value: object, key: str) -> Any:
    for arm in get_args(hint):
        if isinstance(value, Mapping) and isinstance(arm, type) and is_dataclass(arm):
            return read(arm, value, key)  # its message names the key inside the section
        try:
            return _convert(arm, value, key)
        except TrainError:
            continue
    raise _wrong(key, _describe(hint), value)


def _check_limits(value: Any, limits: Mapping[str, float], key: str) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        for name, limit in limits.items():
            if number is not None and not _HOLDS[name](number, limit):
                limits_text = " and ".join(f"{_WORDS[n]} {v:g}" for n, v in limits.items())
                raise _wrong(key, f"a number {limits_text}", value)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(arm) for arm in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        return f"a tuple of {_plain(args[0])}" if args[-1] is Ellipsis else f"{len(args)} values ({_plain(args[0])})"
    if is_dataclass(hint) or origin is dict:
        return "a section of keys"
    return _plain(hint)


def _plain(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False", NoneType: "None"}
    return names.get(hint, str(hint))


def _dotted(where: str, name: object) -> str:
    name = printable(str(name)[:_SHOWN])
    return f"{where}.{name}" if where else name


def _wrong(key: str, wanted: str, got: object) -> TrainError:
    text = printable(repr(got))
    return TrainError(f"{key}: wanted {wanted}, got {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}")
