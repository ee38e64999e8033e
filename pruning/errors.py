"""What a user can get wrong when pruning; every message is one line that names the wish and the fact."""


class PruningError(ValueError):
    """A wish that cannot be met: a ratio, a group, a model without declared groups, a plan of another model."""
