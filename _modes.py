"""Hold a model in one mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold every module in eval mode, then give each its own mode back."""
    with keeping_modes(model):
        model.eval()
        yield


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back: a BatchNorm may be frozen in a model that trains."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
