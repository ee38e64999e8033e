"""Errors of training; every message is one line that names what was requested and what was found."""

from .._errors import RequestError


class TrainError(RequestError):
    """Invalid training request: a recipe, a data set, a device, a folder or a checkpoint that does not fit."""


class MissingPackageError(TrainError, ImportError):
    """An optional package that a data source needs is not installed."""
