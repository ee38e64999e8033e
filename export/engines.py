"""Run a model's forward pass in the engines that people deploy with: PyTorch, ONNX Runtime, OpenVINO."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import printable
from .._torch import without_compiler_caches
from ..fusion import FuseError, fuse
from .errors import ExportError, MissingExtraError
from .graphs import INPUT_NAME, export_onnx, require_onnx
from .inputs import without_warnings

Run = Callable[[], Any]
LONGEST = 200  # characters of an engine's message


def prepare(engine: str, model: nn.Module, x: Tensor) -> Run:
    """Return a call without arguments that runs the model on x once in an engine, on the CPU, without gradients.

    Engines use torch's number of threads. Files are exported for the shape of x and deleted when they are loaded.

    Args:
        engine: "eager", "fused" (`foveate.fuse`), "compiled" (torch.compile), "onnxruntime" or "openvino".
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
    require_onnx("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    with TemporaryDirectory() as folder:
        file = export_onnx(model, Path(folder) / "model.onnx", example=x, dynamic=())
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {INPUT_NAME: x.numpy()}
    return lambda: session.run(None, feed)


def _openvino(model: nn.Module, x: Tensor) -> Run:
    if find_spec("openvino") is None:
        raise MissingExtraError("the engine openvino needs the package openvino: pip install openvino")
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_PRECISION_HINT": "f32"}
    with TemporaryDirectory() as folder:
        file = export_onnx(model, Path(folder) / "model.onnx", example=x, dynamic=())
        request = openvino.Core().compile_model(str(file), "CPU", options).create_infer_request()
    feed = {0: x.numpy()}
    return lambda: request.infer(feed)


ENGINES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": _eager,
    "fused": _fused,
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
