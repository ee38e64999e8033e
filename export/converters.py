"""Write a model for one runtime: an AOTInductor package, OpenVINO IR, an ExecuTorch program, a Core ML package.

Each starts from the program or the ONNX file of graphs.py, so all of them compute the same graph.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .._files import atomic_path
from .._modes import evaluating
from .._torch import compile_package
from .errors import ExportError
from .files import atomic_files, require_packages
from .graphs import (
    PROGRAM_SUFFIX,
    export_onnx,
    metadata_for,
    prepare_example,
    quietly,
    spelled_out_program,
)
from .ir import IR_SUFFIX, write_openvino
from .metadata import KEY, Metadata
from .xnnpack import executorch_bytes

EXECUTORCH_SUFFIX, COREML_SUFFIX = ".pte", ".mlpackage"
SHAPE_KEY = f"{KEY}_input"  # of the entry of an AOTInductor package with the shape of its input
_MOST_IMAGES = 64  # of a batch of an ExecuTorch program: it plans its memory for the largest batch


def export_aoti(
    model: nn.Module,
    out: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    example: Tensor | None = None,
    dynamic: Sequence[str] = ("batch",),
    labels: tuple[str, ...] | None = None,
) -> Path:
    """Write an AOTInductor package: machine code for this CPU, for `torch._inductor.aoti_load_package` and for C++.

    Compiles C++ for a minute or two. See `export_onnx` for arguments and errors; the name of the file ends in .pt2.

    Raises:
        ExportError: no C++ compiler, or an invalid request.
    """
    example = prepare_example(model, out := Path(out), PROGRAM_SUFFIX, img_size, example, dynamic)
    with evaluating(model), torch.no_grad(), atomic_path(out) as part:
        program = spelled_out_program(model, example, dynamic)
        write_aoti(program, part, metadata_for(model, example, dynamic, labels))
    return out


def write_aoti(
    program: torch.export.ExportedProgram, part: Path, metadata: Metadata | None, int8: bool = False
) -> None:
    """Compile a program to a package.

    Args:
        int8: the program is quantized. Its weights are packed, without which the products are computed in float32.
    """
    entries = {SHAPE_KEY: json.dumps(_input_shape(program))} | ({} if metadata is None else {KEY: metadata.dumps()})
    with torch.no_grad():  # where gradients are on, nothing is packed
        quietly(lambda: compile_package(program, str(part), {"aot_inductor.metadata": entries}, packed=int8))


def _input_shape(program: torch.export.ExportedProgram) -> list[int | None]:
    """Return the shape of the images that a program takes; None: any size."""
    name = program.graph_signature.user_inputs[0]
    node = next(node for node in program.graph.find_nodes(op="placeholder") if node.name == name)
    return [size if isinstance(size, int) else None for size in node.meta["val"].shape]


def export_openvino(
    model: nn.Module,
    out: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    example: Tensor | None = None,
    dynamic: Sequence[str] = ("batch",),
    labels: tuple[str, ...] | None = None,
) -> Path:
    """Write OpenVINO IR in float32: OUT.xml, and the weights beside it, OUT.bin.

    See `export_onnx` for arguments and errors; `out` ends in .xml.
    """
    require_packages("openvino", "openvino")
    out = Path(out)
    example = prepare_example(model, out, IR_SUFFIX, img_size, example, dynamic)
    with atomic_files(out) as part:
        source = export_onnx(model, part.with_suffix(".onnx"), example=example, dynamic=dynamic)
        write_openvino(source, part, metadata_for(model, example, dynamic, labels))
        source.unlink()
    return out


def export_executorch(
    model: nn.Module,
    out: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    example: Tensor | None = None,
    dynamic: Sequence[str] = ("batch",),
    labels: tuple[str, ...] | None = None,
) -> Path:
    """Write an ExecuTorch program for phones and embedded CPUs, with XNNPACK's kernels where they apply.

    See `export_onnx` for arguments and errors; `out` ends in .pte. A dynamic batch holds up to 64 images; the image
    size is fixed.
    """
    require_packages("executorch", "executorch")
    if "size" in dynamic:
        raise ExportError("an ExecuTorch program holds one image size; export one file for each")
    example = prepare_example(model, out := Path(out), EXECUTORCH_SUFFIX, img_size, example, dynamic)
    with evaluating(model), torch.no_grad(), atomic_path(out) as part:
        program = spelled_out_program(model, example, dynamic, _MOST_IMAGES)
        metadata = metadata_for(model, example, dynamic, labels)
        constants = None if metadata is None else {KEY: metadata.dumps()}
        part.write_bytes(quietly(lambda: executorch_bytes(program, constants)))
    return out


def export_coreml(
    model: nn.Module,
    out: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    example: Tensor | None = None,
    labels: tuple[str, ...] | None = None,
) -> Path:
    """Write a Core ML package for one image a call, in float32. It runs on macOS and iOS only.

    See `export_onnx` for arguments and errors; `out` ends in .mlpackage and must not exist.
    """
    require_packages("coreml", "coremltools")
    example = prepare_example(model, out := Path(out), COREML_SUFFIX, img_size, example, ())
    with evaluating(model), torch.no_grad(), atomic_path(out) as part:
        metadata = metadata_for(model, example, (), labels)
        program = spelled_out_program(model, example, ()).run_decompositions({})
        quietly(lambda: _write_coreml(program, part, metadata))
    return out


def _write_coreml(program: torch.export.ExportedProgram, part: Path, metadata: Metadata | None) -> None:
    import coremltools

    converted = coremltools.convert(
        program,
        compute_precision=coremltools.precision.FLOAT32,
        convert_to="mlprogram",
        skip_model_load=True,
    )
    if metadata is not None:
        converted.user_defined_metadata[KEY] = metadata.dumps()
    converted.save(str(part))
