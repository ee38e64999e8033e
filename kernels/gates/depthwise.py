"""Depthwise convolution with dilation (Triton), and the gradient of its taps, on channels-last maps.

Paper      Guo et al. 2022, arXiv:2202.09741 (VAN): the two depthwise convolutions of large kernel attention.
Tensors    x, out, grad: (B, C, H, W), channels last; taps: (rows * columns, C) fp32; zero padding keeps the size.
Grid       tiles of channels * tiles of spans (outputs of a row, `dilation` apart); for the taps' gradient, of rows.
Numerics   sums in fp32 in a fixed order, no atomics; one rounding on store.
Memory     the convolution reads x and writes out once; the gradient of the taps reads x and grad once, for the other
           rows of taps from the L1 cache, and writes (programs, rows * columns, C) fp32.

A thread keeps SPAN outputs of one row and slides over its inputs: an input is loaded and converted once for all outputs
of the span that it reaches, so a tap takes 1.6 instructions; where each output loads its inputs, it takes 4.2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv
from .plan import SPAN, TAPS, depthwise_tiles, taps_grad_tiles


@triton.jit
def _load(at, col, shift, in_rows, in_channels, width, C: tl.constexpr):
    """[lines, channels] fp32 of the column `shift` beside `col`, zero outside the map; `at` points to `col`."""
    here = in_rows & (col + shift >= 0) & (col + shift < width)
    return tl.load(at + shift * C, mask=here[:, None] & in_channels[None, :], other=0.0).to(tl.float32)


@triton.jit
def _finish(
    acc, addend_ptr, out_ptr, at, col, shift, valid, in_channels, width, C: tl.constexpr, HAS_ADDEND: tl.constexpr
):
    """Add the addend and store; returns zeros for what lies outside the map."""
    inside = (valid & (col + shift < width))[:, None] & in_channels[None, :]
    if HAS_ADDEND:
        acc += tl.load(addend_ptr + at + shift * C, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + shift * C, acc.to(out_ptr.dtype.element_ty), mask=inside)
    return tl.where(inside, acc, 0.0)


@triton.jit
def depthwise_kernel(
    x_ptr, taps_ptr, bias_ptr, addend_ptr, out_ptr, sums_ptr, spans, runs, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DILATION: tl.constexpr, SPAN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = convolution of x + bias + addend; sums: of out over the outputs of a program."""
    tl.static_assert(SPAN == 5)
    tiles = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    span = tl.program_id(0) // tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    valid, in_channels = span < spans, c < C
    line = span // (DILATION * runs)  # a row of an image
    row, col = line % height, span // DILATION % runs * (SPAN * DILATION) + span % DILATION
    at = (line.to(tl.int64) * width + col)[:, None] * C + c[None, :]
    acc0 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    if HAS_BIAS:
        acc0 += tl.load(bias_ptr + c, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    acc1, acc2, acc3, acc4 = acc0, acc0, acc0, acc0
    for tap_row in range(ROWS):
        down = (tap_row - ROWS // 2) * DILATION
        in_rows = valid & (row + down >= 0) & (row + down < height)
        x_at = x_ptr + at + down * width * C
        first = -(COLS // 2) * DILATION
        x0 = _load(x_at, col, first, in_rows, in_channels, width, C)
        x1 = _load(x_at, col, first + DILATION, in_rows, in_channels, width, C)
        x2 = _load(x_at, col, first + 2 * DILATION, in_rows, in_channels, width, C)
        x3 = _load(x_at, col, first + 3 * DILATION, in_rows, in_channels, width, C)
        for tap_col in tl.static_range(COLS):
            x4 = _load(x_at, col, first + (tap_col + 4) * DILATION, in_rows, in_channels, width, C)
            taps_at = taps_ptr + (tap_row * COLS + tap_col) * C + c[None, :]
            taps = tl.load(tl.broadcast_to(taps_at, BLOCK_S, BLOCK_C), mask=in_channels[None, :], other=0.0)
            acc0 += x0 * taps
            acc1 += x1 * taps
            acc2 += x2 * taps
            acc3 += x3 * taps
            acc4 += x4 * taps
            x0, x1, x2, x3 = x1, x2, x3, x4
    total = _finish(acc0, addend_ptr, out_ptr, at, col, 0, valid, in_channels, width, C, HAS_ADDEND)
    total += _finish(acc1, addend_ptr, out_ptr, at, col, DILATION, valid, in_channels, width, C, HAS_ADDEND)
    total += _finish(acc2, addend_ptr, out_ptr, at, col, 2 * DILATION, valid, in_channels, width, C, HAS_ADDEND)
    total += _finish(acc3, addend_ptr, out_ptr, at, col, 3 * DILATION, valid, in_channels, width, C, HAS_ADDEND)
    total += _finish(acc4, addend_ptr, out_ptr, at, col, 4 * DILATION, valid, in_channels, width, C, HAS_ADDEND)
    if HAS_SUMS:
        tl.store(sums_ptr + tl.program_id(0) // tiles * C + c, tl.sum(total, 0), mask=in_channels)


@triton.jit
def taps_grad_kernel(
    x_ptr, grad_ptr, sums_ptr, runs, turns, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DILATION: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of grad times the input at each tap, over `turns` tiles of runs: every `dilation`th token of a row."""
    tl.static_assert(TAPS == 7)
    tiles = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    part, in_channels = tl.program_id(0) // tiles, c < C
    for tap_row in range(ROWS):
        down = (tap_row - ROWS // 2) * DILATION
        for first in tl.static_range(0, COLS, TAPS):  # taps of a row, at most TAPS at a time
            left = (first - COLS // 2) * DILATION
            acc0 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            acc1, acc2, acc3, acc4, acc5, acc6 = acc0, acc0, acc0, acc0, acc0, acc0
            for turn in range(turns):
                run = (part * turns + turn) * BLOCK_R + tl.arange(0, BLOCK_R)
                line, start = run // DILATION, run % DILATION
                row = line % height + down
                in_rows = (run < runs) & (row >= 0) & (row < height)
                at = (line.to(tl.int64) * width + start)[:, None] * C + c[None, :]
                grad_at, x_at = grad_ptr + at, x_ptr + at + down * width * C
                x0 = _load(x_at, start, left, in_rows, in_channels, width, C)
                x1 = _load(x_at, start, left + DILATION, in_rows, in_channels, width, C)
                x2 = _load(x_at, start, left + 2 * DILATION, in_rows, in_channels, width, C)
                x3 = _load(x_at, start, left + 3 * DILATION, in_rows, in_channels, width, C)
                x4 = _load(x_at, start, left + 4 * DILATION, in_rows, in_channels, width, C)
                x5 = _load(x_at, start, left + 5 * DILATION, in_rows, in_channels, width, C)
                for col in tl.range(0, width, DILATION, loop_unroll_factor=4):
                    x6 = _load(x_at, start, left + 6 * DILATION + col, in_rows, in_channels, width, C)
                    grad = _load(grad_at, start, col, in_rows, in_channels, width, C)
                    acc0 += grad * x0
                    acc1 += grad * x1
                    acc2 += grad * x2
                    acc3 += grad * x3
                    acc4 += grad * x4
                    acc5 += grad * x5
                    acc6 += grad * x6
                    x0, x1, x2, x3, x4, x5 = x1, x2, x3, x4, x5, x6
            at = sums_ptr + ((part * ROWS + tap_row) * COLS + first) * C + c
            _store_tap(at, acc0, in_channels, 0, COLS - first, C)
            _store_tap(at, acc1, in_channels, 1, COLS - first, C)
            _store_tap(at, acc2, in_channels, 2, COLS - first, C)
            _store_tap(at, acc3, in_channels, 3, COLS - first, C)
            _store_tap(at, acc4, in_channels, 4, COLS - first, C)
            _store_tap(at, acc5, in_channels, 5, COLS - first, C)
            _store_tap(at, acc6, in_channels, 6, COLS - first, C)


@triton.jit
def _store_tap(ptr, acc, in_channels, TAP: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    if TAP < COUNT:
        tl.store(ptr + TAP * C, tl.sum(acc, 0), mask=in_channels)


def trimmed(size: Sequence[int], taps: Sequence[int], dilation: int) -> tuple[int, int]:
    """(rows, columns) of taps at each end that lie outside a map of this size for all of its tokens."""
    rows, cols = (max(tap // 2 - (length - 1) // dilation, 0) for tap, length in zip(taps, size, strict=True))
    return rows, cols


def launch_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, out: Tensor, addend: Tensor | None = None,
    back: bool = False, sums: bool = False,
) -> Tensor | None:  # fmt: skip
    """Convolve; maps channels last, weight (C, 1, rows, columns), bias (C,).

    Args:
        addend: a map that is added to the result.
        back: convolve with the taps in reverse order: the gradient of a convolution's input from that of its output.
        sums: return the sums of the result over all tokens, (C,) fp32.
    """
    batch, channels, height, width = x.shape
    rows, cols = trimmed((height, width), weight.shape[2:], dilation)
    weight = weight[:, :, rows : weight.shape[2] - rows, cols : weight.shape[3] - cols]
    taps = (weight.flip(2, 3) if back else weight).flatten(1).t().float().contiguous()
    block_s, block_c, warps = depthwise_tiles(channels)
    runs = cdiv(width, SPAN * dilation)
    spans = batch * height * runs * dilation
    programs = cdiv(spans, block_s)
    parts = x.new_empty(programs, channels, dtype=torch.float32) if sums else None
    depthwise_kernel[(programs * cdiv(channels, block_c),)](
        x, taps, taps if bias is None else bias.contiguous(), x if addend is None else addend, out,
        taps if parts is None else parts, spans, runs, height, width,
        C=channels, ROWS=weight.shape[2], COLS=weight.shape[3], DILATION=dilation, SPAN=SPAN,
        HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, HAS_SUMS=sums,
        BLOCK_S=block_s, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return None if parts is None else parts.sum(0)


def launch_taps_grad(x: Tensor, grad: Tensor, taps: Sequence[int], dilation: int) -> Tensor:
    """The gradient of a convolution's weight, (C, 1, *taps) fp32, from its input and the gradient of its output."""
    batch, channels, height, width = x.shape
    rows, cols = trimmed((height, width), taps, dilation)
    seen = (taps[0] - 2 * rows, taps[1] - 2 * cols)
    block_r, block_c, warps = depthwise_tiles(channels)
    runs = batch * height * dilation
    programs, turns = taps_grad_tiles(runs, channels)
    parts = x.new_empty(programs, seen[0] * seen[1], channels, dtype=torch.float32)
    taps_grad_kernel[(programs * cdiv(channels, block_c),)](
        x, grad, parts, runs, turns, height, width,
        C=channels, ROWS=seen[0], COLS=seen[1], DILATION=dilation, TAPS=TAPS,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return F.pad(parts.sum(0).t().reshape(channels, 1, *seen), (cols, cols, rows, rows))
