"""`foveate validate MODEL|CHECKPOINT|FOLDER --data DIR`: accuracy of any timm model on labeled images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .._errors import RequestError
from ..fusion import keep_memory
from ..train.launch import is_first
from ..train.recipe import Precision
from ..train.validate import Validation, ValidationRequest, validate, write_classes
from ._models import has_weights, open_model
from ._options import (
    MAX_BATCH,
    Checkpoint,
    ImgSize,
    ModelArgs,
    OptionalModel,
    Pretrained,
    name_weights,
    parse_model_args,
)
from ._terminal import FAILED, print_facts
from .train import Device, StartedBy

NO_WEIGHTS = "wanted weights: give --checkpoint or --pretrained, a checkpoint of foveate train, or a hub folder"
_NAMED = 5  # unreadable images that are named


def validate_command(
    model: OptionalModel = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Class folders, a folder with a validation split, a tar, or a list (.csv, .txt)."),
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter, merged into the weights.")] = None,
    source: Annotated[
        str, typer.Option(help="As data.source of a recipe: folder, list, mnist5k, torch/, hfds/.")
    ] = "folder",
    split: Annotated[
        str | None, typer.Option(help="Name of the split.", show_default="validation, val, ... or DATA itself")
    ] = None,
    class_map: Annotated[Path | None, typer.Option(help="Names of the model's classes, one a line.")] = None,
    real_labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="ImageNet's reassessed labels: a JSON file, or 'imagenet'.")
    ] = None,
    per_class: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV file with the accuracy of each class.")
    ] = None,
    img_size: ImgSize = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(min=0.1, max=1, help="Share of the side that the crop keeps.", show_default="the model's own"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images of a batch, per process.")] = 64,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Loader processes per process.")] = 4,
    precision: Annotated[Precision, typer.Option(help="Of the model's forward pass.")] = "fp32",
    launcher: StartedBy = "auto",
    device: Device = None,
    model_arg: ModelArgs = None,
) -> None:
    """Measure top-1, top-5 and loss of a model, a checkpoint of foveate train or a hub folder."""
    _check(data, source, has_weights(model, checkpoint, pretrained), per_class)
    arguments = parse_model_args(model_arg)
    keep_memory()
    loaded = open_model(model, checkpoint, pretrained, adapter=adapter, img_size=img_size, arguments=arguments)
    request = ValidationRequest(
        data=data,
        source=source,
        split=split,
        class_map=class_map,
        real_labels=real_labels,
        img_size=img_size,
        crop_pct=crop_pct,
        batch_size=batch,
        workers=workers,
        precision=precision,
    )
    result = validate(loaded, request, launcher=launcher, device=device)
    if not is_first(launcher):
        return
    if per_class is not None:
        write_classes(result, per_class)
    facts = {"weights": name_weights(model, checkpoint, pretrained), "data": str(data or source)}
    print_facts(f"foveate validate: {type(loaded).__name__}", facts | _facts(result))
    if result.unreadable:
        typer.echo(f"foveate validate: {describe_lost(result.unreadable, result.images)}", err=True)
        raise typer.Exit(FAILED)


def _check(data: Path | None, source: str, weights: bool, per_class: Path | None) -> None:
    """Refuse what cannot work before anything is loaded."""
    if data is None and source != "mnist5k":
        raise RequestError("--data: wanted the folder of the images")
    if not weights:
        raise RequestError(NO_WEIGHTS)
    if per_class is not None and not per_class.absolute().parent.is_dir():
        raise RequestError(f"--per-class {per_class}: the folder {per_class.parent} does not exist")


def _facts(result: Validation) -> dict[str, str]:
    facts = {
        "images": f"{result.images:,} in {len(result.classes)} classes",
        "input": " x ".join(map(str, result.input_size)),
        "top-1": f"{result.top1:.3f} %",
        "top-5": f"{result.top5:.3f} %",
        "loss": f"{result.loss:.4f}",
    }
    if result.real_top1 is not None:
        facts["real labels"] = (
            f"top-1 {result.real_top1:.3f} %, top-5 {result.real_top5:.3f} % of {result.real_images:,} images"
        )
    if result.not_finite:
        facts["not finite"] = f"logits of {result.not_finite:,} images, counted as wrong"
    if result.unreadable:
        facts["unreadable"] = f"{len(result.unreadable):,} images, not counted"
    return facts | {"time": f"{result.seconds:.1f} s, {result.images / result.seconds:,.1f} images/s"}


def describe_lost(lost: Sequence[str], read: int) -> str:
    """Say how many images could not be read, and name the first few."""
    named = ", ".join(lost[:_NAMED]) + (", ..." if len(lost) > _NAMED else "")
    return f"{len(lost)} of {len(lost) + read} images could not be read and are not counted: {named}"
