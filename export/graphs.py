"""Write a model as a file that runs without this package: ONNX, or a torch.export program."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import first_line
from .._files import atomic_path
from .._modes import evaluating
from .._torch_files import written
from .errors import ExportError
from .files import check_target, require_packages
from .inputs import check_fits, data_config, without_warnings
from .metadata import KEY, Metadata, metadata_of
from .onnx_graph import simplify
from .sizes import any_size_program
from .spelling import SpelledOut

DYNAMIC = ("batch", "size")  # what a file may leave free
ONNX_SUFFIX, PROGRAM_SUFFIX = ".onnx", ".pt2"
INPUT_NAME = "images"
EXTRA_FILE = f"{KEY}.json"  # of a program: its metadata
_ONNX_LIMIT_BYTES = 2**31 - 1  # protobuf's limit for one message


def export_onnx(
    model: nn.Module,
    out: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    example: Tensor | None = None,
    dynamic: Sequence[str] = ("batch",),
    opset: int | None = None,
    labels: tuple[str, ...] | None = None,
) -> Path:
    """Write the model as one ONNX file with the input `images` and the output `logits` (`features_0`, ... for lists).

    The model is exported in eval mode, on the CPU, in float32. The modes of its modules are restored.

    Args:
        model: made by timm, or any module when `example` is given.
        out: a name that ends in .onnx. It is written atomically: an existing file is kept when the export fails.
        img_size: height and width of the graph, in pixels; None: the model's own size.
        example: (B, C, H, W), B > 1 for a dynamic batch; replaces the model's own size.
        dynamic: what is left free: "batch", and "size" for every height and width that the model takes. The batch is
            otherwise that of the example, or 1.
        opset: version of the ONNX operator set; None: the default of the installed torch.
        labels: class names, in the order of the logits, for the file's metadata; None: those of the model.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: the path, the size or the model does not fit, or the model cannot be exported for every size.
    """
    require_packages("export", "onnx", "onnxscript")
    example = prepare_example(model, out := Path(out), ONNX_SUFFIX, img_size, example, dynamic)
    _check_onnx_size(model)
    with evaluating(model), torch.no_grad(), atomic_path(out) as part:
        options: dict[str, Any] = {
            "input_names": [INPUT_NAME],
            "output_names": _output_names(model, example),
            "dynamic_shapes": _names(dynamic),
            "opset_version": opset,
            "dynamo": True,
            "verbose": False,
            "external_data": False,
            "optimize": False,  # `simplify` does
        }
        # Export a program first: from a module, torch 2.8 writes one branch of data-dependent control flow.
        program = quietly(lambda: _program(model, example, dynamic))
        graph = quietly(lambda: torch.onnx.export(program, (), **options))
        quietly(lambda: simplify(graph.model))
        graph.model.metadata_props.update(_metadata_entry(model, example, dynamic, labels))
        quietly(lambda: graph.save(part))
    return out


def export_program(
    model: nn.Module,
    out: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    example: Tensor | None = None,
    dynamic: Sequence[str] = ("batch",),
    labels: tuple[str, ...] | None = None,
) -> Path:
    """Write the model as a torch.export program, for `torch.export.load(out).module()` without timm or this package.

    See `export_onnx` for arguments and errors; the name of the file ends in .pt2.
    """
    example = prepare_example(model, out := Path(out), PROGRAM_SUFFIX, img_size, example, dynamic)
    with evaluating(model), torch.no_grad(), atomic_path(out) as part:
        program = spelled_out_program(model, example, dynamic)
        entry = _metadata_entry(model, example, dynamic, labels)
        with written(part) as file:
            torch.export.save(program, file, extra_files={EXTRA_FILE: entry[KEY]} if entry else None)
    return out


def spelled_out_program(
    model: nn.Module, example: Tensor, dynamic: Sequence[str], most: int | None = None
) -> torch.export.ExportedProgram:
    """Return a program of torch's own operations, that names no file of this machine.

    Args:
        most: images of a batch, where it is dynamic; None: any number.
    """
    _output_names(model, example)
    program = quietly(lambda: _program(model, example, dynamic, most))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _program(
    model: nn.Module, example: Tensor, dynamic: Sequence[str], most: int | None = None
) -> torch.export.ExportedProgram:
    if "size" in dynamic:
        return any_size_program(model, example, "batch" in dynamic)
    with SpelledOut():
        return torch.export.export(model, (example,), dynamic_shapes=dynamic_shapes_of(dynamic, most))


def dynamic_shapes_of(dynamic: Sequence[str], most: int | None = None) -> tuple[dict[int, torch.export.Dim]] | None:
    """Return what torch.export takes for a dynamic batch of up to `most` images."""
    return ({0: torch.export.Dim("batch", max=most)},) if "batch" in dynamic else None


def _names(dynamic: Sequence[str]) -> tuple[dict[int, str]] | None:
    names = ({0: "batch"} if "batch" in dynamic else {}) | ({2: "height", 3: "width"} if "size" in dynamic else {})
    return (names,) if names else None


def metadata_for(
    model: nn.Module, example: Tensor, dynamic: Sequence[str], labels: tuple[str, ...] | None = None
) -> Metadata | None:
    """Return the metadata of a graph exported for an example; None where timm did not create the model."""
    size = (example.shape[-2], example.shape[-1])
    return metadata_of(model, size, batch=None if "batch" in dynamic else len(example), labels=labels)


def _metadata_entry(
    model: nn.Module, example: Tensor, dynamic: Sequence[str], labels: tuple[str, ...] | None
) -> dict[str, str]:
    metadata = metadata_for(model, example, dynamic, labels)
    return {} if metadata is None else {KEY: metadata.dumps()}


def prepare_example(
    model: nn.Module,
    out: Path,
    suffix: str,
    img_size: int | tuple[int, int] | None,
    example: Tensor | None,
    dynamic: Sequence[str],
) -> Tensor:
    """Check all arguments before the work starts, and return the example input."""
    check_target(out, suffix)
    if unknown := set(dynamic) - set(DYNAMIC):
        raise ExportError(f"dynamic takes {' and '.join(DYNAMIC)}, got {', '.join(sorted(unknown))}")
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    if odd := sorted(f"{dtype} on {device}" for device, dtype in kinds - {("cpu", torch.float32)}):
        raise ExportError(f"a graph is exported in torch.float32 on cpu, the model is in {', '.join(odd)}")
    if example is None:
        size = data_config(model, img_size)["input_size"]
        images = 2 if "batch" in dynamic else 1
        check_fits(images, size)
        return torch.zeros(images, *size)
    if img_size is not None:
        raise ExportError(f"img_size {img_size} and an example {tuple(example.shape)} are given; give one of the two")
    if "batch" in dynamic and len(example) < 2:
        raise ExportError("a dynamic batch size needs an example of two images or more, got 1")
    return example


def _check_onnx_size(model: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > _ONNX_LIMIT_BYTES:
        raise ExportError(f"one ONNX file holds up to 2.1 GB, the model has {size / 1e9:.1f} GB; export a .pt2 program")


def _output_names(model: nn.Module, example: Tensor) -> list[str]:
    try:
        outputs = model(example)
    except Exception as error:  # models raise many types
        shape = tuple(example.shape)
        raise ExportError(f"the model does not run on an input of {shape}: {first_line(error)}") from error
    return ["logits"] if isinstance(outputs, Tensor) else [f"features_{i}" for i in range(len(outputs))]


def quietly(export: Callable):
    try:
        with without_warnings():  # of internals of torch's exporters
            return export()
    except OSError:  # the disk is full
        raise
    except Exception as error:  # exporters raise many types
        raise ExportError(f"torch could not export the model: {first_line(error)}") from error
