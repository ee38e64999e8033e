"""Large kernel attention, inference (Triton): the dilated convolution, the pointwise one and the gate at once.

Paper      Guo et al. 2022, arXiv:2202.09741 (VAN), figure 2; the local convolution before it is torch's.
Tensors    x, y, out: (B, C, H, W), channels last; y is the local convolution of x. taps: (rows * columns, C).
Grid       tiles of pixels of all images; a program owns all channels of its pixels, so no tap is counted twice.
Numerics   taps and products in fp32; the dilated convolution is rounded once to the map's type for tensor cores.
Memory     reads x, y and writes out once, where a chain of convolutions moves the map seven times after the local one.

The two depthwise convolutions are not fused: a program cannot address the values of other threads by offset on chip, so
each of the 49 dilated taps would recompute the 25 local ones (1225 products instead of 74). Fusing the end of the chain
saves as many passes over the map, and two more. It has not been timed against cuDNN.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._launch import dot_precision, on_device
from .plan import large_kernel_tiles


@triton.jit
def dilated_gate_kernel(
    x_ptr, y_ptr, taps_ptr, taps_bias_ptr, weight_ptr, bias_ptr, out_ptr, pixels, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    row, col = (p // width % height).to(tl.int32), (p % width).to(tl.int32)
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        gate = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
        gate += tl.load(taps_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        for tap_row in range(ROWS):
            down = (tap_row - ROWS // 2) * DILATION
            for tap_col in tl.static_range(COLS):
                right = (tap_col - COLS // 2) * DILATION
                inside = (row + down >= 0) & (row + down < height) & (col + right >= 0) & (col + right < width)
                mask = (inside & (p < pixels))[:, None] & (c < C)[None, :]
                y_offs = (p + down * width + right)[:, None] * C + c[None, :]
                y = tl.load(y_ptr + y_offs, mask=mask, other=0.0).to(tl.float32)  # [P, K]
                taps = tl.load(taps_ptr + (tap_row * COLS + tap_col) * C + c, mask=c < C, other=0.0).to(tl.float32)
                gate += y * taps[None, :]
        inside_weight = (c < C)[:, None] & (n < C)[None, :]
        weight = tl.load(weight_ptr + n[None, :] * C + c[:, None], mask=inside_weight, other=0.0)  # [K, N]
        acc = tl.dot(gate.to(weight.dtype), weight, acc, input_precision=PRECISION)  # [P, N]
    mask = (p < pixels)[:, None] & (n < C)[None, :]
    acc += tl.load(bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
    out = tl.load(x_ptr + p[:, None] * C + n[None, :], mask=mask, other=0.0).to(tl.float32) * acc
    tl.store(out_ptr + p[:, None] * C + n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def launch_dilated_gate(x, y, taps, taps_bias, weight, bias, dilation: int, out) -> None:
    """All maps channels last; taps (C, 1, rows, columns), weight (C, C, 1, 1), biases (C,)."""
    batch, channels, height, width = x.shape
    block_p, block_k, block_n, warps = large_kernel_tiles(channels, x.itemsize)
    dilated_gate_kernel[(triton.cdiv(batch * height * width, block_p),)](
        x, y, taps.flatten(1).t().contiguous(), taps_bias.contiguous(),
        weight.flatten(1).contiguous(), bias.contiguous(), out,
        batch * height * width, height, width,
        C=channels, ROWS=taps.shape[2], COLS=taps.shape[3], DILATION=dilation,
        BLOCK_P=block_p, BLOCK_K=block_k, BLOCK_N=block_n, PRECISION=dot_precision(x.dtype),
        num_warps=warps, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


@torch.library.custom_op("foveate::large_kernel_gate", mutates_args=())
def large_kernel_gate(
    x: Tensor, y: Tensor, taps: Tensor, taps_bias: Tensor, weight: Tensor, bias: Tensor, dilation: int
) -> Tensor:
    """Return x * point(dilated(y)), channels last. Maps and weights of one type; it has no gradient."""
    out = _empty_result(x)
    if x.numel():
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        with on_device(x):
            launch_dilated_gate(x, y, taps, taps_bias, weight, bias, dilation, out)
    return out


@large_kernel_gate.register_fake
def _(x, y, taps, taps_bias, weight, bias, dilation):
    return _empty_result(x)


def _empty_result(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    dilation: int,
) -> Tensor:
    """Return the gated map, channels last. An NCHW map is copied once."""
    channels = x.shape[1]
    x = x.contiguous(memory_format=torch.channels_last)
    padding = [side // 2 for side in local_weight.shape[2:]]
    y = F.conv2d(x, local_weight, local_bias, padding=padding, groups=channels)
    biases = [x.new_zeros(channels) if bias is None else bias for bias in (dilated_bias, point_bias)]
    return large_kernel_gate(x, y, dilated_weight, biases[0], point_weight, biases[1], dilation)
