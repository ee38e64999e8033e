"""Shifted windows (Swin) for the torch bodies of window attention: roll the map, mask what the roll brought together.

The kernels roll nothing: they cut the map at the shift.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tile_plan import SMALL_MASK
from .tiling import split_windows

Pair = tuple[int, int]


class Windows(NamedTuple):
    """What a query of window attention sees, and what is added to its logits."""

    window_size: Pair
    shift: Pair = (0, 0)
    bias: Tensor | None = None  # (heads, T, T) for windows of T tokens
    mask: Tensor | None = None  # (windows, T, T) bool, of the rolled map


class ClippedWindows(NamedTuple):
    """The same, and (gamma, zeta) of a clipped softmax."""

    window_size: Pair
    shift: Pair = (0, 0)
    bias: Tensor | None = None
    mask: Tensor | None = None
    clip: Sequence[float] | None = None


def on_rolled_maps(body: Callable[..., Any], cached: bool = False) -> Callable[..., Any]:
    """Return a body that takes a shift too, of one that takes windows without a shift.

    Args:
        cached: keep masks that are small; for bodies of real tensors only.
    """
    make_mask = _mask_of_numbers if cached else shift_mask

    def shifted(q: Tensor, k: Tensor, v: Tensor, windows: Windows | ClippedWindows, scale: float) -> Any:
        shift, mask = windows.shift, windows.mask
        if shift == (0, 0):
            return body(q, k, v, windows, scale)
        seen = make_mask((q.shape[1], q.shape[2]), windows.window_size, shift, q.device)
        seen = seen if mask is None else seen & mask
        rolled = (x.roll((-shift[0], -shift[1]), (1, 2)) for x in (q, k, v))
        out = body(*rolled, windows._replace(shift=(0, 0), mask=seen), scale)
        return tuple(x.roll(shift, (1, 2)) for x in out) if isinstance(out, tuple) else out.roll(shift, (1, 2))

    shifted.__name__ = body.__name__
    return shifted


def shift_mask(size: Pair, window_size: Pair, shift: Pair, device: torch.device) -> Tensor:
    """Return (windows, T, T) bool for a map rolled by -shift: True for tokens that the roll left side by side."""
    moved = [torch.arange(length, device=device) >= length - step for length, step in zip(size, shift, strict=True)]
    part = moved[0][:, None].int() * 2 + moved[1].int()  # (H, W): 0 to 3
    windows = split_windows(part[None, :, :, None, None], window_size)[0, 0, :, :, 0]  # (windows, T)
    return windows[:, :, None] == windows[:, None, :]


def _mask_of_numbers(size: Pair, window_size: Pair, shift: Pair, device: torch.device) -> Tensor:
    small = size[0] * size[1] * window_size[0] * window_size[1] <= SMALL_MASK
    return (_small_mask if small else shift_mask)(size, window_size, shift, device)


@lru_cache(maxsize=32)
def _small_mask(size: Pair, window_size: Pair, shift: Pair, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made first during inference, it must serve training too
        return shift_mask(size, window_size, shift, device)
