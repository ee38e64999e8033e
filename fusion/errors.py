"""What fusion refuses."""

from .._errors import RequestError


class FuseError(RequestError):
    """The model cannot be fused, or a fused model is asked for what it cannot do."""
