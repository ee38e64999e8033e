"""The JSON file of a plan: masks as base64 of packed bits, cuts as indices. Reading gives the same plan bit for bit."""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import first_line
from .._files import UnreadableFileError, atomic_path, read_json
from .counts import Counts
from .errors import PruningError

VERSION = 1
_LARGEST_BYTES = 2**30
_KINDS: dict[str, Any] = {
    **{"architecture": str, "method": str, "scope": str, "ratio": (int, float), "structure": list},
    **dict.fromkeys(("masks", "cuts", "counts", "removed", "groups", "thresholds", "widths"), dict),
    "pattern": (str, type(None)),
}


def write_fields(plan_fields: Mapping[str, Any], path: Path) -> Path:
    """Write the fields of a `Plan` as one JSON file, in one step."""
    data = {name: dict(value) if isinstance(value, Mapping) else value for name, value in plan_fields.items()}
    data |= {"version": VERSION, "counts": asdict(plan_fields["counts"])}
    data["masks"] = {name: _pack(mask) for name, mask in plan_fields["masks"].items()}
    data["cuts"] = {n: {axis: kept.tolist() for axis, kept in axes.items()} for n, axes in plan_fields["cuts"].items()}
    if not path.absolute().parent.is_dir():
        raise PruningError(f"{path}: the folder {path.parent} does not exist")
    with atomic_path(path) as part:
        part.write_text(json.dumps(data))
    return path


def read_fields(path: Path) -> dict[str, Any]:
    """Return the fields of the `Plan` that `write_fields` wrote. Runs nothing.

    Raises:
        PruningError: the file is missing, damaged or not a plan.
    """
    try:
        data = read_json(path, _LARGEST_BYTES)
        version = data.pop("version", None) if isinstance(data, dict) else None
        if type(version) is not int or version != VERSION:
            raise PruningError(f"plan {path} is damaged or not a plan of version {VERSION}")
        return _decoded(data)
    except PruningError:
        raise
    except UnreadableFileError as error:
        raise PruningError(f"plan {path} {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise PruningError(f"plan {path} is damaged or not a plan: {why}") from error


def _decoded(data: dict[str, Any]) -> dict[str, Any]:
    if unknown := data.keys() - _KINDS.keys():
        raise TypeError(f"unknown key {min(unknown)}")
    for key, kinds in _KINDS.items():
        if not isinstance(data[key], kinds) or isinstance(data[key], bool):
            raise TypeError(f"{key} is a {type(data[key]).__name__}")
    data["masks"] = MappingProxyType({name: _unpack(packed) for name, packed in data["masks"].items()})
    data["cuts"] = MappingProxyType(
        {name: {_axis(axis): _indices(kept) for axis, kept in axes.items()} for name, axes in data["cuts"].items()}
    )
    counts = {key: _whole(value) for key, value in data["counts"].items() if key != "input_size"}
    channels, height, width = _wholes(data["counts"]["input_size"], 3)
    data["counts"] = Counts(**counts, input_size=(channels, height, width))
    data["structure"] = tuple(_text(kind) for kind in data["structure"])
    data["removed"] = {kind: _wholes(counts, 2) for kind, counts in data["removed"].items()}
    data["groups"] = {name: _text(group) for name, group in data["groups"].items()}
    data["thresholds"] = {label: _number(limit) for label, limit in data["thresholds"].items()}
    data["widths"] = {attribute: _whole(number) for attribute, number in data["widths"].items()}
    if not data["masks"].keys() <= data["groups"].keys():
        raise ValueError("a mask has no group")
    return data


def _axis(text: str) -> int:
    if text not in ("0", "1", "2", "3"):
        raise ValueError("an axis is not 0, 1, 2 or 3")
    return int(text)


def _indices(kept: Any) -> Tensor:
    numbers = _wholes(kept)
    if not numbers or any(b <= a for a, b in pairwise(numbers)):
        raise ValueError("the indices of a cut are not ascending")
    return torch.tensor(numbers, dtype=torch.int64)


def _wholes(values: Any, count: int | None = None) -> tuple[int, ...]:
    if not isinstance(values, list) or count not in (None, len(values)):
        raise TypeError("a list of numbers is malformed")
    return tuple(map(_whole, values))


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise TypeError("a count is not a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError("a threshold is not a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is not text")
    return value


def _pack(mask: Tensor) -> dict[str, Any]:
    bits = np.packbits(mask.flatten().cpu().numpy())
    return {"shape": list(mask.shape), "bits": base64.b64encode(bits.tobytes()).decode("ascii")}


def _unpack(packed: Mapping[str, Any]) -> Tensor:
    shape = _wholes(packed["shape"])
    count, packed_bits = prod(shape), base64.b64decode(_text(packed["bits"]), validate=True)
    if len(packed_bits) != -(-count // 8):  # before memory is allocated
        raise ValueError(f"a mask of shape {shape} has {len(packed_bits)} bytes of bits")
    bits = np.unpackbits(np.frombuffer(packed_bits, dtype=np.uint8), count=count)
    return torch.from_numpy(bits.astype(bool)).view(shape)
