"""What all launchers share: whether Triton can run on a tensor, limits, and how tl.dot is called. No Triton needed."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.library import CustomOpDef

from .._torch import body_of, compiles, dispatch_modes_are_on, name_of, transforms_are_on

PLAIN_TENSORS = (Tensor, nn.Parameter)  # no subclass, which may see the operations on it
LEAST_TRITON = (3, 4)
LEAST_CAPABILITY = (8, 0)  # Ampere: asynchronous copies and bfloat16 products
MOST_HEAD_DIM = 128  # of the attention kernels: the registers hold no more
LEAST_SCALE = 1e-20  # of local attention: its finite floor of masked logits, -1e30, is scaled too
LEAST_DOT = 16  # the smallest side of a matrix that tl.dot takes
LEAST_PROGRAMS = 512  # about four for each multiprocessor of an H100, so that few channels or heads still fill it


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Say whether Triton interprets its kernels, on CPU tensors: TRITON_INTERPRET=1, which Triton reads once."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_no_triton(x: Tensor) -> str | None:
    """Return the reason why no Triton kernel can run on the device of `x`, or None.

    A fake CUDA tensor on a machine without CUDA is accepted: nothing is launched for it.
    """
    return _why_no_triton_on(x.device)


@lru_cache(maxsize=64)
def _why_no_triton_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        if device.type != "cpu" or not interpreted():
            return f"Triton kernels need CUDA tensors, got {device.type}"
        return _why_not_installed()
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        return f"the kernels need compute capability {_dots(LEAST_CAPABILITY)}, this GPU has {_dots(found)}"
    return _why_not_installed()


def compute_capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of the GPU that holds `x`, (0, 0) on another device."""
    return _capability_of(x.device) if x.is_cuda else (0, 0)


_capability_of = lru_cache(maxsize=64)(torch.cuda.get_device_capability)


def on_device(x: Tensor) -> AbstractContextManager:
    """Make the device of `x` the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype, full: str = "tf32x3") -> str:
    """Return the `input_precision` of tl.dot: one TF32 product where the user allows TF32, else `full`.

    Args:
        dtype: of the matrices; it matters for float32 only.
        full: how float32 keeps its digits: "tf32x3", three products on tensor cores, or "ieee", without tensor cores.
    """
    if dtype != torch.float32:
        return "ieee"  # the only choice for 16-bit types
    return "tf32" if tf32_allowed() else full


def power_of_2(length: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `length` and `least`, itself a power of two."""
    return max(1 << max(length - 1, 0).bit_length(), least)


def cdiv(length: int, size: int) -> int:
    """Return how many pieces of `size` cover `length`: triton.cdiv takes 2 us."""
    return -(-length // size)


def padded(width: int) -> int:
    """Return the width that a tile in a kernel has for so many columns: a power of two that tl.dot takes."""
    return power_of_2(width, LEAST_DOT)


def token_steps(x: Tensor, axis: int) -> tuple[int, int, int]:
    """Return the strides of a map's rows and columns, and how many tokens a kernel takes for one row.

    Where one step leads from every token to the next, that step is the row stride and a row is one token: the kernel
    then needs no division.

    Args:
        x: a map of any layout.
        axis: dimension of its rows; that of its columns is the next one.
    """
    (height, width), (row, col) = x.shape[axis : axis + 2], x.stride()[axis : axis + 2]
    if width == 1:
        return row, 0, 1
    if height == 1 or row == width * col:
        return col, 0, 1
    return row, col, width


R = TypeVar("R")


def autocasts(x: Tensor) -> bool:
    """Say whether autocast is on for the device of `x`."""
    device = x.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


_has_autocast = lru_cache(maxsize=16)(torch.amp.is_autocast_available)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Switch autocast off for the device of `x`, where it is on: entering torch.autocast takes 5 us."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def without_autocast(body: Callable[..., R]) -> Callable[..., R]:
    """Decorate a backward pass, which users may call inside autocast: its products keep the dtypes of its tensors.

    The forward pass needs none: an op switches autocast off before it calls a body.
    """

    @wraps(body)
    def run(x: Tensor, *args, **kwargs) -> R:
        with no_autocast(x):
            return body(x, *args, **kwargs)

    return run


def in_eager_mode(inputs: tuple[Any, ...]) -> bool:
    """Say whether nothing traces, records or transforms what is computed from these inputs."""
    if is_recorded():
        return False
    for x in inputs:  # a generator takes 1 us more
        if isinstance(x, Tensor) and type(x) not in PLAIN_TENSORS:
            return False
    return True


def is_recorded() -> bool:
    """Say whether something traces, records or transforms all operations of this thread."""
    return compiles() or dispatch_modes_are_on() or transforms_are_on() or torch.jit.is_tracing()


def eager_forward(
    op: CustomOpDef, save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """Register the gradient of a kernels' op, and return a function that calls it.

    In eager mode that runs the op's Python without the dispatcher, which takes 10 us of a call, and 20 us more where
    there are gradients.

    Args:
        op: all inputs positional; returns a tuple of tensors.
        save, differentiate: `setup_context` and `backward` as torch.library.register_autograd takes them.
    """
    op.register_autograd(differentiate, setup_context=save)
    body = body_of(op)

    def forward(ctx, *inputs):
        output = body(*inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function: Any = type(name_of(op).replace("::", "_"), (torch.autograd.Function,), members)

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        if not in_eager_mode(inputs):
            return op(*inputs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return function.apply(*inputs)
        return body(*inputs)

    return call


def eager_backward(op: CustomOpDef, **eager: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that calls a backward op; in eager mode without the dispatcher, unless a graph is created.

    Args:
        op: all inputs positional; returns a tuple of tensors.
        eager: more arguments of the op's Python in that case, for what the dispatcher does not allow.
    """
    body = body_of(op)

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() or not in_eager_mode(inputs):
            return op(*inputs)
        return body(*inputs, **eager)

    return call


def refuse_second_derivative(backward_op: CustomOpDef, name: str) -> None:
    """Raise NotImplementedError where the gradients of the kernels `name` are differentiated."""

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
