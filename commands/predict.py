"""`foveate predict MODEL|FILE IMAGES...`: classes and probabilities of images, one JSON object a line."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from .._errors import RequestError, first_line
from .._files import text_lines
from .._memory import check_images_fit
from ..export import load_model
from ..export.inputs import decode_image, image_files
from ..export.metadata import Metadata, metadata_of, read_labels
from ..export.runtimes import OpenFile, is_exported_file, open_file, run_model
from ..fusion import fuse, keep_memory
from ._models import has_weights, open_model
from ._options import MAX_BATCH, Checkpoint, ImgSize, ModelArgs, Pretrained, name_weights, parse_model_args
from ._terminal import FAILED

STDIN = "-"
_LONGEST_LIST = 2**26  # bytes of names on stdin


def predict_command(
    model: Annotated[
        str,
        typer.Argument(
            help="timm model name, hub folder, checkpoint of foveate train, or file of foveate export: .onnx, .pt2, "
            ".xml, .pte."
        ),
    ],
    images: Annotated[list[str], typer.Argument(help="Image files, folders, or - for an image or names on stdin.")],
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    fused: Annotated[bool, typer.Option("--fuse", help="Run a named model through foveate.fuse.")] = False,
    like: Annotated[
        str | None, typer.Option(help="Model whose preprocessing a file without metadata has.", metavar="MODEL")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names, one a line, in the order of the logits.")] = None,
    topk: Annotated[int, typer.Option(min=1, max=1000, help="Classes of an image.")] = 5,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images of a batch.")] = 8,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
) -> None:
    """Print the most likely classes of images as JSON lines; probabilities are the softmax of the logits."""
    names = None if labels is None else read_labels(labels)
    pictures = list(_pictures(images))  # an empty folder is refused before the work
    keep_memory()
    opened = _open(model, checkpoint, pretrained, fused, like, img_size, parse_model_args(model_arg))
    metadata = opened.metadata
    assert metadata is not None
    metadata = metadata if names is None else replace(metadata, labels=names)
    if metadata.labels == ():
        raise RequestError(f"{model} has no classifier; wanted a model with classes")
    size = metadata.batch or batch
    _check_fits(size, metadata)
    failed = 0
    for group in _batches(pictures, metadata, size):
        failed += _answer(group, opened, metadata, topk)
    if failed:
        typer.echo(f"foveate predict: {failed} of the images have no answer", err=True)
        raise typer.Exit(FAILED)


def _open(
    name: str, checkpoint: Path | None, pretrained: bool, fused: bool, like: str | None,
    img_size: int | tuple[int, int] | None, kwargs: dict[str, Any],
) -> OpenFile:  # fmt: skip
    if not is_exported_file(name):
        if like is not None:
            raise RequestError(f"--like: {name} is a model and has its own preprocessing")
        return _open_model(name, checkpoint, pretrained, fused, img_size, kwargs)
    given = {"--checkpoint": checkpoint, "--pretrained": pretrained, "--fuse": fused, "--model-arg": kwargs}
    if wrong := [option for option, value in given.items() if value]:
        raise RequestError(f"{wrong[0]}: {name} is a file and holds its weights; give it with a model's name")
    opened = open_file(name)
    metadata = opened.metadata
    if like is not None and (of_model := metadata_of(load_model(like), img_size)) is not None:
        metadata = replace(of_model, labels=None if metadata is None else metadata.labels)
    if metadata is None:
        raise RequestError(f"{name} does not say how images are preprocessed: name its model with --like")
    if img_size is not None and like is None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        metadata = replace(metadata, input_size=(metadata.input_size[0], height, width))
    return replace(opened, metadata=metadata)


def _open_model(
    name: str,
    checkpoint: Path | None,
    pretrained: bool,
    fused: bool,
    img_size: int | tuple[int, int] | None,
    kwargs: dict[str, Any],
) -> OpenFile:
    if not has_weights(name, checkpoint, pretrained):
        typer.echo(f"foveate predict: weights: {name_weights(name, checkpoint, pretrained)}", err=True)
    loaded = open_model(name, checkpoint, pretrained, img_size=img_size, arguments=kwargs)
    metadata = metadata_of(loaded, img_size)
    return OpenFile("fused" if fused else "PyTorch", run_model(fuse(loaded) if fused else loaded), metadata)


def _check_fits(batch: int, metadata: Metadata) -> None:
    try:
        check_images_fit(batch, *metadata.input_size)
    except ValueError as error:
        raise RequestError(f"--batch: {first_line(error)}") from error


def _pictures(names: list[str]) -> Iterator[tuple[str, Path | bytes]]:
    """Yield a name and where its image is, for all arguments in order; a folder's images sorted by name."""
    for name in names:
        if name == STDIN:
            yield from _from_stdin()
        elif os.path.isdir(name):  # unlike Path.is_dir, False for any name
            yield from ((str(path), path) for path in image_files(Path(name)))
        else:
            yield name, Path(name)


def _from_stdin() -> Iterator[tuple[str, Path | bytes]]:
    """Read one image, or the names of images, one a line."""
    data = sys.stdin.buffer.read(_LONGEST_LIST + 1)
    if len(data) > _LONGEST_LIST:
        raise RequestError(f"stdin: wanted at most {_LONGEST_LIST} bytes")
    if not data.strip():
        raise RequestError("stdin is empty; wanted an image, or names of images, one a line")
    with suppress(Exception), Image.open(BytesIO(data)):  # Pillow knows the format
        yield STDIN, data
        return
    try:
        lines = text_lines(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError("stdin is neither an image that Pillow reads nor UTF-8 text") from error
    yield from ((line, Path(line)) for line in lines if line.strip())


def _batches(
    pictures: Iterable[tuple[str, Path | bytes]], metadata: Metadata, size: int
) -> Iterator[list[tuple[str, Tensor | str]]]:
    """Yield groups of up to `size` names, each with a preprocessed image or the reason why there is none."""
    transform = create_transform(**metadata.transform_args)
    group: list[tuple[str, Tensor | str]] = []
    for name, picture in pictures:
        try:
            image = decode_image(picture, metadata.input_size[0])
            group.append((name, transform(image)))
        except RequestError as error:
            group.append((name, str(error)))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _answer(group: list[tuple[str, Tensor | str]], opened: OpenFile, metadata: Metadata, topk: int) -> int:
    """Print a line per image; return how many have no classes."""
    readable = [image for _, image in group if isinstance(image, Tensor)]
    rows = iter(_probabilities(readable, opened, metadata) if readable else ())
    found = [(name, image if isinstance(image, str) else next(rows)) for name, image in group]
    lines = [_line(name, row, metadata.labels, topk) for name, row in found]
    sys.stdout.writelines(_as_json(line, sys.stdout.encoding or "utf-8") + "\n" for line in lines)
    sys.stdout.flush()
    return sum("error" in line for line in lines)


def _line(name: str, found: Tensor | str, labels: tuple[str, ...] | None, topk: int) -> dict[str, Any]:
    """Return what is said of an image: its classes, from probabilities, or why there are none."""
    if isinstance(found, str):
        return {"image": name, "error": found}
    if not found.isfinite().all():
        return {"image": name, "error": "the model's logits are not finite"}
    return {"image": name, "classes": _best(found, labels, topk)}


def _as_json(line: dict[str, Any], encoding: str) -> str:
    """Return one line of JSON; it is escaped where the output cannot hold it, such as a name that is no Unicode."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(line)
    return text


def _probabilities(images: list[Tensor], opened: OpenFile, metadata: Metadata) -> Tensor:
    batch = torch.stack(images)
    missing = 0 if metadata.batch is None else metadata.batch - len(batch)
    padded = torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
    try:
        outputs = opened.run(padded)
    except Exception as error:  # runtimes raise many types
        raise RequestError(
            f"{opened.runtime} fails on a batch of {tuple(padded.shape)}: {first_line(error)}"
        ) from error
    if len(outputs) != 1 or outputs[0].ndim != 2:
        raise RequestError(f"wanted logits (B, classes), the model returns {[tuple(out.shape) for out in outputs]}")
    if metadata.labels is not None and len(metadata.labels) != outputs[0].shape[1]:
        raise RequestError(f"{len(metadata.labels)} class names are given, the model has {outputs[0].shape[1]} classes")
    return outputs[0][: len(batch)].float().softmax(-1)


def _best(row: Tensor, labels: tuple[str, ...] | None, topk: int) -> list[dict[str, Any]]:
    values, indices = row.topk(min(topk, len(row)))
    best = zip(indices.tolist(), values.tolist(), strict=True)
    named = ({"index": i, "name": None if labels is None else labels[i], "probability": p} for i, p in best)
    return [{key: value for key, value in entry.items() if value is not None} for entry in named]
