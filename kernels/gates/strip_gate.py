"""Efficient local attention (Triton): a gate for every row and every column of a map.

Paper      Xu and Wan 2024, arXiv:2403.01123 (ELA).
Tensors    x, out: (B, C, H, W) of any strides; strips (sums or gates of rows, of columns): (B, C, H), (B, C, W) fp32.
Grid       B * tiles of channels * tiles of rows * tiles of columns; a program sums or gates one tile.
Numerics   sums, convolution, norm and gates in fp32, sums in two stages of fixed order; one rounding on store.
Memory     forward reads x twice and writes once; backward reads x once and grad twice, and writes once. The strips are
           (H + W) / (H * W) of a map: torch convolves and normalizes them.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, eager_backward, eager_forward, on_device, refuse_second_derivative, without_autocast
from .norm import StripNorm
from .plan import strip_gate_tiles

TURNS = 4  # tiles of rows that one program sums, so that it writes 25 % of the sums of columns


@triton.jit
def _tile(
    TURNS: tl.constexpr, channels, height, width, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Which image, and first channel, row and column this program starts at; and how many tiles of rows and columns."""
    columns, rows = tl.cdiv(width, BLOCK_W), tl.cdiv(height, BLOCK_H * TURNS)
    pid = tl.program_id(0)
    across, down = pid % columns, pid // columns % rows
    tiles = tl.cdiv(channels, BLOCK_C)
    c = pid // (columns * rows) % tiles * BLOCK_C
    return (pid // (columns * rows * tiles)).to(tl.int64), c, down, across, rows, columns


@triton.jit
def _at(ptr, strides, image, c, h, w, ALIGN: tl.constexpr):
    """Pointers [channels, rows, columns] into (B, C, H, W); rows lie strides[2] * ALIGN apart."""
    row = h * (strides[2] * ALIGN)
    here = (c * strides[1])[:, None, None] + row[None, :, None] + (w * strides[3])[None, None, :]
    return ptr + image * strides[0] + here


@triton.jit
def sums_kernel(
    x_ptr, y_ptr, row_gates_ptr, col_gates_ptr, rows_ptr, cols_ptr, x_strides, y_strides, channels, height, width_units,
    ALIGN: tl.constexpr, BACK: tl.constexpr, TURNS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums of rows and of columns of x; where BACK, of x * y times the other strip's gates."""
    width = width_units * ALIGN  # so that the compiler knows what divides it, and reads as much at a time
    image, c, down, across, tiles_h, tiles_w = _tile(TURNS, channels, height, width, BLOCK_C, BLOCK_H, BLOCK_W)
    c += tl.arange(0, BLOCK_C)
    w = across * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = (c < channels)[:, None] & (w < width)[None, :]
    cols = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    if BACK:
        row_gates_ptr += image * channels * height
        col_gates_ptr += image * channels * width
        col_gates = tl.load(col_gates_ptr + c[:, None] * width + w[None, :], mask=mask_w, other=0.0)  # [C, W]
    rows_ptr += image * channels * tiles_w * height  # (B, C, tiles of columns, H)
    for turn in range(TURNS):
        h = (down * TURNS + turn) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_h = (c < channels)[:, None] & (h < height)[None, :]
        mask = mask_h[:, :, None] & (w < width)[None, None, :]
        x = tl.load(_at(x_ptr, x_strides, image, c, h, w, ALIGN), mask=mask, other=0.0).to(tl.float32)  # [C, H, W]
        if BACK:
            x *= tl.load(_at(y_ptr, y_strides, image, c, h, w, ALIGN), mask=mask, other=0.0).to(tl.float32)
            row_gates = tl.load(row_gates_ptr + c[:, None] * height + h[None, :], mask=mask_h, other=0.0)  # [C, H]
            rows = tl.sum(x * col_gates[:, None, :], 2)
            cols += tl.sum(x * row_gates[:, :, None], 1)
        else:
            rows = tl.sum(x, 2)
            cols += tl.sum(x, 1)
        tl.store(rows_ptr + (c * tiles_w + across)[:, None] * height + h[None, :], rows, mask=mask_h)
    cols_ptr += image * channels * tiles_h * width  # (B, C, tiles of rows, W)
    tl.store(cols_ptr + (c * tiles_h + down)[:, None] * width + w[None, :], cols, mask=mask_w)


@triton.jit
def gate_kernel(
    x_ptr, row_gates_ptr, col_gates_ptr, row_grads_ptr, col_grads_ptr, out_ptr, x_strides, out_strides,
    channels, height, width_units,
    ALIGN: tl.constexpr, BACK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out = x * row gate * column gate. Where BACK, x is the gradient of out, and the strips' gradients are added."""
    width = width_units * ALIGN
    image, c, down, across, _, _ = _tile(1, channels, height, width, BLOCK_C, BLOCK_H, BLOCK_W)
    c += tl.arange(0, BLOCK_C)
    h = down * BLOCK_H + tl.arange(0, BLOCK_H)
    w = across * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_h = (c < channels)[:, None] & (h < height)[None, :]
    mask_w = (c < channels)[:, None] & (w < width)[None, :]
    mask = mask_h[:, :, None] & (w < width)[None, None, :]
    rows, cols = image * channels * height, image * channels * width
    rows_at, cols_at = c[:, None] * height + h[None, :], c[:, None] * width + w[None, :]
    x = tl.load(_at(x_ptr, x_strides, image, c, h, w, ALIGN), mask=mask, other=0.0).to(tl.float32)  # [C, H, W]
    row_gates = tl.load(row_gates_ptr + rows + rows_at, mask=mask_h, other=0.0)
    col_gates = tl.load(col_gates_ptr + cols + cols_at, mask=mask_w, other=0.0)
    out = x * row_gates[:, :, None] * col_gates[:, None, :]
    if BACK:
        out += (tl.load(row_grads_ptr + rows + rows_at, mask=mask_h, other=0.0) / width)[:, :, None]
        out += (tl.load(col_grads_ptr + cols + cols_at, mask=mask_w, other=0.0) / height)[:, None, :]
    tl.store(_at(out_ptr, out_strides, image, c, h, w, ALIGN), out.to(out_ptr.dtype.element_ty), mask=mask)


class Strips(NamedTuple):
    """One number for every row, and one for every column: (B, C, H) and (B, C, W), fp32."""

    rows: Tensor
    cols: Tensor


def _launch(kernel, x: Tensor, other: Tensor, turns: int, *tensors: Tensor, **constants) -> None:
    """Launch on tiles of x; `other` is the second map that the kernel takes, whose strides it gets too."""
    batch, channels, height, width = x.shape
    block_c, block_h, block_w = strip_gate_tiles(channels, height, width, x.stride(1) == 1)
    tiles = cdiv(channels, block_c) * cdiv(height, block_h * turns) * cdiv(width, block_w)
    align = math.gcd(8, width, x.stride(2), other.stride(2))
    strides = [(m.stride(0), m.stride(1), m.stride(2) // align, m.stride(3)) for m in (x, other)]
    blocks = {"BLOCK_C": block_c, "BLOCK_H": block_h, "BLOCK_W": block_w, "ALIGN": align}
    with on_device(x):
        kernel[(batch * tiles,)](
            *tensors,
            *strides,
            channels,
            height,
            width // align,
            **constants,
            **blocks,
            num_warps=8,
            enable_fp_fusion=True,
        )


def launch_sums(x: Tensor, y: Tensor | None = None, gates: Strips | None = None) -> Strips:
    """Sums of the rows and of the columns of x; given y and gates, of x * y times the other strip's gates."""
    batch, channels, height, width = x.shape
    _, block_h, block_w = strip_gate_tiles(channels, height, width, x.stride(1) == 1)
    rows = x.new_empty(batch, channels, cdiv(width, block_w), height, dtype=torch.float32)
    cols = x.new_empty(batch, channels, cdiv(height, block_h * TURNS), width, dtype=torch.float32)
    other, used = (x, (rows, cols)) if y is None or gates is None else (y, _contiguous(gates))
    _launch(sums_kernel, x, other, TURNS, x, other, *used, rows, cols, BACK=y is not None, TURNS=TURNS)
    return Strips(rows.sum(2), cols.sum(2))


def launch_gate(x: Tensor, gates: Strips, grads: Strips | None, out: Tensor) -> None:
    gates = _contiguous(gates)
    used = gates if grads is None else _contiguous(grads)
    _launch(gate_kernel, x, out, 1, x, *gates, *used, out, BACK=grads is not None)


def _contiguous(strips: Strips) -> Strips:
    """torch's convolution lays strips out by the strides of its weight."""
    return Strips(strips.rows.contiguous(), strips.cols.contiguous())


@torch.library.custom_op("foveate::strip_gate_forward", mutates_args=())
def strip_gate_forward(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated map, with the strides of x where x is dense, and the means of rows and of columns, fp32."""
    out, rows, cols = _empty_results(x)
    if x.numel():
        norm = StripNorm(weight, norm_weight, norm_bias, norm_groups, eps)
        sums = launch_sums(x)
        rows, cols = sums.rows / x.shape[3], sums.cols / x.shape[2]
        launch_gate(x, Strips(norm.gate(rows), norm.gate(cols)), None, out)
    return out, rows, cols


@strip_gate_forward.register_fake
def _(x, weight, norm_weight, norm_bias, norm_groups, eps):
    return _empty_results(x)


def _empty_results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = ([x.shape[0], x.shape[1], x.shape[axis]] for axis in (2, 3))
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(cols, dtype=torch.float32)


@torch.library.custom_op("foveate::strip_gate_backward", mutates_args=())
@without_autocast
def strip_gate_backward(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    rows: Tensor,
    cols: Tensor,
    grad: Tensor,
    norm_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (with its strides where dense), of the weight, the norm's weight and its bias."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, *(
            torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (weight, norm_weight, norm_bias)
        )
    norm = StripNorm(weight, norm_weight, norm_bias, norm_groups, eps)
    gates = Strips(norm.gate(rows), norm.gate(cols))
    dgates = launch_sums(x, grad, gates)
    (drows, *of_rows), (dcols, *of_cols) = norm.grads(rows, dgates.rows), norm.grads(cols, dgates.cols)
    launch_gate(grad, gates, Strips(drows, dcols), dx)
    sums = [(a + b).contiguous() for a, b in zip(of_rows, of_cols, strict=True)]
    return dx, sums[0].to(weight.dtype), sums[1].to(norm_weight.dtype), sums[2].to(norm_bias.dtype)


@strip_gate_backward.register_fake
def _(x, weight, norm_weight, norm_bias, rows, cols, grad, norm_groups, eps):
    parameters = (weight, norm_weight, norm_bias)
    return torch.empty_like(x), *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in parameters)


refuse_second_derivative(strip_gate_backward, "strip_gate")
call_backward = eager_backward(strip_gate_backward)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.norm_groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad, *_):
    return *call_backward(*ctx.saved_tensors, grad, ctx.norm_groups, ctx.eps), None, None


strip_gate = eager_forward(strip_gate_forward, _save, _backward)
