"""Clipped softmax: probabilities are stretched to [gamma, zeta] and clipped to [0, 1], so that a row can be all zeros.

Paper      Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929, equation 4.
"""

import math
import re
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

Clip = Annotated[Sequence[float], "float[]"]  # (gamma, zeta)

_NAMED = re.compile(r"clipped\((-?[0-9.]+):([0-9.]+)\)")
# An entry of the authors' table whose numbers are not those of its name.
_MISNAMED = {"clipped(-.005:1.005)": (-0.003, 1.005)}


def check_clip(op: str, clip: Sequence[float] | None) -> None:
    """Raise ValueError unless `clip` is None or (gamma, zeta) with finite gamma <= 0 and zeta >= 1."""
    if clip is None:
        return
    if len(clip) != 2 or not (-math.inf < clip[0] <= 0 and 1 <= clip[1] < math.inf):
        raise ValueError(f"{op}: clip must be (gamma, zeta) with gamma <= 0 and zeta >= 1, got {tuple(clip)}")


def clipped(probs: Tensor, clip: Sequence[float] | None) -> Tensor:
    """Return clip((zeta - gamma) * probs + gamma, 0, 1); clipped entries have no gradient. `probs` itself for None."""
    if clip is None:
        return probs
    gamma, zeta = clip
    return (probs * (zeta - gamma) + gamma).clamp(0, 1)


def read_clip(
    owner: str, softmax_clip: Sequence[float] | str | None, clip_alpha: float | None, tokens: int
) -> tuple[float, float] | None:
    """Return (gamma, zeta) of a layer, or None for plain softmax.

    Args:
        owner: the layer's name, for errors.
        softmax_clip: (gamma, zeta), or a name of the authors' table: "vanilla", "clipped(-.003:1)", ...
        clip_alpha: gamma = -clip_alpha / tokens and zeta = 1 instead.
        tokens: of the sequence for which the layer is made; gamma does not follow the input.

    Raises:
        ValueError: both are given, an unknown name, or numbers out of range.
    """
    if softmax_clip is not None and clip_alpha is not None:
        raise ValueError(
            f"{owner}: softmax_clip and clip_alpha are given, {softmax_clip!r} and {clip_alpha!r}; give one"
        )
    if clip_alpha is not None:
        if not 0 <= clip_alpha < math.inf:
            raise ValueError(f"{owner}: clip_alpha must be a number >= 0, got {clip_alpha!r}")
        return -clip_alpha / tokens, 1.0
    clip = _named(owner, softmax_clip) if isinstance(softmax_clip, str) else softmax_clip
    check_clip(owner, clip)
    return None if clip is None else (float(clip[0]), float(clip[1]))


def _named(owner: str, name: str) -> tuple[float, float] | None:
    if name == "vanilla":
        return None
    if name in _MISNAMED:
        return _MISNAMED[name]
    found = _NAMED.fullmatch(name)
    if found is None:
        raise ValueError(f"{owner}: softmax_clip must be 'vanilla' or 'clipped(GAMMA:ZETA)' as text, got {name!r}")
    return float(found[1]), float(found[2])
