"""Open an exported file in the runtime it is for, and run it on batches of images on the CPU.

Opening an ONNX file, OpenVINO IR or a hub folder runs no code from it. A .pt2 program is unpickled by
`torch.export.load`, and an AOTInductor package is machine code: open only those that you trust.
"""

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import first_line
from .._torch import load_package
from .converters import COREML_SUFFIX, EXECUTORCH_SUFFIX, SHAPE_KEY
from .errors import ExportError
from .files import require_packages
from .graphs import EXTRA_FILE, ONNX_SUFFIX, PROGRAM_SUFFIX
from .hub_files import CONFIG
from .inputs import without_warnings
from .ir import IR_SUFFIX, import_openvino, plain_errors
from .load import load_model
from .metadata import KEY, Metadata, loads, metadata_of

_XML_START_BYTES = 4096  # of an IR, in which its first element is
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class OpenFile:
    """A file that is ready to run."""

    runtime: str
    run: Run  # (B, C, H, W) float32 -> the outputs, in order
    metadata: Metadata | None  # None: the file holds none


def open_file(path: str | Path) -> OpenFile:
    """Open an exported file by its suffix; it uses torch's number of threads.

    Args:
        path: .onnx (ONNX Runtime), .pt2 (torch.export program or AOTInductor package), .xml (OpenVINO IR), .pte
            (ExecuTorch), or a folder in timm's hub layout.

    Raises:
        ExportError: no such file, another suffix, or a file that its runtime cannot read.
        MissingExtraError: the runtime is not installed.
    """
    path = Path(path)
    if os.path.isdir(path) and path.suffix != COREML_SUFFIX:
        return _open_hub(path)
    if path.suffix not in _OPENERS:
        known = ", ".join(_OPENERS)
        raise ExportError(f"{path}: wanted a file that ends in {known}, or a folder in timm's hub layout")
    if not os.path.exists(path):  # unlike Path.exists, False for any name
        raise ExportError(f"{path} does not exist")
    try:
        with without_warnings():
            return _OPENERS[path.suffix](path)
    except (ExportError, ImportError):
        raise
    except Exception as error:  # runtimes raise many types
        raise ExportError(f"{path} cannot be read: {first_line(error)}") from error


def is_exported_file(name: str) -> bool:
    """Return whether a name is that of an exported file, and not of a model."""
    return Path(name).suffix in _OPENERS or os.path.isfile(os.path.join(name, CONFIG))


def _open_hub(path: Path) -> OpenFile:
    model = load_model(f"local-dir:{path}")
    return OpenFile("PyTorch", run_model(model), metadata_of(model))


def run_model(model: nn.Module) -> Run:
    """Return a model as the `run` of an open file, without gradients."""

    def run(batch: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return as_list(model(batch))

    return run


def _open_onnx(path: Path) -> OpenFile:
    require_packages("export", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    name = session.get_inputs()[0].name
    return OpenFile(
        "ONNX Runtime",
        lambda batch: [torch.from_numpy(out) for out in session.run(None, {name: batch.numpy()})],
        _metadata(text),
    )


def _open_openvino(path: Path) -> OpenFile:
    require_packages("openvino", "openvino")
    with path.open("rb") as file:
        if b"<net" not in file.read(_XML_START_BYTES):
            raise ExportError(f"{path} cannot be read: it is no OpenVINO IR")
    core = import_openvino().Core()
    with plain_errors():
        loaded = core.read_model(str(path))
    text = loaded.get_rt_info(KEY).astype(str) if loaded.has_rt_info(KEY) else None
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_PRECISION_HINT": "f32"}
    with plain_errors():
        request = core.compile_model(loaded, "CPU", options).create_infer_request()

    taken = [size.get_length() if size.is_static else None for size in loaded.inputs[0].partial_shape]

    def run(batch: Tensor) -> list[Tensor]:
        _check_shape(batch, taken)
        with plain_errors():
            return [torch.from_numpy(out.copy()) for out in request.infer({0: batch.numpy()}).values()]

    return OpenFile("OpenVINO", run, _metadata(text))


def _open_program(path: Path) -> OpenFile:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/aotinductor/" in name for name in names):
        return _open_aoti(path)
    files: dict[str, Any] = {EXTRA_FILE: ""}
    program = torch.export.load(path, extra_files=files).module()
    return OpenFile("torch.export", lambda batch: _without_gradients(program, batch), _metadata(files[EXTRA_FILE]))


def _open_aoti(path: Path) -> OpenFile:
    package = load_package(str(path))
    entries = package.get_metadata()
    taken = json.loads(entries.get(SHAPE_KEY, "null"))

    def run(batch: Tensor) -> list[Tensor]:
        _check_shape(batch, taken)
        return _without_gradients(package, batch)

    return OpenFile("AOTInductor", run, _metadata(entries.get(KEY)))


def _open_executorch(path: Path) -> OpenFile:
    require_packages("executorch", "executorch")
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    forward = program.load_method("forward")
    text = program.load_method(KEY).execute([])[0] if KEY in program.method_names else None
    return OpenFile("ExecuTorch", lambda batch: [out.clone() for out in forward.execute([batch])], _metadata(text))


def _open_coreml(path: Path) -> OpenFile:
    raise ExportError(f"{path}: Core ML packages run on macOS and iOS only; open it with coremltools there")


def _check_shape(batch: Tensor, taken: Sequence[int | None] | None) -> None:
    """Refuse images of another shape; OpenVINO and AOTInductor compute something of them.

    Args:
        taken: shape of the file's input, None where a size is free; None: unknown.
    """
    if taken is None:
        return
    fits = len(taken) == batch.dim() and all(want in (None, got) for want, got in zip(taken, batch.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in taken)
        raise ExportError(f"the file takes images ({wanted}), got {tuple(batch.shape)}")


def _without_gradients(call: Callable[[Tensor], Any], batch: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return as_list(call(batch))


def _metadata(text: str | bytes | None) -> Metadata | None:
    return loads(text.decode() if isinstance(text, bytes) else text) if text else None


def as_list(outputs: Any) -> list[Tensor]:
    """Return the outputs of a model as a list: logits, or feature maps."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


_OPENERS: dict[str, Callable[[Path], OpenFile]] = {
    ONNX_SUFFIX: _open_onnx,
    PROGRAM_SUFFIX: _open_program,
    IR_SUFFIX: _open_openvino,
    EXECUTORCH_SUFFIX: _open_executorch,
    COREML_SUFFIX: _open_coreml,
}
