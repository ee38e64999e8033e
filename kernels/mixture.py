"""Weighted sums of the values around every token (Triton): the local term of aggregated attention without a softmax.

Paper      Shi 2024, arXiv:2311.17132, the learnable tokens.
Tensors    weights: (B, H, W, heads, rows * cols), contiguous; v, out: (B, H, W, heads, D), any strides but that of D.
Grid       B * heads * tiles of tokens, row by row; one program owns 64 tokens of one head.
Numerics   sums in fp32, one rounding on store.
Memory     no copies of values; the backward pass reads gradients as the forward pass reads values. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    cdiv,
    eager_backward,
    eager_forward,
    on_device,
    power_of_2,
    refuse_second_derivative,
    without_autocast,
)

BLOCK = 64


@triton.jit
def _tile(ptr, strides, image, head, row, col, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """[tokens, PAD] of (B, H, W, heads, DIM); zeros where not inside and past DIM."""
    d = tl.arange(0, PAD)
    offs = row * strides[1] + col * strides[2]
    ptr += image * strides[0] + head * strides[3]
    return tl.load(ptr + offs[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def mixture_forward_kernel(
    w_ptr, v_ptr, out_ptr, v_strides, out_strides, heads, height, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(height * width, BLOCK)
    head, image = tl.program_id(0) // tiles % heads, (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    row, col, mine = n // width, n % width, n < height * width
    w_ptr += (image * height * width * heads + head) * (ROWS * COLS)
    acc = tl.zeros((BLOCK, PAD), tl.float32)
    for i in range(ROWS * COLS):  # not unrolled: the loads of all places would not fit into registers
        y, x = row + (i // COLS - ROWS // 2), col + (i % COLS - COLS // 2)
        inside = mine & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        weight = tl.load(w_ptr + n * (heads * ROWS * COLS) + i, mask=inside, other=0.0).to(tl.float32)
        v = _tile(v_ptr, v_strides, image, head, y, x, inside, DIM, PAD)
        acc += weight[:, None] * v.to(tl.float32)
    d = tl.arange(0, PAD)
    out_ptr += image * out_strides[0] + head * out_strides[3] + (row * out_strides[1] + col * out_strides[2])[:, None]
    tl.store(out_ptr + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mine[:, None] & (d < DIM)[None, :])


@triton.jit
def mixture_backward_kernel(
    w_ptr, v_ptr, grad_ptr, dw_ptr, dv_ptr, v_strides, grad_strides, dv_strides, heads, height, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(height * width, BLOCK)
    head, image = tl.program_id(0) // tiles % heads, (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    row, col, mine = n // width, n % width, n < height * width
    first = (image * height * width * heads + head) * (ROWS * COLS)
    step = heads * ROWS * COLS
    grad = _tile(grad_ptr, grad_strides, image, head, row, col, mine, DIM, PAD).to(tl.float32)
    dv = tl.zeros((BLOCK, PAD), tl.float32)
    for i in range(ROWS * COLS):  # not unrolled: the loads of all places would not fit into registers
        down, right = i // COLS - ROWS // 2, i % COLS - COLS // 2
        y, x = row + down, col + right
        inside = mine & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        v = _tile(v_ptr, v_strides, image, head, y, x, inside, DIM, PAD).to(tl.float32)
        dw = tl.sum(grad * v, 1)
        tl.store(dw_ptr + first + n * step + i, dw.to(dw_ptr.dtype.element_ty), mask=mine)
        y, x = row - down, col - right  # the token that sees this one at place i
        inside = mine & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        weight = tl.load(w_ptr + first + (y * width + x) * step + i, mask=inside, other=0.0).to(tl.float32)
        other = _tile(grad_ptr, grad_strides, image, head, y, x, inside, DIM, PAD).to(tl.float32)
        dv += weight[:, None] * other
    d = tl.arange(0, PAD)
    dv_ptr += image * dv_strides[0] + head * dv_strides[3] + (row * dv_strides[1] + col * dv_strides[2])[:, None]
    tl.store(dv_ptr + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mine[:, None] & (d < DIM)[None, :])


def _launch(x: Tensor, kernel: list[int]) -> tuple[tuple[int], dict]:
    batch, height, width, heads, dim = x.shape
    constants = {"ROWS": kernel[0], "COLS": kernel[1], "DIM": dim, "PAD": power_of_2(dim, 16), "BLOCK": BLOCK}
    return (batch * heads * cdiv(height * width, BLOCK),), constants | {"num_warps": 4}


def launch_forward(weights: Tensor, v: Tensor, out: Tensor, kernel: list[int]) -> None:
    grid, constants = _launch(v, kernel)
    mixture_forward_kernel[grid](
        weights, v, out, v.stride()[:4], out.stride()[:4], v.shape[3], v.shape[1], v.shape[2], **constants
    )  # fmt: skip


def launch_backward(weights: Tensor, v: Tensor, grad: Tensor, dw: Tensor, dv: Tensor, kernel: list[int]) -> None:
    grid, constants = _launch(v, kernel)
    strides = (v.stride()[:4], grad.stride()[:4], dv.stride()[:4])
    mixture_backward_kernel[grid](
        weights, v, grad, dw, dv, *strides, v.shape[3], v.shape[1], v.shape[2], **constants
    )  # fmt: skip


def _last_dim(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("foveate::local_mixture_forward", mutates_args=())
def local_mixture_forward(weights: Tensor, v: Tensor, kernel: list[int]) -> Tensor:
    """Return out as contiguous (B, H, W, heads, D)."""
    out = v.new_empty(v.shape)
    if out.numel():
        with on_device(v):
            launch_forward(weights.contiguous(), _last_dim(v), out, kernel)
    return out


@local_mixture_forward.register_fake
def _(weights, v, kernel):
    return v.new_empty(v.shape)


@torch.library.custom_op("foveate::local_mixture_backward", mutates_args=())
@without_autocast
def local_mixture_backward(weights: Tensor, v: Tensor, grad: Tensor, kernel: list[int]) -> tuple[Tensor, Tensor]:
    dw, dv = weights.new_empty(weights.shape), v.new_empty(v.shape)
    if v.numel():
        with on_device(v):
            launch_backward(weights.contiguous(), _last_dim(v), _last_dim(grad), dw, dv, kernel)
    return dw, dv


@local_mixture_backward.register_fake
def _(weights, v, grad, kernel):
    return weights.new_empty(weights.shape), v.new_empty(v.shape)


refuse_second_derivative(local_mixture_backward, "local_mixture")
call_backward = eager_backward(local_mixture_backward)


def _save(ctx, inputs, output) -> None:
    weights, v, ctx.kernel = inputs
    ctx.save_for_backward(weights, v)


def _differentiate(ctx, grad):
    return *call_backward(*ctx.saved_tensors, grad, ctx.kernel), None


call_forward = eager_forward(local_mixture_forward, _save, _differentiate)


def local_mixture(weights: Tensor, v: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Sum the values around every token, weighted: (B, H, W, heads, rows * cols) and (B, H, W, heads, D) -> as v.

    Places outside the map count as zeros. Differentiable once.
    """
    return call_forward(weights, v, list(kernel))  # type: ignore[return-value]  # one tensor
