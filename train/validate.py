"""Measure any timm model on labeled images: top-1, top-5 and loss, per class too, in one or several processes.

Each process reads every n-th image, so that each image counts once. Images that cannot be read are counted and named;
no other image takes their place.
"""

import csv
import json
import os
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_dist_info
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from .._errors import first_line
from .._files import UnreadableFileError, atomic_path, read_json
from .._memory import check_images_fit
from .._modes import evaluating
from .._timm import pretrained_cfg
from ..export.metadata import class_names as label_names
from ..export.metadata import metadata_of
from .data import ToMode
from .errors import TrainError
from .images import name_of, read_sample
from .launch import Launcher, check_precision, processes
from .lists import read_class_map
from .losses import judge
from .model import DTYPES
from .recipe import DataRecipe, Precision
from .sources import class_names, find_split, open_images, open_split

Sample = tuple[Tensor | None, int, str]  # image, class, name

_LARGEST_LABELS = 2**26  # bytes of a file of real labels
_REAL = "ILSVRC2012_val_{:08d}"  # name of ImageNet's n-th validation image


@dataclass(frozen=True)
class ValidationRequest:
    """What a model is measured on."""

    data: str | Path | None  # class folders, a folder with a validation split, a tar, or a list; None: mnist5k
    source: str = "folder"  # as data.source of a recipe
    split: str | None = None  # None: validation (or val, ...) where `data` has one, otherwise `data` itself
    class_map: Path | None = None  # names in the order of the model's classes
    real_labels: str | Path | None = None  # JSON of ImageNet's reassessed labels; "imagenet": timm's copy
    img_size: int | tuple[int, int] | None = None  # px, or (height, width); None: the model's own
    crop_pct: float | None = None  # None: the model's own
    batch_size: int = 64  # images of a process
    workers: int = 4  # loader processes of a process
    precision: Precision = "fp32"


@dataclass(frozen=True)
class ClassResult:
    """Accuracy on the images of one class, %."""

    index: int
    name: str
    images: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Validation:
    """Result over all images that could be read."""

    top1: float  # %
    top5: float
    loss: float  # cross-entropy
    images: int
    unreadable: tuple[str, ...]  # names of images that were left out
    not_finite: int  # images with logits that are not finite; they count as wrong
    real_top1: float | None  # % against the real labels; None: not requested
    real_top5: float | None
    real_images: int  # images with at least one real label
    classes: tuple[ClassResult, ...]  # of the classes that have images
    input_size: tuple[int, int, int]  # (C, H, W), px
    seconds: float


def validate(
    model: nn.Module, request: ValidationRequest, *, launcher: Launcher = "auto", device: str | None = None
) -> Validation:
    """Measure a timm model in eval mode. Its pretrained_cfg has the preprocessing.

    Class indices come from, in this order: the class map; the class names that the model knows; ImageNet's synsets,
    where the folders are named after them; the sorted names, where there are as many as the model has classes.

    Raises:
        TrainError: the data cannot be opened, its classes are not the model's, or the model does not run on the images.
    """
    start = time.perf_counter()
    with processes(launcher, device) as place:
        check_precision(request.precision, place)
        samples, names, size = _open(model, request)
        real = None if request.real_labels is None else _Real(request.real_labels)
        rank, world = get_dist_info()
        loader = DataLoader(
            Subset(samples, range(rank, len(samples), world)),
            request.batch_size,
            num_workers=request.workers,
            collate_fn=collate_samples,
            pin_memory=place.type == "cuda",
        )
        with evaluating(model), torch.inference_mode():
            rows, unreadable = _measure(model.to(place), loader, request, place, real)
        parts = all_gather_object((rows, unreadable)) if world > 1 else [(rows, unreadable)]
    rows = torch.cat([part[0] for part in parts])
    lost = tuple(sorted(name for part in parts for name in part[1]))
    if not len(rows):
        raise TrainError(f"{request.data}: none of its {len(lost)} images can be read, the first is {lost[0]}")
    return _summarise(rows, lost, names, size, time.perf_counter() - start)


def write_classes(result: Validation, out: Path) -> None:
    """Write the accuracy of each class as CSV, atomically.

    Raises:
        OSError: the disk is full, or the folder does not exist.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "name", "images", "top1", "top5"))
    for row in result.classes:
        writer.writerow((row.index, row.name, row.images, f"{row.top1:.4f}", f"{row.top5:.4f}"))
    with atomic_path(out) as part:
        part.write_text(text.getvalue(), encoding="utf-8")


class Samples(Dataset):
    """(image or None, class index, name) of a data set; an image that cannot be read is None, and its name says why."""

    def __init__(self, dataset: Dataset, transform: Callable, to_index: Mapping[int, int] | None) -> None:
        self.dataset = dataset
        self.transform = transform
        self.to_index = to_index  # from the data set's class indices to the model's; None: equal

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length

    def __getitem__(self, index: int) -> Sample:
        name = name_of(self.dataset, index)
        try:
            image, target = read_sample(self.dataset, index)
            image = self.transform(image)
        except Exception as error:  # decoders raise many types
            return None, -1, f"{name} ({first_line(error)})"
        return image, int(target) if self.to_index is None else self.to_index[int(target)], name


def _open(model: nn.Module, request: ValidationRequest) -> tuple[Samples, dict[int, str], tuple[int, int, int]]:
    """Return the images, the names of the model's classes, and the size of the images."""
    metadata = metadata_of(model, request.img_size)
    if metadata is None:
        raise TrainError(f"{type(model).__name__} was not made by timm: its preprocessing is unknown")
    options = metadata.transform_args | ({} if request.crop_pct is None else {"crop_pct": request.crop_pct})
    try:
        check_images_fit(request.batch_size, *metadata.input_size)
        steps = create_transform(**options)
    except Exception as error:  # a hub folder may hold any preprocessing
        raise TrainError(
            f"the model's preprocessing of a batch of {request.batch_size} fails: {first_line(error)}"
        ) from error
    transform = transforms.Compose([ToMode(metadata.input_size[0]), *steps.transforms])
    dataset, found = _dataset(request)
    numbers = _number_classes(found, model, request)
    names = {index: name for index, name in enumerate(label_names(model) or ())}
    names = names or {numbers[i]: name for i, name in enumerate(found or ())}
    return Samples(dataset, transform, numbers if found else None), names, metadata.input_size


def _dataset(request: ValidationRequest) -> tuple[Dataset, list[str] | None]:
    """Open the data, and return the names of its classes in the order of its indices, where it has any."""
    root = None if request.data is None else str(request.data)
    if request.source in ("folder", "list") and root is not None:
        data = DataRecipe(source=request.source, root=root)
        dataset = open_images(data, find_split(Path(root), request.split))
    else:
        split = request.split or "validation"
        data = DataRecipe(source=request.source, root=root, val_split=split)
        dataset = open_split(data, split, transforms.Compose([]), fixed=False)
    return dataset, class_names(dataset)


def _number_classes(found: list[str] | None, model: nn.Module, request: ValidationRequest) -> dict[int, int]:
    """Map the class indices of the data to those of the model.

    Raises:
        TrainError: a class is not among the model's.
    """
    if found is None:
        return {}
    classes = int(model.num_classes)  # type: ignore[arg-type]  # nn.Module's attributes are untyped
    if request.class_map is not None:
        return _look_up(found, read_class_map(request.class_map), classes, str(request.class_map))
    own = pretrained_cfg(model).get("label_names")
    if isinstance(own, list | tuple) and len(own) == classes:
        return _look_up(found, {str(name): i for i, name in enumerate(own)}, classes, "the model's class names")
    if (subset := infer_imagenet_subset(model)) is not None:
        synsets = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}
        if set(found) <= synsets.keys():
            return {i: synsets[name] for i, name in enumerate(found)}
    if len(found) != classes:
        raise TrainError(
            f"{request.data} has {len(found)} classes, the model {classes}: give a class map with the model's classes"
        )
    return {i: i for i in range(classes)}


def _look_up(found: Sequence[str], numbers: Mapping[str, int], classes: int, where: str) -> dict[int, int]:
    if strangers := [name for name in found if name not in numbers]:
        raise TrainError(f"class {strangers[0]!r} of the data is not among the {len(numbers)} of {where}")
    mapped = {i: numbers[name] for i, name in enumerate(found)}
    if beyond := [name for i, name in enumerate(found) if mapped[i] >= classes]:
        raise TrainError(f"class {beyond[0]!r} has the index {numbers[beyond[0]]}, the model has {classes} classes")
    return mapped


def collate_samples(
    samples: list[tuple[Tensor | None, int, str]],
) -> tuple[Tensor | None, Tensor, list[str], list[str]]:
    """Return images, class indices and names of the readable images, and the names of the others."""
    read = [sample for sample in samples if sample[0] is not None]
    lost = [name for image, _, name in samples if image is None]
    images = torch.stack([image for image, _, _ in read if image is not None]) if read else None
    return images, torch.tensor([target for _, target, _ in read], dtype=torch.long), [n for _, _, n in read], lost


def _measure(
    model: nn.Module, loader: DataLoader, request: ValidationRequest, place: torch.device, real: "_Real | None"
) -> tuple[Tensor, list[str]]:
    """Return the names of unreadable images, and a row for each other.

    Columns: class, top-1 hit, top-5 hit, loss, whether the logits are finite, top-1 and top-5 hit of the real labels
    (NaN: none).
    """
    dtype, rows, lost = DTYPES[request.precision], [], []
    for images, targets, names, unreadable in loader:
        lost += unreadable
        if images is None:
            continue
        logits = _run(model, images.to(place, non_blocking=True), dtype)
        if (targets >= logits.shape[1]).any():
            raise TrainError(
                f"{request.data}: class index {int(targets.max())}, the model has {logits.shape[1]} classes"
            )
        finite = logits.isfinite().all(1)
        judged = judge(logits, targets.to(place))
        judged[:, :2] *= finite[:, None]
        truth = torch.full((len(logits), 2), torch.nan) if real is None else real.judge(logits, names)
        parts = [targets[:, None], judged.cpu(), finite[:, None].cpu(), truth]
        rows.append(torch.cat([part.double() for part in parts], 1))
    return torch.cat(rows) if rows else torch.empty(0, 7, dtype=torch.float64), lost


def _run(model: nn.Module, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    try:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits = model(images)
    except Exception as error:  # models raise many types
        raise TrainError(f"the model does not run on a batch of {tuple(images.shape)}: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.shape[1]:
        raise TrainError("wanted a classifier, whose output is (B, classes)")
    return logits.float()


class _Real:
    """ImageNet's reassessed labels (Beyer et al. 2020, arXiv:2006.07159): classes for each validation image."""

    def __init__(self, source: str | Path) -> None:
        self.labels = {_REAL.format(i): labels for i, labels in enumerate(_read_real(source), 1)}

    def judge(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        """Return (B, 2): whether the best class, or one of the best five, is among the labels; NaN without labels."""
        best = logits.topk(min(5, logits.shape[1])).indices.tolist()
        rows = [self._judge(classes, name) for classes, name in zip(best, names, strict=True)]
        return torch.tensor(rows)

    def _judge(self, best: list[int], name: str) -> tuple[float, float]:
        key = os.path.basename(name).partition(".")[0]
        if key not in self.labels:
            raise TrainError(f"real labels: {name} is not a validation image of ImageNet (ILSVRC2012_val_NUMBER.JPEG)")
        truth = self.labels[key]
        if not truth:
            return torch.nan, torch.nan
        return float(best[0] in truth), float(any(index in truth for index in best))


def _read_real(source: str | Path) -> list[list[int]]:
    try:
        if str(source) == "imagenet":
            data = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") or b"")
        else:
            data = read_json(Path(source), _LARGEST_LABELS)
    except UnreadableFileError as error:
        raise TrainError(f"real labels {source} {error}") from error
    rows: list[Any] = data if isinstance(data, list) else [None]
    if not all(isinstance(row, list) and all(type(index) is int for index in row) for row in rows):
        raise TrainError(f"real labels {source}: wanted a list with a list of class indices for each image")
    return rows


def _summarise(
    rows: Tensor, lost: tuple[str, ...], names: Mapping[int, str], size: tuple[int, int, int], seconds: float
) -> Validation:
    top1, top5, loss = rows[:, 1:4].mean(0).tolist()
    known = rows[~rows[:, 5].isnan()]
    real = (100 * known[:, 5:].mean(0)).tolist() if len(known) else (None, None)
    return Validation(
        top1=100 * top1,
        top5=100 * top5,
        loss=loss,
        images=len(rows),
        unreadable=lost,
        not_finite=int((rows[:, 4] == 0).sum()),
        real_top1=real[0],
        real_top5=real[1],
        real_images=len(known),
        classes=tuple(_per_class(rows, names)),
        input_size=size,
        seconds=seconds,
    )


def _per_class(rows: Tensor, names: Mapping[int, str]) -> Iterator[ClassResult]:
    for index in rows[:, 0].unique().long().tolist():
        own = rows[rows[:, 0] == index]
        top1, top5 = (100 * own[:, 1:3].mean(0)).tolist()
        yield ClassResult(index, names.get(index, str(index)), len(own), top1, top5)
