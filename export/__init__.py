"""Load a model, write it as ONNX file, torch.export program or timm hub folder, and verify the result."""

from .agreement import Agreement, verify
from .errors import DisagreementError, ExportError, MissingExtraError
from .graphs import export_onnx, export_program
from .hub import save_hub
from .inputs import real_images
from .load import load_model

__all__ = [
    "Agreement",
    "DisagreementError",
    "ExportError",
    "MissingExtraError",
    "export_onnx",
    "export_program",
    "load_model",
    "real_images",
    "save_hub",
    "verify",
]
