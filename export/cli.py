"""`foveate export MODEL -o FILE`: load, write, verify on real images, and only then put the result in its place."""

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.models import get_model_traits
from torch import nn

from .._commands import MAX_PX, stop
from .._files import atomic_path
from .._options import OptionError, parse_model_args
from .agreement import BATCH_SIZES, TOLERANCE, Agreement, verify
from .errors import DisagreementError, ExportError
from .files import check_empty_folder, check_target
from .graphs import ONNX_SUFFIX, PROGRAM_SUFFIX, export_onnx, export_program
from .hub import save_hub
from .inputs import real_images
from .load import load_model

DISAGREES = 1  # exit code


class Format(str, Enum):
    """What the file is for."""

    ONNX = "onnx"
    TORCH = "torch"
    HUB = "hub"


def export_command(
    model: Annotated[str, typer.Argument(help="timm model name, local-dir:FOLDER or hf-hub:ORG/REPO.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.onnx, .pt2), or folder for hub.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights, .pth or .safetensors.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Weights that timm knows for the name.")] = False,
    file_format: Annotated[
        Format, typer.Option("--format", help="ONNX, torch.export program, or timm hub folder.")
    ] = Format.ONNX,
    img_size: Annotated[
        int | None, typer.Option(min=1, max=MAX_PX, help="Height and width, px; default the model's own.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to verify on; default digits.")] = None,
    tolerance: Annotated[float, typer.Option(help="Allowed difference, in std of the output.")] = TOLERANCE,
    model_arg: Annotated[list[str] | None, typer.Option(help="Model argument key=value; may be repeated.")] = None,
) -> None:
    """Export a model and verify it against PyTorch on real images."""
    try:
        kwargs = parse_model_args(model_arg)
        _check_tolerance(tolerance)
        _check_output(output, file_format)
        net = _load(model, checkpoint, pretrained, img_size, kwargs)
        pictures = real_images(net, images, count=sum(BATCH_SIZES), img_size=img_size)
        with atomic_path(output) as part:
            _writer(file_format, img_size)(net, part)
            agreement = verify(net, part, pictures, tolerance=tolerance)
        weights = _weights(model, checkpoint, pretrained)
        Console().print(_report(output, net, weights, tuple(pictures.shape[1:]), agreement))
    except DisagreementError as error:
        stop("export", error, DISAGREES)
    except (ExportError, OptionError, OSError) as error:  # OSError: no permission, no space
        stop("export", error)


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:
        raise ExportError(f"--tolerance: wanted a number >= 0, got {tolerance}")


def _check_output(output: Path, file_format: Format) -> None:
    if file_format is Format.HUB:
        check_empty_folder(output)
    else:
        check_target(output, {Format.ONNX: ONNX_SUFFIX, Format.TORCH: PROGRAM_SUFFIX}[file_format])


def _load(name: str, checkpoint: Path | None, pretrained: bool, img_size: int | None, kwargs: dict) -> nn.Module:
    net = load_model(name, checkpoint, pretrained=pretrained, **kwargs)
    if img_size is None or not get_model_traits(net).get("fixed_input_size"):
        return net
    return load_model(name, checkpoint, pretrained=pretrained, **kwargs | {"img_size": img_size})


def _writer(file_format: Format, img_size: int | None) -> Callable[[nn.Module, Path], Path]:
    export = {Format.ONNX: export_onnx, Format.TORCH: export_program, Format.HUB: save_hub}[file_format]
    return lambda net, out: export(net, out, img_size=img_size)


def _weights(name: str, checkpoint: Path | None, pretrained: bool) -> str:
    if checkpoint is not None:
        return str(checkpoint)
    if ":" in name:
        return name
    return "published" if pretrained else "random: neither --checkpoint nor --pretrained given"


def _report(output: Path, net: nn.Module, weights: str, shape: tuple[int, ...], agreement: Agreement) -> Table:
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    rows = {
        "written": str(output),
        "size": f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB",
        "parameters": f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M",
        "weights": weights,
        "input": " x ".join(map(str, ("batch", *shape))),
        "compared": f"{agreement.images} images in batches of {' and '.join(map(str, agreement.batch_sizes))}",
        "largest difference": f"{agreement.largest_absolute:.2g}",
        "in std of the output": f"{agreement.largest_relative:.2g} (allowed {agreement.tolerance:.2g})",
        "same top-1": "-" if agreement.top1 is None else f"{agreement.top1:.0%}",
    }
    table = Table(show_header=False, title=f"foveate export: {type(net).__name__}")
    for row in rows.items():
        table.add_row(*map(Text, row))  # Text: a path may hold brackets
    return table
