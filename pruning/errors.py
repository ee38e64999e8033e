"""Errors of pruning."""

from .._errors import RequestError


class PruningError(RequestError):
    """Invalid pruning request: a model, a method, a ratio or a file that does not fit. The message is one line."""
