"""Programs for images of any height and width: what torch assumed of the sizes is checked before a file is written."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import first_line
from .._modes import evaluating
from .._torch import assumptions, taking_sizes_of_one
from .errors import ExportError
from .spelling import SpelledOut

# Sides of the images with which assumptions are checked, in pixels: all up to NEAR_PX above the least, then some.
NEAR_PX, MOST_PX = 200, 2000


def any_size_program(model: nn.Module, example: Tensor, any_batch: bool) -> torch.export.ExportedProgram:
    """Export a model for every height and width that it takes.

    Args:
        model: in eval mode.
        example: (B, C, H, W).
        any_batch: leave the batch size free too.

    Raises:
        ExportError: the model takes one size only, or torch needs an assumption that not every size meets.
    """
    least = least_side(model, example)
    for strip in ((least, MOST_PX), (MOST_PX, least)):  # tables of positions may have an end
        if (error := _error(model, example, *strip)) is not None:
            raise ExportError(f"this model does not take images of every size: {error}")
    example = example[:, :, :1, :1].expand(-1, -1, *_odd_size(least)).contiguous()
    height, width = (torch.export.Dim(name, min=least) for name in ("height", "width"))
    free: dict[int, Any] = {2: height, 3: width} | ({0: torch.export.Dim("batch")} if any_batch else {})
    with torch.no_grad(), SpelledOut(), taking_sizes_of_one():
        program = torch.export.export(model, (example,), dynamic_shapes=(free,))
    if (broken := _broken(assumptions(program), least)) is not None:
        guard, size = broken
        raise ExportError(f"this model cannot be exported for every size: torch assumed {guard}, not so at {size}")
    return program


def least_side(model: nn.Module, example: Tensor) -> int:
    """Return the shortest side of square images that the model takes, in pixels.

    Raises:
        ExportError: the model takes no other size than the example's.
    """
    refused, taken = 0, min(_odd_size(1))
    with evaluating(model), torch.no_grad():
        for side in (taken, 2 * taken):
            if (error := _error(model, example, side)) is None:
                break
        else:
            raise ExportError(f"this model does not take images of every size: {error}")
        taken = side
        while taken - refused > 1:  # what is taken at a size is taken at all larger ones
            middle = (taken + refused) // 2
            if _error(model, example, middle) is None:
                taken = middle
            else:
                refused = middle
    return taken


def _error(model: nn.Module, example: Tensor, rows: int, columns: int | None = None) -> str | None:
    """Return why the model takes no images of a size; they are square where only the rows are given."""
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, example.shape[1], rows, rows if columns is None else columns))
    except Exception as error:  # models raise many types
        return first_line(error)
    return None


def _odd_size(least: int) -> tuple[int, int]:
    """Return an example's size that no stride divides, and for which no count of tiles is 1 or equal to another."""
    return max(157, 5 * least + 1), max(203, 7 * least + 1)


def _broken(guards: list[str], least: int) -> tuple[str, tuple[int, int]] | None:
    """Return an assumption that a size does not meet, and that size."""
    sides = np.array([*range(least, least + NEAR_PX), *range(least + NEAR_PX, MOST_PX, 37)])
    shape = [np.array([1, 3])[:, None, None], 3, sides[:, None], sides]
    for guard in guards:
        met = np.broadcast_to(eval(guard, {"torch": _Torch, "L": _Inputs(shape)}), (2, len(sides), len(sides)))
        if not met.all():
            _, row, col = np.argwhere(~met)[0]
            return guard, (int(sides[row]), int(sides[col]))
    return None


class _Torch:
    """The functions of torch in its assumptions, for arrays."""

    sym_max, sym_min = np.maximum, np.minimum


class _Inputs:
    """Every input is the image batch."""

    def __init__(self, shape: list[Any]) -> None:
        self.shape = shape

    def __getitem__(self, name: str) -> "_Inputs":
        return self

    def size(self) -> list[Any]:
        return self.shape
