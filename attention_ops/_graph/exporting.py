"""Whether a model is on its way into a file, where only standard operations may be."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Whole:
    """Ops stay whole in what torch.export captures now."""

    asked_for = False


def is_exported() -> bool:
    """Say whether torch.export or torch.jit.trace records operations that are to run without this package."""
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and not _Whole.asked_for)


@contextmanager
def keeping_ops_whole() -> Iterator[None]:
    """Let torch.export show our ops as single operations, for graphs that run in this process."""
    before, _Whole.asked_for = _Whole.asked_for, True
    try:
        yield
    finally:
        _Whole.asked_for = before
