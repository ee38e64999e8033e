"""What an exported file says about itself: preprocessing and class names, as JSON in the file's own metadata.

An exported graph takes preprocessed images; whoever runs the file learns here how to preprocess them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from .._errors import RequestError, first_line
from .._files import UnreadableFileError, check_plain, read_text, text_lines
from .._timm import pretrained_cfg
from .errors import ExportError
from .inputs import data_config

KEY = "foveate"  # of the entry in a file's metadata
_LARGEST = 2**24  # characters of an entry
_LABEL_LENGTH = 500  # characters


@dataclass(frozen=True)
class Metadata:
    """Preprocessing of a classifier's input, and its class names."""

    architecture: str
    input_size: tuple[int, int, int]  # (C, H, W), px
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    labels: tuple[str, ...] | None = None  # class names, in the order of the logits
    batch: int | None = None  # images of one call; None: any number

    @property
    def transform_args(self) -> dict[str, Any]:
        """Arguments of timm.data.create_transform."""
        names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {name: getattr(self, name) for name in names}

    def dumps(self) -> str:
        """Return the text that a file holds: JSON."""
        return json.dumps(asdict(self))


def metadata_of(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    *,
    batch: int | None = None,
    labels: tuple[str, ...] | None = None,
) -> Metadata | None:
    """Return the metadata of a model; None if timm did not create it: its preprocessing is unknown.

    Args:
        model: its pretrained_cfg has the preprocessing, and class names where they are known.
        img_size: height and width of the exported graph, px; None: the model's own size.
        batch: batch size of the exported graph; None: any.
        labels: class names, in the order of the logits; None: those of the pretrained_cfg, or of ImageNet where the
            number of classes is that of an ImageNet subset.

    Raises:
        ExportError: there are more or fewer labels than classes, or the model has another fixed input size.
    """
    if not hasattr(model, "pretrained_cfg"):
        return None
    check_labels(model, labels)
    config = data_config(model, img_size)
    cfg = pretrained_cfg(model)
    return Metadata(
        architecture=str(cfg.get("architecture") or type(model).__name__),
        input_size=tuple(config["input_size"]),
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config["crop_mode"]),
        labels=labels or class_names(model),
        batch=batch,
    )


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """Return the class names of a timm model, in the order of its logits; None where they are not known.

    A model without a classifier has none: ().
    """
    classes: Any = getattr(model, "num_classes", None)
    if not classes:
        return () if classes == 0 else None
    names = pretrained_cfg(model).get("label_names")
    if isinstance(names, list | tuple) and len(names) == classes:
        return tuple(map(str, names))
    if (subset := infer_imagenet_subset(model)) is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(classes))


def check_labels(model: nn.Module, labels: tuple[str, ...] | None) -> None:
    """Refuse class names of which there are more or fewer than the model has classes.

    Raises:
        ExportError: their number is another one.
    """
    classes = getattr(model, "num_classes", None) or 0
    if labels is not None and len(labels) != classes:
        raise ExportError(f"{len(labels)} class names are given, the model has {classes} classes")


def read_labels(path: Path) -> tuple[str, ...]:
    """Read class names: one a line, in the order of the logits.

    Raises:
        ExportError: no regular file, not UTF-8, empty, or a line longer than 500 characters.
    """
    try:
        lines = [line.strip() for line in text_lines(read_text(path, _LARGEST))]
    except UnreadableFileError as error:
        raise ExportError(f"labels {path} {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines or max(map(len, lines)) > _LABEL_LENGTH:
        raise ExportError(f"labels {path}: wanted one class name of up to {_LABEL_LENGTH} characters a line")
    return tuple(lines)


def loads(text: str) -> Metadata:
    """Read what `Metadata.dumps` wrote.

    Raises:
        ExportError: it is damaged, or written by something else.
    """
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"it has {len(text)} characters")
        data = json.loads(text)
        check_plain(data)
        return _checked(data)
    except (ValueError, TypeError, KeyError, RecursionError, RequestError) as error:
        raise ExportError(f"the file's metadata is damaged: {first_line(error)}") from error


def _checked(data: Any) -> Metadata:
    if not isinstance(data, dict):
        raise ValueError(f"wanted a section of keys, got {type(data).__name__}")
    texts = {name: data[name] for name in ("architecture", "interpolation", "crop_mode")}
    sizes, mean, std = (tuple(data[name]) for name in ("input_size", "mean", "std"))
    labels, batch = data.get("labels"), data.get("batch")
    whole = (*sizes, *(() if batch is None else (batch,)))
    if len(sizes) != 3 or not all(type(n) is int and 0 < n <= 2**16 for n in whole):
        raise ValueError(f"input_size {sizes} and batch {batch} are not image sizes")
    if not all(isinstance(value, str) for value in (*texts.values(), *(labels or ()))):
        raise ValueError("names must be texts")
    if not len(mean) == len(std) == sizes[0]:
        raise ValueError(f"mean {mean} and std {std} do not have {sizes[0]} channels")
    return Metadata(
        **texts,
        input_size=sizes,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        crop_pct=float(data["crop_pct"]),
        labels=None if labels is None else tuple(labels),
        batch=batch,
    )
