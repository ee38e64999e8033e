"""What a user can get wrong before or while training; every message is one line that names the wish and the fact."""


class TrainError(ValueError):
    """A wish that cannot be met: a recipe, a data set, a device, a folder or a checkpoint that does not fit."""


class MissingPackageError(TrainError, ImportError):
    """An optional package that a data source needs is not installed."""
