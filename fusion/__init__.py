"""Inference on a CPU: `fuse` rewrites a model, `keep_memory` keeps its buffers, `cpu_report` measures the CPU."""

from ..attention_ops.calibration import CpuReport, cpu_report
from .errors import FuseError
from .memory import keep_memory
from .model import FusedModel, fuse, unfuse
from .report import FuseReport

__all__ = ["CpuReport", "FuseError", "FuseReport", "FusedModel", "cpu_report", "fuse", "keep_memory", "unfuse"]
