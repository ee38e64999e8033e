"""Post-training quantization to int8, weights and activations, calibrated on images: ONNX Runtime's and torchao's.

Both observe the ranges of activations on the calibration images. Weights of convolutions and products get one scale a
channel, activations one scale a tensor; norms, softmax and sums stay in float32.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import has_vnni
from .files import require_packages
from .graphs import INPUT_NAME, dynamic_shapes_of, quietly

_BATCH = 8
_ONNX_OPS = ["Conv", "Gemm", "MatMul"]


def quantize_onnx(source: Path, out: Path, images: Tensor) -> Path:
    """Quantize an ONNX file to int8 weights and uint8 activations, as QuantizeLinear and DequantizeLinear nodes.

    Args:
        source: written by `export_onnx`, float32.
        out: the quantized file.
        images: (N, C, H, W), preprocessed; N that the file's batch size divides.

    Raises:
        ExportError: onnxruntime cannot quantize the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    require_packages("int8", "onnx", "onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT_NAME: batch.numpy()}

    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quietly(lambda: quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True))
        options: dict[str, Any] = {
            "quant_format": QuantFormat.QDQ,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "per_channel": True,
            "reduce_range": not has_vnni(),
            "op_types_to_quantize": _ONNX_OPS,
        }
        quietly(lambda: quantize_static(str(prepared), str(out), Images(), **options))
    return out


def quantize_program(
    model: nn.Module, example: Tensor, images: Tensor, *, dynamic: Sequence[str]
) -> torch.export.ExportedProgram:
    """Return an int8 program of a model, through torchao's quantizer for x86 CPUs; compile it for speed.

    Args:
        model: in eval mode, on the CPU.
        example: (B, C, H, W), the size of the program.
        images: (N, C, H, W), preprocessed.
        dynamic: with "batch" any batch size; otherwise that of the example.

    Raises:
        ExportError: torchao cannot quantize the model.
        MissingExtraError: torchao is not installed.
    """
    require_packages("int8", "torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    shapes = dynamic_shapes_of(dynamic)

    def quantize() -> torch.export.ExportedProgram:
        graph = torch.export.export(model, (example,), dynamic_shapes=shapes).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        for batch in images.split(_BATCH if "batch" in dynamic else len(example)):
            prepared(batch)
        return torch.export.export(convert_pt2e(prepared), (example,), dynamic_shapes=shapes)

    with torch.no_grad():
        return quietly(quantize)
