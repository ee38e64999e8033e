"""Checks that every op makes before it starts, with one wording."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, bool)


def pair(op: str, name: str, value: T | Sequence[T]) -> list[T]:
    """Spell an int (or bool) out as [rows, columns]; a pair passes through."""
    both = list(value) if isinstance(value, Sequence) else [value, value]
    if len(both) != 2 or not all(isinstance(v, (int, torch.SymInt)) for v in both):
        raise ValueError(f"{op}: {name} must be an int or a pair (rows, columns), got {value!r}")
    return both


def check_at_least(op: str, name: str, values: Sequence[int], least: int) -> None:
    if min(values) < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {tuple(values)}")


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q, k, v are (B, H, W, heads, head_dim) of one shape, floating dtype and device."""
    if q.dim() != 5:
        raise ValueError(f"{op}: q must be (B, H, W, heads, head_dim), got shape {tuple(q.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape:
            raise ValueError(f"{op}: {name} must have the shape of q {tuple(q.shape)}, got {tuple(t.shape)}")
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have the dtype of q {q.dtype}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{op}: {name} must be on the device of q {q.device}, got {t.device}")
    if not q.is_floating_point():
        raise ValueError(f"{op}: q, k, v must be floating point, got {q.dtype}")
    if min(q.shape[1:]) < 1:
        raise ValueError(f"{op}: H, W, heads and head_dim must be at least 1, got shape {tuple(q.shape)}")
