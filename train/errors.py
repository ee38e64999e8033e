"""Errors of training; every message is one line that names what was requested and what was found."""

from .._errors import RequestError, ResultError


class TrainError(RequestError):
    """Invalid training request: a recipe, a data set, a device, a folder or a checkpoint that does not fit."""


class MissingPackageError(TrainError, ImportError):
    """An optional package that a data source needs is not installed."""


class StorageError(OSError, TrainError):
    """A file of the run cannot be written, for example because the disk is full. Older checkpoints are complete."""


class DivergedError(ResultError, RuntimeError):
    """The loss or the gradient is not finite. The weights were not changed by it; older checkpoints are kept."""


class StoppedError(ResultError):
    """A signal ended the run after a checkpoint was written, from which it can be resumed."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
