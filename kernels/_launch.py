"""What every launcher asks before it launches: can Triton run on this tensor, in this process?"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.library import CustomOpDef

LEAST_TRITON = (3, 4)
LEAST_CAPABILITY = (8, 0)  # Ampere: asynchronous copies and bfloat16 products


def interpreted() -> bool:
    """Say whether Triton runs its kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_no_triton(x: Tensor) -> str | None:
    """Return the reason why no Triton kernel can run on the device of `x`, or None.

    A fake CUDA tensor on a machine without CUDA is accepted: nothing is launched for it.
    """
    if not x.is_cuda:
        if x.device.type != "cpu" or not interpreted():
            return f"Triton kernels need CUDA tensors, got {x.device.type}"
        return _why_not_installed()
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.cuda.is_available() and (found := _capability(x.device)) < LEAST_CAPABILITY:
        return f"the kernels need compute capability {_dots(LEAST_CAPABILITY)}, this GPU has {_dots(found)}"
    return _why_not_installed()


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply fp32: three TF32 products keep its digits, one where the user allows TF32."""
    if dtype != torch.float32:
        return "ieee"  # the only way of 16-bit types
    return "tf32" if tf32_allowed() else "tf32x3"


def refuse_second_derivative(backward_op: CustomOpDef, name: str) -> None:
    """Let a second derivative of the kernels `name` end in one clear error."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name}: the fused kernels can be differentiated once; use impl='tiled'")

    backward_op.register_autograd(refuse)


def tf32_allowed() -> bool:
    """Say whether the user lets matmuls of fp32 round to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer, where the old name may not be read beside the new one
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _why_not_installed() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < LEAST_TRITON:
        return f"the kernels need triton {_dots(LEAST_TRITON)} or newer, got {triton.__version__}"
    return None


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
