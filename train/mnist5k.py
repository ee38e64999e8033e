"""The 5000 digits as a data set with a fixed split.

Every fifth image of a class, in file order, is held out: 400 images per class for training, 100 for validation.
"""

from typing import Literal

import torch
from torch import Tensor

from .._digits import MissingDigitsError, read_digits
from .errors import MissingPackageError

NUM_CLASSES = 10
_HELD_OUT_EVERY = 5


def load_digits(split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
    """Return images (N, 28, 28) uint8 and classes (N,) int64: N is 4000 for "train", 1000 for "validation"."""
    try:
        images, targets = (torch.from_numpy(array.copy()) for array in read_digits())
    except MissingDigitsError as error:
        raise MissingPackageError(f"data.source 'mnist5k': {error}") from error
    targets = targets.long()
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for digit in range(NUM_CLASSES):
        held_out[(targets == digit).nonzero().flatten()[::_HELD_OUT_EVERY]] = True
    chosen = held_out if split == "validation" else ~held_out
    return images[chosen], targets[chosen]
