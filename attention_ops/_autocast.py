"""Autocast at an op's door: read it once, cast once, and keep it out of the body."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the autocast dtype where autocast is on for their device, else as they are."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Switch autocast off for the device of `x`, where it is on: entering torch.autocast takes 5 us."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
