"""A data set as a list of files and labels: a CSV file with named columns, or a text file, a path and a label a line.

timm's ImageDataset reads the images through `ListReader`.
"""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from .._errors import did_you_mean, first_line
from .._files import UnreadableFileError, check_regular, read_json, read_text
from .errors import TrainError

SUFFIXES = (".csv", ".txt")
IMAGE, LABEL = "image", "label"  # columns of a CSV file, unless data.image_key and data.label_key name others
_LARGEST_MAP = 2**24  # bytes


class ListReader(Reader):
    """timm's interface to files: `reader[i]` is an open file and its class index."""

    def __init__(
        self, root: Path, names: Sequence[str], targets: Sequence[int], class_to_idx: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.root = root
        self.names = names
        self.targets = targets
        self.class_to_idx = class_to_idx  # empty where labels are numbers

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open(self.root / self.names[index], "rb"), self.targets[index]

    def __len__(self) -> int:
        return len(self.names)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.names[index]
        return os.path.basename(name) if basename else str(self.root / name) if absolute else name


def open_list(
    path: Path, root: Path, image_key: str | None, label_key: str | None, class_map: Mapping[str, int] | None
) -> ImageDataset:
    """Open a list; paths in it are relative to `root`.

    Args:
        path: .csv with a header, or .txt with lines of a path, white space and a label.
        image_key, label_key: columns of a .csv file; None: image, label.
        class_map: index of each label; None: labels that are all whole numbers are indices, others are names, which are
            numbered in natural order.

    Raises:
        TrainError: not a list, a column or a file is missing, or a label is not in the class map.
    """
    if path.suffix == ".txt" and (image_key or label_key):
        raise TrainError(f"data.{'image_key' if image_key else 'label_key'}: {path} has no columns; wanted a .csv file")
    try:
        check_regular(path)
        rows = list(
            _read_csv(path, image_key or IMAGE, label_key or LABEL) if path.suffix == ".csv" else _read_txt(path)
        )
    except UnreadableFileError as error:
        raise TrainError(f"{path} {error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise TrainError(f"{path} is not a list of images: {first_line(error)}") from error
    if not rows:
        raise TrainError(f"{path} lists no images")
    if not os.path.exists(root / rows[0][0]):
        raise TrainError(f"{path}: its first image, {root / rows[0][0]}, does not exist")
    numbers, targets = _number(path, [label for _, label in rows], class_map)
    return ImageDataset(str(root), reader=ListReader(root, [name for name, _ in rows], targets, numbers))


def read_class_map(path: Path) -> dict[str, int]:
    """Read the class names and their indices: a text file with a name a line, or JSON: a list, or names to indices.

    Raises:
        TrainError: not such a file, or names or indices repeat.
    """
    try:
        data = read_json(path, _LARGEST_MAP) if path.suffix == ".json" else read_text(path, _LARGEST_MAP).splitlines()
    except UnreadableFileError as error:
        raise TrainError(f"class map {path} {error}") from error
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        names = [name.strip() for name in data]
        while names and not names[-1]:
            names.pop()
        pairs = [(name, index) for index, name in enumerate(names)]
    elif isinstance(data, dict) and all(type(index) is int and index >= 0 for index in data.values()):
        pairs = list(data.items())
    else:
        raise TrainError(f"class map {path}: wanted a list of names, or names with their indices")
    found = dict(pairs)
    if not found or not all(found) or len(found) != len(pairs) or len(set(found.values())) != len(found):
        raise TrainError(f"class map {path}: wanted one name for each index, without repetitions and empty lines")
    return found


def _read_csv(path: Path, image_key: str, label_key: str) -> Iterator[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        for option, key in (("image_key", image_key), ("label_key", label_key)):
            if key not in columns:
                raise TrainError(f"data.{option}: {path} has no column {key!r}" + did_you_mean(key, columns))
        for row in reader:
            if not row[image_key] or not row[label_key]:
                raise TrainError(f"{path}, line {reader.line_num}: wanted an image and a label")
            yield row[image_key], row[label_key].strip()


def _read_txt(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            parts = line.rsplit(None, 1)
            if not parts:
                continue
            if len(parts) != 2:
                raise TrainError(f"{path}, line {number}: wanted a path and a label, got {line.strip()[:80]!r}")
            yield parts[0].strip(), parts[1]


def _number(path: Path, labels: list[str], class_map: Mapping[str, int] | None) -> tuple[dict[str, int], list[int]]:
    """Return the index of each class name, and of each label."""
    if class_map is None:
        if all(label.isascii() and label.isdecimal() for label in labels):
            return {}, [int(label) for label in labels]
        class_map = {name: index for index, name in enumerate(sorted(set(labels), key=natural_key))}
    if strangers := sorted(set(labels) - set(class_map)):
        raise TrainError(f"{path}: label {strangers[0]!r} is not among the {len(class_map)} classes")
    return dict(class_map), [class_map[label] for label in labels]
