"""Images of a split as uint8 tensors, and what happens to files that cannot be read.

Any exception of a decoder is caught with the file's name. It travels to the main process as data: an exception of a
loader worker would arrive as a text of many lines.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .._errors import first_line, printable
from .._images import with_8_bits
from .errors import TrainError
from .sources import Digits

Unreadable = Literal["skip", "mark", "raise"]


class Draw(NamedTuple):
    """An image that the sampler drew, and what its random augmentation depends on: nothing else."""

    number: int  # index in the split
    seed: tuple[int, int, int]  # of the recipe, epoch, place in the epoch over all processes


class Sample(NamedTuple):
    """One image, or the reason why there is none."""

    image: Tensor  # (C, H, W) uint8; zeros if it could not be read
    target: Any
    number: int  # index in the split
    skipped: tuple[tuple[str, str], ...] = ()  # file and reason, of each file that could not be read
    read: bool = True
    error: str = ""  # ends the run


class Batch:
    """Images (B, C, H, W) uint8 and targets, and what was noticed in reading. Unpacks as (images, targets)."""

    def __init__(self, images: Tensor, targets: Tensor, samples: Sequence[Sample] = (), error: str = "") -> None:
        self.images, self.targets = images, targets
        self.indices = [sample.number for sample in samples]
        self.skipped = [pair for sample in samples for pair in sample.skipped]
        self.replaced = sum(bool(sample.skipped) for sample in samples)  # in training: images that another replaced
        self.unread = [place for place, sample in enumerate(samples) if not sample.read]
        self.error = error

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.images, self.targets))

    def __getitem__(self, place: int) -> Tensor:
        return (self.images, self.targets)[place]

    def __len__(self) -> int:
        return 2

    def pin_memory(self) -> "Batch":
        """Copy the tensors into pinned memory; torch's loader calls this."""
        self.images, self.targets = self.images.pin_memory(), self.targets.pin_memory()
        return self


class Images(Dataset):
    """A split with its transform, in which every file that cannot be read is named and counted."""

    def __init__(
        self, source: Any, shape: tuple[int, int, int], unreadable: Unreadable = "raise", limit: int = 0
    ) -> None:
        """Take over a data set of `sources.open_split`, its transform included.

        Args:
            shape: (C, H, W) of a transformed image.
            unreadable: "skip" takes the next image that can be read (training); "mark" gives zeros and `read=False`
                (validation: no other image is counted in its place); "raise" raises a TrainError.
            limit: files in a row that "skip" passes over.
        """
        self.source = source
        self.shape = shape
        self.unreadable = unreadable
        self.limit = limit
        self.transform = self.source.transform
        if not isinstance(source, Digits):
            self.source.transform = None
        if hasattr(self.source, "loader"):  # torchvision's folders, whose own loader clips 16 bits
            self.source.loader = _load_path

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw | int) -> Sample:
        first = draw.number if isinstance(draw, Draw) else int(draw)
        skipped: list[tuple[str, str]] = []
        for step in range(len(self)):
            index = (first + step) % len(self)
            try:
                image, target = self._open(index)
            except Exception as error:  # decoders raise any type, SyntaxError and struct.error among them
                skipped.append((self.name(index), f"{type(error).__name__}: {first_line(error)}"))
                if self.unreadable != "skip" or len(skipped) > self.limit:
                    break
                continue
            return self._transformed(image, target, draw, index, skipped)
        return self._missing(first, skipped)

    def __getitems__(self, draws: Sequence[Draw | int]) -> Any:
        """Return samples, or a whole batch of digits that are prepared already; torch's loader calls this."""
        indices = [draw.number if isinstance(draw, Draw) else int(draw) for draw in draws]
        if isinstance(self.source, Digits) and self.source.fixed is not None:
            images, targets = self.source.__getitems__(indices)
            return Batch(images, targets, [Sample(images[i], 0, index) for i, index in enumerate(indices)])
        return [self[draw] for draw in draws]

    def name(self, index: int) -> str:
        """Return the file's name, see `name_of`."""
        return name_of(self.source, index)

    def _open(self, index: int) -> tuple[Image.Image, Any]:
        if isinstance(self.source, Digits):
            return self.source.images[index], self.source.targets[index]
        image, target = read_sample(self.source, index)
        return image, -1 if target is None else target

    def _transformed(
        self, image: Image.Image, target: Any, draw: Draw | int, index: int, skipped: list[tuple[str, str]]
    ) -> Sample:
        if isinstance(draw, Draw):
            _seed(draw.seed)
        try:
            return Sample(self.transform(image), target, index, tuple(skipped))
        except Exception as error:  # of Pillow, and of any augmentation
            why = f"{self.name(index)} cannot be augmented: {type(error).__name__}: {first_line(error)}"
        if self.unreadable == "raise":
            raise TrainError(f"data: {why}")
        return Sample(self._nothing(), 0, index, error=f"data: {why}")

    def _missing(self, index: int, skipped: list[tuple[str, str]]) -> Sample:
        name, why = skipped[-1]
        if self.unreadable == "raise":
            raise TrainError(f"data: {name} cannot be read: {why}")
        error = ""
        if self.unreadable == "skip":
            several = f"the last of {len(skipped)} files in a row" if len(skipped) > 1 else ""
            error = f"data: {name} cannot be read: {why}" + (f" ({several})" if several else "")
        return Sample(self._nothing(), 0, index, tuple(skipped), read=False, error=error)

    def _nothing(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.uint8)


class Collate:
    """Stack samples, and refuse a class index that the model has no output for."""

    def __init__(self, num_classes: int, *, multi_label: bool = False) -> None:
        self.num_classes = num_classes
        self.multi_label = multi_label

    def __call__(self, samples: Any) -> Batch:
        if isinstance(samples, Batch):
            batch = samples
        elif isinstance(samples, tuple):
            batch = Batch(*samples)
        elif isinstance(samples[0], Sample):
            return self._checked(samples)
        else:
            batch = Batch(*default_collate(samples))
        self._check(batch.targets)
        return batch

    def _checked(self, samples: list[Sample]) -> Batch:
        images = torch.stack([sample.image for sample in samples])
        if error := next((sample.error for sample in samples if sample.error), ""):
            return self._failed(images, samples, error)
        nothing = torch.zeros(self.num_classes) if self.multi_label else 0
        try:
            targets = torch.stack([_as_tensor(s.target if s.read else nothing) for s in samples])
            self._check(targets)
        except (TrainError, RuntimeError, TypeError, ValueError) as why:
            return self._failed(images, samples, f"data: {first_line(why).removeprefix('data: ')}")
        return Batch(images, targets, samples)

    def _failed(self, images: Tensor, samples: list[Sample], error: str) -> Batch:
        size = (len(samples), self.num_classes) if self.multi_label else (len(samples),)
        targets = torch.zeros(size, dtype=torch.float32 if self.multi_label else torch.long)
        return Batch(images, targets, samples, error)

    def _check(self, targets: Tensor) -> None:
        if self.multi_label:
            if targets.shape[1:] != (self.num_classes,) or bool(((targets < 0) | (targets > 1)).any()):
                raise TrainError(
                    f"data: loss.multi_label wants {self.num_classes} numbers from 0 to 1 per image, got targets of "
                    f"shape {tuple(targets.shape[1:])}"
                )
            return
        if targets.dim() != 1:
            raise TrainError(
                f"data: an image has {tuple(targets.shape[1:])} targets; set loss.multi_label, or name one"
            )
        if len(wrong := targets[(targets < 0) | (targets >= self.num_classes)]):
            raise TrainError(f"data: class index {int(wrong[0])}, but model.num_classes is {self.num_classes}")


def name_of(source: Any, index: int) -> str:
    """Return the file's name, relative to the split where the source knows it, as one printable line."""
    for find in (lambda: source.filename(index), lambda: source.samples[index][0]):
        try:
            if name := find():
                return printable(str(name))
        except Exception:  # a source without names, or a broken one: the number must do
            continue
    return f"image {index}"


def read_sample(source: Any, index: int) -> tuple[Any, Any]:
    """Return a decoded image and its class; unlike timm's data sets, never those of a neighbor."""
    if not hasattr(source, "reader"):
        return source[index]
    file, target, *_ = source.reader[index]
    with closing(file):
        return decode(file), target


def decode(file: Any) -> Image.Image:
    """Return all pixels of an image file as 8 bits per channel.

    Raises:
        ValueError: 32-bit pixels, whose range is not known.
        Exception: whatever the decoder raises for a damaged file.
    """
    image = Image.open(file)
    image.load()
    return with_8_bits(image)


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from any tuple of numbers."""
    torch.manual_seed(_seed(numbers))


def _seed(numbers: Sequence[int]) -> int:
    """Seed Python, NumPy and torch's CPU generator, as augmentation uses them."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    return seed


def _load_path(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return decode(file)


def _as_tensor(target: Any) -> Tensor:
    return target if isinstance(target, Tensor) else torch.as_tensor(target)
