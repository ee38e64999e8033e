"""Load a model, write it for a runtime, and verify the file.

Runtimes: ONNX Runtime, OpenVINO, AOTInductor, ExecuTorch, Core ML, torch.export, timm's hub.

`foveate.export.formats.FORMATS` lists the formats.
"""

from .adapters import load_adapter, merge_lora, save_adapter
from .agreement import Agreement, verify
from .convert import save_weights
from .converters import export_aoti, export_coreml, export_executorch, export_openvino
from .errors import DisagreementError, ExportError, MissingExtraError
from .graphs import export_onnx, export_program
from .hub import save_hub
from .inputs import real_images
from .load import load_model
from .metadata import Metadata
from .quantize import quantize_onnx, quantize_program
from .runtimes import OpenFile, open_file

__all__ = [
    "Agreement",
    "DisagreementError",
    "ExportError",
    "Metadata",
    "MissingExtraError",
    "OpenFile",
    "export_aoti",
    "export_coreml",
    "export_executorch",
    "export_onnx",
    "export_openvino",
    "export_program",
    "load_adapter",
    "load_model",
    "merge_lora",
    "open_file",
    "quantize_onnx",
    "quantize_program",
    "real_images",
    "save_adapter",
    "save_hub",
    "save_weights",
    "verify",
]
