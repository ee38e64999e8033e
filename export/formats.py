"""The formats of `foveate export`, and the writing of a file that is verified before it is put in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .agreement import BATCH_SIZES, Agreement, verify
from .converters import (
    COREML_SUFFIX,
    EXECUTORCH_SUFFIX,
    export_aoti,
    export_coreml,
    export_executorch,
    export_openvino,
)
from .files import atomic_files, check_empty_folder, check_target, require_packages
from .graphs import ONNX_SUFFIX, PROGRAM_SUFFIX, export_onnx, export_program
from .hub import save_hub
from .ir import IR_SUFFIX
from .metadata import check_labels


class Format(str, Enum):
    """What a file is for."""

    ONNX = "onnx"
    TORCH = "torch"
    AOTI = "aoti"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    COREML = "coreml"
    HUB = "hub"


@dataclass(frozen=True)
class FileFormat:
    """How a format is written, and what that needs."""

    suffix: str | None  # None: a folder
    write: Callable[..., Path]
    extra: str = "export"
    packages: tuple[str, ...] = ()
    runs_here: bool = True
    int8: bool = False  # it can hold int8 weights
    any_size: bool = True  # one file can take every image size


_ONNX = ("onnx", "onnxscript")
FORMATS: dict[Format, FileFormat] = {
    Format.ONNX: FileFormat(ONNX_SUFFIX, export_onnx, packages=(*_ONNX, "onnxruntime"), int8=True),
    Format.TORCH: FileFormat(PROGRAM_SUFFIX, export_program),
    Format.AOTI: FileFormat(PROGRAM_SUFFIX, export_aoti, int8=True),
    Format.OPENVINO: FileFormat(IR_SUFFIX, export_openvino, "openvino", (*_ONNX, "openvino"), int8=True),
    Format.EXECUTORCH: FileFormat(EXECUTORCH_SUFFIX, export_executorch, "executorch", ("executorch",), any_size=False),
    Format.COREML: FileFormat(
        COREML_SUFFIX, export_coreml, "coreml", ("coremltools",), runs_here=False, any_size=False
    ),
    Format.HUB: FileFormat(None, save_hub),
}


@dataclass(frozen=True)
class Request:
    """One file to write."""

    model: nn.Module
    out: Path
    format: Format
    img_size: int | tuple[int, int] | None = None  # px; None: the model's own size
    labels: tuple[str, ...] | None = None  # class names, in the order of the logits
    dynamic: tuple[str, ...] = ("batch",)  # what the file leaves free: "batch", "size"

    def __post_init__(self) -> None:
        check_labels(self.model, self.labels)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batches on which the file is compared: one at a time where its batch is 1."""
        return BATCH_SIZES if "batch" in self.dynamic else (1,) * sum(BATCH_SIZES)


def check_output(out: Path, file_format: Format) -> None:
    """Refuse a path that cannot be written, or a format whose packages are missing.

    Raises:
        ExportError: the path has another suffix, is a folder, or its folder does not exist.
        MissingExtraError: a package is not installed.
    """
    entry = FORMATS[file_format]
    if entry.suffix is None or file_format is Format.COREML:
        check_empty_folder(out)
    if entry.suffix is not None:
        check_target(out, entry.suffix)
    require_packages(entry.extra, *entry.packages)


def write_verified(request: Request, images: Tensor, tolerance: float) -> Agreement | None:
    """Write a file, compare it with the model on images, and put it in its place.

    Returns:
        How closely the file follows the model; None if no runtime for the format exists on this system.

    Raises:
        DisagreementError: the file's outputs differ; nothing is written.
    """
    entry = FORMATS[request.format]
    with atomic_files(request.out) as part:
        write(request, part)
        return _verify(request, part, images, tolerance) if entry.runs_here else None


def _verify(request: Request, part: Path, images: Tensor, tolerance: float) -> Agreement:
    """Compare the file with the model; a file of any size at a rectangular one too, which no stride divides."""
    compare = partial(verify, request.model, part, tolerance=tolerance, batch_sizes=request.batch_sizes)
    agreement = compare(images)
    if "size" in request.dynamic:
        other = (images.shape[2] + 13, images.shape[3] + 5)
        compare(F.interpolate(images, other, mode="bilinear", align_corners=False))
    return agreement


def write(request: Request, part: Path) -> None:
    """Write a file at `part` in place of the request's path."""
    entry = FORMATS[request.format]
    options: dict[str, Any] = {"labels": request.labels}
    if request.format not in (Format.HUB, Format.COREML):
        options["dynamic"] = request.dynamic
    entry.write(request.model, part, img_size=request.img_size, **options)
