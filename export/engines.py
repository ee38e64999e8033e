"""Run a model's forward pass in the engines that people deploy with: PyTorch, ONNX Runtime, OpenVINO, AOTInductor."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import printable
from .._torch import without_compiler_caches
from ..fusion import FuseError, fuse
from .converters import export_aoti, export_executorch, export_openvino
from .errors import ExportError
from .graphs import export_onnx
from .inputs import without_warnings
from .runtimes import open_file

Run = Callable[[], Any]
LONGEST = 200  # characters of an engine's message


def prepare(engine: str, model: nn.Module, x: Tensor) -> Run:
    """Return a call without arguments that runs the model on x once in an engine, on the CPU, without gradients.

    Engines use torch's number of threads. Files are exported for the shape of x and deleted when they are loaded.

    Args:
        engine: "eager", "fused" (`foveate.fuse`), "compiled" (torch.compile), "onnxruntime", "openvino", "aoti"
            (AOTInductor) or "executorch".
        model: in eval mode.
        x: an image batch (B, C, H, W) in the model's dtype.

    Raises:
        ExportError: unknown engine, or the engine refuses the model; the message is the engine's, on one line.
        MissingExtraError: the engine is not installed.
    """
    if engine not in ENGINES:
        raise ExportError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    try:
        with without_warnings():
            return ENGINES[engine](model, x)
    except (ExportError, FuseError):
        raise
    except Exception as error:  # engines raise many types
        message = printable(" ".join(str(error).split()))  # OpenVINO's first line names a file of its own
        raise ExportError(f"{engine}: {message[:LONGEST] or type(error).__name__}") from error


def _eager(model: nn.Module, x: Tensor) -> Run:
    return torch.inference_mode()(lambda: model(x))


def _fused(model: nn.Module, x: Tensor) -> Run:
    return _eager(fuse(model, x), x)


def _compiled(model: nn.Module, x: Tensor) -> Run:
    compiled = torch.compile(model)
    run = torch.no_grad()(lambda: compiled(x))
    with without_compiler_caches():  # a cached graph may be of another foveate's ops
        run()  # compiles
    return run


def _onnxruntime(model: nn.Module, x: Tensor) -> Run:
    return _file(model, x, "model.onnx", export_onnx)


def _openvino(model: nn.Module, x: Tensor) -> Run:
    return _file(model, x, "model.xml", export_openvino)


def _aoti(model: nn.Module, x: Tensor) -> Run:
    return _file(model, x, "model.pt2", export_aoti)


def _executorch(model: nn.Module, x: Tensor) -> Run:
    return _file(model, x, "model.pte", export_executorch)


def _file(model: nn.Module, x: Tensor, name: str, write: Callable[..., Path]) -> Run:
    with TemporaryDirectory() as folder:
        run = open_file(write(model, Path(folder) / name, example=x, dynamic=())).run
    return lambda: run(x)


ENGINES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": _eager,
    "fused": _fused,
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "aoti": _aoti,
    "executorch": _executorch,
}
