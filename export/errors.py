"""Errors of export and loading; every message is one line that names the request and what was found."""


class ExportError(ValueError):
    """Invalid export request: a name, a file, a size or a model that does not fit."""


class MissingExtraError(ExportError, ImportError):
    """An optional package that this door needs is not installed."""


class DisagreementError(ExportError):
    """The exported model does not compute what the PyTorch model computes."""
