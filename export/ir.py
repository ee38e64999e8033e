"""OpenVINO: imported without its telemetry, its IR written, its errors without the lines of its own source files."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._errors import first_line
from .errors import ExportError
from .inputs import without_warnings
from .metadata import KEY, Metadata

IR_SUFFIX = ".xml"
_TELEMETRY = "openvino_telemetry"
_OF_SOURCE_FILES = ("Exception from src/", "Check '")  # beginnings of lines that do not tell a user what is wrong


def import_openvino() -> Any:
    """Return the package, imported without its telemetry, for which it has a stub.

    The telemetry reports the import over HTTP and writes files into the user's home. A process that has imported
    openvino before keeps what it has; what is used here reports nothing by itself.
    """
    modules: dict[str, Any] = sys.modules
    if "openvino" not in modules:
        loaded = {_TELEMETRY: modules[_TELEMETRY]} if _TELEMETRY in modules else {}
        modules[_TELEMETRY] = None  # an import of it fails
        try:
            import openvino
        finally:
            del modules[_TELEMETRY]
            modules.update(loaded)
    import openvino

    return openvino


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise OpenVINO's errors without the lines that name its source files, where others follow."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith(_OF_SOURCE_FILES)] or lines
        raise RuntimeError("\n".join(told)) from error


def write_openvino(source: Path, part: Path, metadata: Metadata | None) -> None:
    """Convert an ONNX file to IR in float32: `part`, and the weights beside it.

    `openvino.convert_model` is not used: it reports each conversion, and its files are no faster.

    Raises:
        ExportError: OpenVINO cannot read the graph.
        OSError: the disk is full.
    """
    openvino = import_openvino()
    try:
        with without_warnings(), plain_errors():
            converted = openvino.Core().read_model(str(source))
    except RuntimeError as error:
        raise ExportError(f"OpenVINO could not convert the model: {first_line(error)}") from error
    if metadata is not None:
        converted.set_rt_info(metadata.dumps(), [KEY])
    try:
        with plain_errors():
            openvino.save_model(converted, str(part), compress_to_fp16=False)
    except RuntimeError as error:  # OpenVINO reports a full disk this way
        raise OSError(f"{part.name}: {first_line(error)}") from error
