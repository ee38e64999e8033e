"""What can go wrong on the way out of the house; every message is one line that names the wish and the fact."""


class ExportError(ValueError):
    """A wish that cannot be met: a name, a file, a size or a model that does not fit."""


class MissingExtraError(ExportError, ImportError):
    """An optional package that this door needs is not installed."""


class DisagreementError(ExportError):
    """The exported model does not compute what the PyTorch model computes."""
