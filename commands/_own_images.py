"""The user's own images for `foveate demo`: found in class folders, split, and copied at the size of the run.

Every image is decoded once, so that unreadable files are known before training, and large photographs are not decoded
again in every epoch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .._errors import RequestError
from .._files import atomic_path
from ..export import ExportError, inputs
from ..export.inputs import decode_image
from ..train.sources import SYNONYMS, class_key

TRAIN, VAL = "train", "val"
SPLITS = {"test", "testing", *(name for names in SYNONYMS for name in names)}  # folders that are no classes
VAL_SHARE = 0.2  # of the images of a class
LARGER = 1.5  # side of a copy over that of the model's images: random crops take a part of it
MOST_NAMED = 5  # unreadable files

Files = dict[str, list[Path]]  # by class


@dataclass(frozen=True)
class OwnImages:
    """The files of a folder by class: in two splits if the folder has them, else all in `train`."""

    folder: Path
    train: Files
    val: Files | None

    @property
    def classes(self) -> list[str]:
        return list(self.train)


@dataclass
class Copies:
    """What was copied to `root`/train and `root`/val."""

    root: Path
    how: str  # the split was made
    counts: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VAL: 0})
    unreadable: list[str] = field(default_factory=list)


def find_images(folder: Path) -> OwnImages:
    """Find class folders, in `folder` or in its folders train and val; any timm synonym of the two names is known.

    Images are files with the suffix of an image, in a class folder or below it. Hidden files and folders are left out.

    Raises:
        RequestError: no such folder, no class folders, folders of other splits only, a single class, a class with too
            few images, or a validation class that has no training images.
    """
    if not folder.is_dir():
        raise RequestError(f"--images {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    train, val = (next((folder / n for n in names if (folder / n).is_dir()), None) for names in SYNONYMS)
    if train is not None and val is not None:
        found = OwnImages(folder, _class_files(train), _class_files(val))
    else:
        found = OwnImages(folder, _class_files(folder), None)
        _check_no_splits(found)
    _check(found)
    return found


def copy_images(images: OwnImages, root: Path, px: int | tuple[int, int], channels: int, seed: int) -> Copies:
    """Decode every image, split the classes if the folder has no splits, and write copies as PNG files.

    The short side of a copy is at most 1.5 * px. Unreadable files are left out and named in the result. On an error
    nothing is written.

    Args:
        root: folder to write; must not exist.
        px: side of the model's images; of (height, width) the longer one counts.
        channels: of the model's input, 1 (gray) or 3.
        seed: of the split: 20 % of the images of each class, at least one, are for validation.

    Raises:
        RequestError: too few images of a class can be read.
    """
    px = px if isinstance(px, int) else max(px)
    share = f"{VAL_SHARE:.0%} of each class for validation, seed {seed}"
    copies = Copies(root, share if images.val is None else "the folders of --images")
    with atomic_path(root) as part:
        for name in images.classes:
            train = _copy_class(images.train[name], part / TRAIN / name, px, channels, copies)
            if images.val is None:
                val = _move_share(train, part / VAL / name, seed)
            else:
                val = _copy_class(images.val.get(name, []), part / VAL / name, px, channels, copies)
            if len(train) <= len(val) * (images.val is None):  # nothing is left to train on
                raise RequestError(_too_few(images, name, copies))
            copies.counts[TRAIN] += len(train) - len(val) * (images.val is None)
            copies.counts[VAL] += len(val)
        if not copies.counts[VAL]:
            raise RequestError(f"--images {images.folder}: no validation image can be read")
    return copies


def describe_unreadable(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    return f"{len(names)} unreadable image{'s' if len(names) > 1 else ''} left out: {shown}"


def _class_files(folder: Path) -> Files:
    folders = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {path.name: inputs.find_images(path) for path in sorted(folders, key=lambda path: class_key(path.name))}


def _check_no_splits(found: OwnImages) -> None:
    """Refuse folders such as train and test, with class folders inside: they would be two classes."""
    names = [name for name, files in found.train.items() if files]
    nested = [n for n in names if any(path.parent.parent != found.folder for path in found.train[n])]
    if nested and all(name.lower() in SPLITS for name in names):
        raise RequestError(
            f"--images {found.folder}: wanted class folders, or the folders train and val, got {', '.join(names)}: "
            f"rename them, or give {found.folder / nested[-1]}"
        )


def _check(found: OwnImages) -> None:
    where, wanted = f"--images {found.folder}", "wanted a folder of images per class"
    if not found.train:
        loose = len([path for path in inputs.find_images(found.folder) if path.parent == found.folder])
        raise RequestError(f"{where}: {wanted}, found no folder" + (f", and {loose} images" if loose else ""))
    least = 1 if found.val is not None else 2
    if few := [name for name, files in found.train.items() if len(files) < least]:
        raise RequestError(
            f"{where}: class {few[0]!r} has {len(found.train[few[0]])} images for training"
            + (f", wanted at least {least}: one of them is for validation" if least > 1 else "")
        )
    if len(found.train) < 2:
        raise RequestError(f"{where}: {wanted}, for two classes or more; found one, {found.classes[0]!r}")
    if strangers := [name for name, files in (found.val or {}).items() if files and name not in found.train]:
        raise RequestError(f"{where}: class {strangers[0]!r} has validation images but no training images")


def _copy_class(files: Sequence[Path], target: Path, px: int, channels: int, copies: Copies) -> list[Path]:
    """Write the readable images of a class as 00000.png, 00001.png, ..., and name the others in `copies`."""
    target.mkdir(parents=True)
    written: list[Path] = []
    for file in files:
        try:
            image = decode_image(file, channels)
        except ExportError as error:
            copies.unreadable.append(str(error))
            continue
        factor = min(1.0, LARGER * px / min(image.size))
        size = (round(image.width * factor), round(image.height * factor))
        path = target / f"{len(written):05}.png"
        (image if factor == 1.0 else image.resize(size, Image.Resampling.BICUBIC)).save(path)
        written.append(path)
    return written


def _move_share(train: Sequence[Path], target: Path, seed: int) -> list[Path]:
    """Move copies from training to validation."""
    target.mkdir(parents=True)
    chosen = random.Random(f"{seed} {target.name}").sample(train, max(1, round(VAL_SHARE * len(train))) if train else 0)
    for path in chosen:
        path.rename(target / path.name)
    return chosen


def _too_few(images: OwnImages, name: str, copies: Copies) -> str:
    found = f"; {describe_unreadable(copies.unreadable)}" if copies.unreadable else ""
    return f"--images {images.folder}: class {name!r} has too few readable images to train and to validate{found}"
