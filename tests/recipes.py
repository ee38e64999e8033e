"""Fixtures: a folder of 24 small images, and recipes of tiny models that train on it in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cow")
EVERYTHING = {  # all that draws random numbers, and an accumulation that does not divide the epoch
    "augment": {
        "randaugment": "rand-m9-mstd0.5-inc1", "hflip": 0.5, "scale": (0.5, 1.0), "rotate": 10.0, "shift": 0.1,
        "erasing": 0.5, "mixup": 0.4, "cutmix": 0.5, "smoothing": 0.1,
    },
    "ema": 0.8, "accumulate": 4, "precision": "bf16",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the tensors are tiny."""


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write images whose brightness tells the class, never square."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (20, 26, 3)) + 80 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of 3 classes: train/ with 8 images each, val/ with 3 each."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 8, seed=0)
    write_images(root / "val", 3, seed=1)
    return root


@pytest.fixture
def make_recipe(images: Path) -> Callable[..., dict[str, Any]]:
    """Return a function from changed sections to the plain data of a recipe; a dict updates its section."""

    def make(**changes: Any) -> dict[str, Any]:
        recipe = {
            "model": {"name": "test_resnet", "num_classes": 3},
            "data": {"root": str(images), "img_size": 16, "workers": 0},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.05},
            "schedule": {"epochs": 2},
            "batch_size": 4,
        }
        for key, value in changes.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        return recipe

    return make


@pytest.fixture
def everything() -> dict[str, Any]:
    return EVERYTHING
