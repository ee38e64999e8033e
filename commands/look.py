"""`foveate look IMAGE --model NAME -o OUT`: what a query position sees in every layer, as a picture or a page."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.data import create_transform
from timm.models import get_model_traits
from torch import Tensor, nn

from .._errors import RequestError, did_you_mean, first_line
from .._files import why_not_writable
from .._memory import check_images_fit
from ..analysis import (
    AttentionView,
    GateView,
    attention_rollout,
    draw_profiles,
    draw_views,
    grad_cam,
    head_effects,
    head_profiles,
    layer_views,
    write_figure,
    write_page,
)
from ..analysis.cam import check_grad_cam
from ..analysis.drawing import check_head, check_matplotlib, check_query, picture_of
from ..export.inputs import decode_image, image_files, image_mode
from ..export.metadata import Metadata, metadata_of
from ._models import open_model
from ._options import Checkpoint, ImgSize, ModelArgs, Pretrained, name_weights, parse_model_args
from ._terminal import print_facts

PAGE, PICTURE = ".html", ".png"
MOST_IMAGES = 16  # of a folder, for --profiles
WHOLE_MULTIPLE = 32  # px, of the sides of a whole image; a larger reduction of the model takes its place


def look_command(
    image: Annotated[Path, typer.Argument(help="Image file; with --profiles also a folder of images.")],
    model: Annotated[
        str | None,
        typer.Option(help="timm model name, hub folder, hf-hub:ORG/REPO, or a checkpoint of foveate train."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write: .png or .html.", show_default="none; the layers are listed"
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    layer: Annotated[
        str | None, typer.Option(metavar="N|NAME", help="Number in the list of layers, or module.", show_default="all")
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(min=0, help="Head to draw, or that the page begins with.", show_default="all, or their mean"),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Pixel of the image that the model sees.", show_default="the center"),
    ] = None,
    rollout: Annotated[bool, typer.Option("--rollout", help="Add attention rollout.")] = False,
    cam: Annotated[bool, typer.Option("--grad-cam", help="Add Grad-CAM.")] = False,
    target: Annotated[
        int | None, typer.Option(min=0, help="Class of --grad-cam.", show_default="the most probable")
    ] = None,
    profiles: Annotated[
        bool, typer.Option("--profiles", help="Plot distance, entropy and importance of all heads instead.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="Show the model the whole image in its proportions, not a square crop.")
    ] = False,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
) -> None:
    """Draw what a query sees in every layer of a model: a PNG, or an HTML page whose query follows the pointer."""
    at = _parse_query(query)
    options: dict[str, object] = {
        "--layer": layer,
        "--head": head,
        "--query": query,
        "--rollout": rollout,
        "--grad-cam": cam,
    }
    _check(output, profiles, cam, target, options)
    if output is not None and output.exists() and image.exists() and output.samefile(image):
        raise RequestError(f"-o {output}: is the image, which would be lost")
    images = _images(image, profiles, whole)
    loaded, metadata = _open(model, checkpoint, pretrained, img_size, images[0] if whole else None, model_arg)
    check_query(at, metadata.input_size[1:])
    inputs = _inputs(images, metadata)
    facts = {"weights": name_weights(model, checkpoint, pretrained), "image": _size(metadata)}
    if profiles and output is not None:
        _write_profiles(loaded, inputs, output)
    else:
        views = _views(loaded, inputs, layer, rollout, cam)
        if views:
            check_head(views, head)
        if cam:
            views.append(grad_cam(loaded, inputs, target))
        if output is None:
            _list(views)
            return
        picture = picture_of(inputs[0], metadata.mean, metadata.std)
        facts |= _write(views, picture, output, at, head, f"{metadata.architecture}: {image.name}")
    print_facts(f"foveate look: {type(loaded).__name__}", facts | {"written": str(output)})


def _parse_query(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--query: wanted two numbers x,y, got {text!r}") from None
    return x, y


def _check(output: Path | None, profiles: bool, cam: bool, target: int | None, options: Mapping[str, object]) -> None:
    """Refuse what cannot work before anything is loaded."""
    if target is not None and not cam:
        raise RequestError("--target: is the class of --grad-cam, which is not asked for")
    if profiles:
        given = [name for name, value in options.items() if value is not None and value is not False]
        if given:
            raise RequestError(f"{given[0]}: --profiles plots all heads of all layers")
        if output is None or output.suffix != PICTURE:
            raise RequestError(f"--profiles: wanted -o FILE{PICTURE}, got {output}")
    if cam:
        check_grad_cam()
    if output is None:
        return
    if output.suffix not in (PAGE, PICTURE):
        raise RequestError(f"-o: wanted a file ending in {PICTURE} or {PAGE}, got {output}")
    if output.is_dir() or not output.absolute().parent.is_dir():
        why = "is a folder" if output.is_dir() else f"the folder {output.parent} does not exist"
        raise RequestError(f"-o {output}: {why}")
    if (reason := why_not_writable(output.absolute().parent)) is not None:
        raise RequestError(f"-o {output}: {reason}")
    if output.suffix == PICTURE:
        check_matplotlib()


def _images(path: Path, profiles: bool, whole: bool) -> list[Image.Image]:
    """Decode the image, or the first images of a folder, in color."""
    if path.is_dir() and profiles and not whole:
        return [decode_image(file, 3) for file in image_files(path)[:MOST_IMAGES]]
    return [decode_image(path, 3)]


def _open(
    name: str | None, checkpoint: Path | None, pretrained: bool, img_size: int | tuple[int, int] | None,
    whole: Image.Image | None, model_arg: list[str] | None,
) -> tuple[nn.Module, Metadata]:  # fmt: skip
    """Open the model, for the size of a whole image where one is given, and say how its images are preprocessed."""
    arguments = parse_model_args(model_arg)
    loaded = open_model(name, checkpoint, pretrained, img_size=img_size, arguments=arguments)
    metadata = _metadata(loaded, img_size)
    if whole is not None:
        size = _whole_size(loaded, metadata, whole)
        if get_model_traits(loaded).get("fixed_input_size"):
            loaded = open_model(name, checkpoint, pretrained, img_size=size, arguments=arguments)
        squashed = {"crop_pct": 1.0, "crop_mode": "squash", "input_size": (metadata.input_size[0], *size)}
        metadata = replace(metadata, **squashed)  # type: ignore[arg-type]
    try:
        check_images_fit(1, *metadata.input_size)
    except ValueError as error:
        raise RequestError(first_line(error)) from error
    return loaded, metadata


def _metadata(loaded: nn.Module, img_size: int | tuple[int, int] | None) -> Metadata:
    metadata = metadata_of(loaded, img_size)
    if metadata is None:
        raise RequestError(f"{type(loaded).__name__} was not made by timm: its preprocessing is not known")
    return metadata


def _whole_size(loaded: nn.Module, metadata: Metadata, image: Image.Image) -> tuple[int, int]:
    """(height, width) px: the short side as the model's, the long one in proportion, both whole tokens of all maps."""
    infos = getattr(loaded, "feature_info", None) or ()
    steps = [info["reduction"] for info in infos if isinstance(info, dict) and isinstance(info.get("reduction"), int)]
    multiple = max([WHOLE_MULTIPLE, *steps])
    short = min(metadata.input_size[1:]) / min(image.size)
    width, height = (max(multiple, round(side * short / multiple) * multiple) for side in image.size)
    return height, width


def _inputs(images: list[Image.Image], metadata: Metadata) -> Tensor:
    """(B, C, H, W), preprocessed."""
    transform = create_transform(**metadata.transform_args)
    mode = image_mode(metadata.input_size[0])
    return torch.stack([transform(image.convert(mode)) for image in images])


def _views(
    loaded: nn.Module, inputs: Tensor, layer: str | None, rollout: bool, cam: bool
) -> list[AttentionView | GateView]:
    try:
        every = layer_views(loaded, inputs)
    except RequestError:
        if layer is not None or rollout or not cam:
            raise
        return []  # Grad-CAM needs no attention
    chosen = _chosen(every, layer)
    return [*chosen, attention_rollout(every)] if rollout else chosen


def _chosen(views: list[AttentionView | GateView], layer: str | None) -> list[AttentionView | GateView]:
    if layer is None:
        return views
    if layer.isdecimal():
        if int(layer) >= len(views):
            raise RequestError(f"--layer {layer}: the list has layers 0 to {len(views) - 1}; without -o it is printed")
        return [views[int(layer)]]
    if not (found := [view for view in views if view.layer == layer]):
        raise RequestError(f"--layer {layer}: no such layer{did_you_mean(layer, {view.layer for view in views})}")
    return found


def _list(views: list[AttentionView | GateView]) -> None:
    table = Table()
    for column in ("layer", "module", "branch", "operation", "map", "heads"):
        table.add_column(column, justify="right" if column in ("layer", "heads") else "left")
    for i, view in enumerate(views):
        if isinstance(view, AttentionView):
            size = f"{view.queries.size[0]} x {view.queries.size[1]}" if view.queries.is_placed else "-"
        else:
            size = f"{view.values.shape[1]} x {view.values.shape[2]}"
        table.add_row(str(i), Text(view.layer), Text(view.branch), view.op, size, str(view.heads))
    Console().print(table)


def _write(
    views: list[AttentionView | GateView], picture: Tensor, output: Path, at: tuple[float, float] | None,
    head: int | None, title: str,
) -> dict[str, str]:  # fmt: skip
    facts = {"views": str(len(views))}
    if output.suffix == PICTURE:
        write_figure(draw_views(picture, views, at, head), output)
        return facts
    left_out = write_page(picture, views, output, query=at, head=head, title=title)
    return facts | {
        "size": f"{output.stat().st_size / 1e6:.1f} MB",
        "left out": f"queries of {len(left_out)} layers; the page says which" if left_out else "nothing",
    }


def _write_profiles(loaded: nn.Module, inputs: Tensor, output: Path) -> None:
    """Plot profiles and importance; the predicted classes stand for the true ones, which importance does not read."""
    try:
        profiles = head_profiles(loaded, inputs, most_queries=1024)
        with torch.no_grad():
            classes = loaded(inputs).argmax(1)
        effects = head_effects(loaded, [(inputs, classes)])
    except ValueError as error:  # no layer attends
        raise RequestError(f"--profiles: {first_line(error)}") from error
    write_figure(draw_profiles(profiles, effects), output)


def _size(metadata: Metadata) -> str:
    return f"{metadata.input_size[1]} x {metadata.input_size[2]} px (rows x columns), as the model sees it"
