"""Post-training quantization to int8, weights and activations, calibrated on images: ONNX Runtime's and torchao's.

Both observe the ranges of activations on the calibration images, by the settings of a preset. Activations get one scale
a tensor; norms, softmax and sums stay in float32.
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import has_vnni
from .errors import ExportError
from .files import require_packages
from .graphs import INPUT_NAME, dynamic_shapes_of, quietly
from .presets import DEFAULT, MOMENTUM, OF_TORCHAO, PERCENTILE, Preset

_BATCH = 8
_PRODUCTS = ["Conv", "Gemm", "MatMul"]
_CUTS = ["Clip", "Relu"]  # what they cut is outside the range of a convolution's int8 output
_FLOAT_OUTPUTS = ["Gemm", "MatMul"]  # their int8 kernels write float32, which is what norms, softmax and sums take


def quantize_onnx(source: Path, out: Path, images: Tensor, preset: Preset = DEFAULT) -> Path:
    """Quantize an ONNX file to int8 weights and uint8 activations, as QuantizeLinear and DequantizeLinear nodes.

    Args:
        source: written by `export_onnx`, float32.
        out: the quantized file.
        images: (N, C, H, W), preprocessed; N that the file's batch size divides. All are observed.
        preset: how ranges are found.

    Raises:
        ExportError: onnxruntime cannot quantize the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    require_packages("int8", "onnx", "onnxruntime")
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = images.split(_BATCH)
            self.set_range(0, len(self))

        def __len__(self) -> int:
            return len(self.batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(self.batches[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT_NAME: batch.numpy()}

    by_share = preset.ranges == "percentile"
    ranges: dict[str, dict[str, Any]] = {
        "moving": {"CalibMovingAverage": True, "CalibMovingAverageConstant": 1 - MOMENTUM, "CalibStridedMinMax": 1},
        "percentile": {"CalibPercentile": PERCENTILE},
    }

    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        graph = quietly(lambda: _prepare(source, prepared))
        options: dict[str, Any] = {
            "quant_format": QuantFormat.QDQ,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "per_channel": preset.per_channel,
            "reduce_range": not has_vnni(),
            "op_types_to_quantize": _PRODUCTS + _CUTS,
            "nodes_to_exclude": _without_images(graph),
            "calibrate_method": CalibrationMethod.Percentile if by_share else CalibrationMethod.MinMax,
            "extra_options": {
                "OpTypesToExcludeOutputQuantization": _FLOAT_OUTPUTS,
                "TensorQuantOverrides": {name: [{"quant_type": QuantType.QInt8}] for name in _stacks(graph)},
                **ranges.get(preset.ranges, {}),
            },
        }
        with redirect_stdout(StringIO()):  # the search for percentiles prints its progress
            quietly(lambda: quantize_static(str(prepared), str(out), Images(), **options))
    return out


def _prepare(source: Path, out: Path) -> Any:
    """Let ONNX Runtime fuse what it fuses before calibration, note the shapes of all tensors, and return the graph.

    Constants are not folded: of a table of biases and a mask, the file would hold an entry for each pair of tokens, in
    float32. The session that runs the file folds them.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(
        str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )  # fmt: skip
    model = onnx.shape_inference.infer_shapes(onnx.load(out))
    add_pre_process_metadata(model)  # else ONNX Runtime warns that this step was left out
    onnx.save(model, out)
    return model.graph


def _stacks(graph: Any) -> list[str]:
    """Return the weights that are stacks of matrices: ONNX Runtime multiplies by them with one scale each only."""
    ranks = {weight.name: len(weight.dims) for weight in graph.initializer}
    return [node.input[1] for node in graph.node if node.op_type == "MatMul" and ranks.get(node.input[1], 0) > 2]


def _without_images(graph: Any) -> list[str]:
    """Return the nodes that depend on no image: a session computes them once, unless they are quantized."""
    varying = {value.name for value in graph.input}
    fixed = []
    for node in graph.node:  # in the order in which they run
        if varying.intersection(node.input):
            varying.update(node.output)
        else:
            fixed.append(node.name)
    return fixed


def quantize_program(
    model: nn.Module, example: Tensor, images: Tensor, *, dynamic: Sequence[str], preset: Preset = DEFAULT
) -> torch.export.ExportedProgram:
    """Return an int8 program of a model, through torchao's quantizer for x86 CPUs; compile it for speed.

    Args:
        model: in eval mode, on the CPU.
        example: (B, C, H, W), the size of the program.
        images: (N, C, H, W), preprocessed.
        dynamic: with "batch" any batch size; otherwise that of the example.
        preset: how ranges are found.

    Raises:
        ExportError: torchao cannot quantize the model, or does not find ranges as the preset asks.
        MissingExtraError: torchao is not installed.
    """
    if preset.ranges not in OF_TORCHAO:
        raise ExportError(f"torchao finds ranges by {' or '.join(OF_TORCHAO)}, not by {preset.ranges}")
    require_packages("int8", "torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    shapes = dynamic_shapes_of(dynamic)

    def quantize() -> torch.export.ExportedProgram:
        graph = torch.export.export(model, (example,), dynamic_shapes=shapes).module()
        _share_equal_constants(graph)
        _copy_permuted_inputs(graph)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(_torchao_config(x86.get_default_x86_inductor_quantization_config(), preset))
        prepared = prepare_pt2e(graph, quantizer)
        for batch in images.split(_BATCH if "batch" in dynamic else len(example)):
            prepared(batch)
        return torch.export.export(convert_pt2e(prepared), (example,), dynamic_shapes=shapes)

    with torch.no_grad():
        return quietly(quantize)


def _share_equal_constants(module: torch.fx.GraphModule) -> None:
    """Keep one of the constants that are equal, such as the indices of a table in each block."""
    kept: dict[tuple[Any, ...], str] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = attrgetter(node.target)(module)
        if isinstance(value, Tensor) and value.dim() > 0 and not value.is_floating_point():
            key = (value.dtype, value.shape, value.stride(), value.numpy().tobytes())
            node.target = kept.setdefault(key, node.target)
    module.recompile()


def _copy_permuted_inputs(module: torch.fx.GraphModule) -> None:
    """Copy what linear layers of more than two dimensions take, where it is not contiguous.

    torch computes the layer as a batched product otherwise, for which torchao's int8 product wants a fixed batch.
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        x = node.args[0]
        if x.meta["val"].dim() > 2 and not x.meta["val"].is_contiguous():
            with module.graph.inserting_before(node):
                copied = module.graph.call_function(torch.ops.aten.contiguous.default, (x,))
            copied.meta = {**x.meta, "val": x.meta["val"].contiguous()}
            node.replace_input_with(x, copied)
    module.recompile()


def _torchao_config(config: Any, preset: Preset) -> Any:
    """Return torchao's settings with the ranges of a preset."""
    from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver, PerChannelMinMaxObserver

    class OneRange(PerChannelMinMaxObserver):
        """One range for all channels of a weight; the compiler's int8 products take a list of scales only."""

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            scales, zero_points = super().calculate_qparams()
            return scales.amax().expand_as(scales).contiguous(), zero_points

    weight, activation = config.weight, config.input_activation
    if not preset.per_channel:
        weight = replace(weight, observer_or_fake_quant_ctr=OneRange.with_args(eps=2**-12))
    if preset.ranges == "moving":
        observer = MovingAverageMinMaxObserver.with_args(averaging_constant=1 - MOMENTUM, eps=2**-12)
        activation = replace(activation, observer_or_fake_quant_ctr=observer)
    return replace(config, weight=weight, input_activation=activation, output_activation=activation)
