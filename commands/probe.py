"""`foveate probe MODEL --data DIR`: accuracy of a frozen backbone by nearest neighbors or a linear classifier."""

from pathlib import Path
from typing import Annotated

import typer

from .._errors import RequestError
from ..fusion import keep_memory
from ..train.probe import Method, ProbeRequest, probe
from ..train.recipe import Precision
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
from .train import Device
from .validate import NO_WEIGHTS, describe_lost


def probe_command(
    model: OptionalModel = None,
    data: Annotated[Path | None, typer.Option(help="Folder with a training and a validation split.")] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    source: Annotated[
        str, typer.Option(help="As data.source of a recipe: folder, list, mnist5k, torch/NAME, hfds/NAME.")
    ] = "folder",
    method: Annotated[Method, typer.Option(help="knn (nearest neighbors) or linear (logistic regression).")] = "knn",
    neighbors: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Neighbors of --method knn.", show_default="20")
    ] = None,
    regularization: Annotated[
        float | None, typer.Option(min=1e-9, help="Inverse regularization of --method linear.", show_default="1.0")
    ] = None,
    img_size: ImgSize = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images of a batch.")] = 64,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Loader processes.")] = 4,
    precision: Annotated[Precision, typer.Option(help="Of the model's forward pass.")] = "fp32",
    device: Device = None,
    model_arg: ModelArgs = None,
) -> None:
    """Measure the features of a frozen model: fit the training split, count the validation split."""
    if data is None and source != "mnist5k":
        raise RequestError("--data: wanted the folder of the images")
    if neighbors is not None and method != "knn":
        raise RequestError("--neighbors: has no effect without --method knn")
    if regularization is not None and method != "linear":
        raise RequestError("--regularization: has no effect without --method linear")
    if not has_weights(model, checkpoint, pretrained):
        raise RequestError(NO_WEIGHTS)
    arguments = parse_model_args(model_arg)
    keep_memory()
    loaded = open_model(model, checkpoint, pretrained, img_size=img_size, arguments=arguments)
    request = ProbeRequest(
        data=data,
        source=source,
        method=method,
        neighbors=neighbors or 20,
        regularization=regularization or 1.0,
        img_size=img_size,
        batch_size=batch,
        workers=workers,
        precision=precision,
    )
    result = probe(loaded, request, device=device)
    facts = {
        "weights": name_weights(model, checkpoint, pretrained),
        "data": str(data or source),
        "method": f"{request.neighbors} nearest neighbors" if method == "knn" else "linear classifier",
        "features": f"{result.features} of {result.train_images:,} training images",
        "top-1": f"{result.top1:.3f} % of {result.images:,} images",
        "time": f"{result.seconds:.1f} s",
    }
    print_facts(f"foveate probe: {type(loaded).__name__}", facts)
    if result.unreadable:
        typer.echo(f"foveate probe: {describe_lost(result.unreadable, result.train_images + result.images)}", err=True)
        raise typer.Exit(FAILED)
