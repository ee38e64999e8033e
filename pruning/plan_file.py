"""A plan as a JSON file: masks as base64 of packed bits, cuts as indices; read back, it is equal bit for bit."""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._errors import first_line
from .._files import atomic_path
from .counts import Counts
from .errors import PruningError

if TYPE_CHECKING:
    from .plan import Plan

VERSION = 1
_TENSORS = ("masks", "cuts")


def write_plan(plan: "Plan", path: Path) -> Path:
    data = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in (*_TENSORS, "counts")}
    data = {name: dict(value) if isinstance(value, Mapping) else value for name, value in data.items()}
    data |= {"version": VERSION, "counts": asdict(plan.counts)}
    data["masks"] = {name: _pack(mask) for name, mask in plan.masks.items()}
    data["cuts"] = {n: {axis: kept.tolist() for axis, kept in axes.items()} for n, axes in plan.cuts.items()}
    if not path.absolute().parent.is_dir():
        raise PruningError(f"{path}: the folder {path.parent} does not exist")
    with atomic_path(path) as part:
        part.write_text(json.dumps(data))
    return path


def read_plan(cls: "type[Plan]", path: Path) -> "Plan":
    try:
        data = json.loads(path.read_text())
        if data.pop("version") != VERSION:
            raise PruningError(f"plan {path} is of another version than {VERSION}")
        return cls(**_decoded(data))
    except OSError as error:
        raise PruningError(f"plan {path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PruningError):
            raise
        raise PruningError(f"plan {path} is damaged or no plan: {type(error).__name__}: {first_line(error)}") from error


def _decoded(data: dict[str, Any]) -> dict[str, Any]:
    data["masks"] = MappingProxyType({name: _unpack(packed) for name, packed in data["masks"].items()})
    data["cuts"] = MappingProxyType(
        {name: {int(axis): torch.tensor(kept) for axis, kept in axes.items()} for name, axes in data["cuts"].items()}
    )
    data["counts"] = Counts(**data["counts"] | {"input_size": tuple(data["counts"]["input_size"])})
    data["structure"] = tuple(data["structure"])
    data["removed"] = {kind: tuple(counts) for kind, counts in data["removed"].items()}
    return data


def _pack(mask: Tensor) -> dict[str, Any]:
    bits = np.packbits(mask.flatten().cpu().numpy())
    return {"shape": list(mask.shape), "bits": base64.b64encode(bits.tobytes()).decode("ascii")}


def _unpack(packed: Mapping[str, Any]) -> Tensor:
    shape = packed["shape"]
    count = int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"], validate=True), dtype=np.uint8), count=count)
    return torch.from_numpy(bits.astype(bool)).view(shape)
