"""Which body of an op runs: asked for by name it runs or raises; `auto` takes the fastest that can."""

from enum import Enum


class Impl(str, Enum):
    AUTO = "auto"
    FUSED = "fused"  # Triton, on a GPU
    TILED = "tiled"  # torch, tiles of queries
    REFERENCE = "reference"  # torch, the definition


def choose(op: str, impl: Impl | str, why_not_fused: str | None) -> Impl:
    """Return the body to run: never `AUTO`.

    Args:
        op: name for the messages.
        impl: what the caller asked for.
        why_not_fused: the reason why the kernel cannot run on these tensors; None if it can.

    Raises:
        ValueError: `impl` is not one of the four names.
        NotImplementedError: `impl` is "fused" and `why_not_fused` gives a reason.
    """
    try:
        wanted = Impl(impl)
    except ValueError:
        raise ValueError(f"{op}: impl must be one of {[i.value for i in Impl]}, got {impl!r}") from None
    if wanted is Impl.FUSED and why_not_fused is not None:
        raise NotImplementedError(f"{op}: impl='fused' cannot run here: {why_not_fused}")
    if wanted is Impl.AUTO:
        return Impl.TILED if why_not_fused is not None else Impl.FUSED
    return wanted
