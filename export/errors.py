"""Errors of export and loading; every message is one line that names what was requested and what was found."""

from .._errors import RequestError, ResultError


class ExportError(RequestError):
    """Invalid export request: a name, a file, a size or a model that does not fit."""


class MissingExtraError(ExportError, ImportError):
    """An optional package that export needs is not installed."""


class DisagreementError(ResultError, ExportError):
    """The exported model does not compute what the PyTorch model computes."""
