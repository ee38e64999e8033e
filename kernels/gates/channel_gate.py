"""Efficient channel attention (Triton): a gate for every channel, from the means of the channels beside it.

Paper      Wang et al. 2020, arXiv:1910.03151 (ECA-Net), figure 2.
Tensors    x, out: (B, C, H, W) of any strides; weight: (1, 1, k). Sums over a map: (B, C) fp32.
Grid       B * tiles of channels * chunks (sums) or tiles (gating) of pixels; a program computes the gates it needs.
Numerics   sums and gates in fp32, sums in two stages of fixed order; one rounding on store.
Memory     forward reads x twice and writes once; backward reads x once and grad twice, and writes once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import (
    cdiv,
    eager_backward,
    eager_forward,
    on_device,
    power_of_2,
    refuse_second_derivative,
    token_steps,
    without_autocast,
)
from .plan import ChannelGateTiles, channel_gate_tiles


@triton.jit
def _pixels(ptr, strides, image, c, p, WIDTH: tl.constexpr):
    """Pointers [channels, pixels] into (B, C, H, W), WIDTH pixels a row; 1 where no pixel needs a division."""
    if WIDTH == 1:
        pixel = p * strides[2]
    else:
        pixel = p // WIDTH * strides[2] + p % WIDTH * strides[3]
    return ptr + image.to(tl.int64) * strides[0] + ((c * strides[1])[:, None] + pixel[None, :])


@triton.jit
def sums_kernel(
    x_ptr, y_ptr, out_ptr, x_strides, y_strides, channels, pixels, chunk, chunks,
    X_WIDTH: tl.constexpr, Y_WIDTH: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of x, or of x * y where PRODUCT, over a chunk of the pixels."""
    tiles = tl.cdiv(channels, BLOCK_C)
    part, tile = tl.program_id(0) % chunks, tl.program_id(0) // chunks % tiles
    image = tl.program_id(0) // (chunks * tiles)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, pixels), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (c < channels)[:, None] & (p < pixels)[None, :]
        x = tl.load(_pixels(x_ptr, x_strides, image, c, p, X_WIDTH), mask=mask, other=0.0).to(tl.float32)  # [C, P]
        if PRODUCT:
            x *= tl.load(_pixels(y_ptr, y_strides, image, c, p, Y_WIDTH), mask=mask, other=0.0).to(tl.float32)
        acc += x
    out_ptr += (image * chunks + part).to(tl.int64) * channels
    tl.store(out_ptr + c, tl.sum(acc, 1), mask=c < channels)


@triton.jit
def _beside(ptr, image, c, channels):
    """Values (B, C) of channels c, zero outside the map's channels."""
    return tl.load(ptr + image * channels + c, mask=(c >= 0) & (c < channels), other=0.0)


@triton.jit
def _gates(sums_ptr, weight_ptr, image, c, channels, pixels, K: tl.constexpr):
    """Gates of channels c: a convolution over means, and a sigmoid."""
    z = tl.zeros(c.shape, tl.float32)
    for tap in tl.static_range(K):
        weight = tl.load(weight_ptr + tap).to(tl.float32)
        z += weight * _beside(sums_ptr, image, c + (tap - K // 2), channels)
    return tl.sigmoid(z / pixels)


@triton.jit
def gate_kernel(
    x_ptr, sums_ptr, weight_ptr, dz_ptr, out_ptr, x_strides, out_strides, channels, pixels,
    X_WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, K: tl.constexpr, BACK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = x * gate. Where BACK, x is the output's gradient, and the gradient through the means is added."""
    tiles = tl.cdiv(channels, BLOCK_C)
    parts = tl.cdiv(pixels, BLOCK_P)
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts % tiles
    image = tl.program_id(0) // (parts * tiles)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (c < channels)[:, None] & (p < pixels)[None, :]
    x = tl.load(_pixels(x_ptr, x_strides, image, c, p, X_WIDTH), mask=mask, other=0.0).to(tl.float32)  # [C, P]
    out = x * _gates(sums_ptr, weight_ptr, image, c, channels, pixels, K)[:, None]
    if BACK:
        dmean = tl.zeros((BLOCK_C,), tl.float32)
        for tap in tl.static_range(K):
            weight = tl.load(weight_ptr + tap).to(tl.float32)
            dmean += weight * _beside(dz_ptr, image, c - (tap - K // 2), channels)
        out += (dmean / pixels)[:, None]
    tl.store(_pixels(out_ptr, out_strides, image, c, p, OUT_WIDTH), out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def logits_grad_kernel(
    sums_ptr, products_ptr, weight_ptr, dz_ptr, dweight_ptr, channels, pixels,
    K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates' logits (B, C), and of the weight from one tile of channels of one image."""
    tiles = tl.cdiv(channels, BLOCK_C)
    image = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = _gates(sums_ptr, weight_ptr, image, c, channels, pixels, K)
    dz = _beside(products_ptr, image, c, channels) * gate * (1 - gate)  # zero past the channels
    tl.store(dz_ptr + image * channels + c, dz, mask=c < channels)
    for tap in tl.static_range(K):
        mean = _beside(sums_ptr, image, c + (tap - K // 2), channels) / pixels
        tl.store(dweight_ptr + tl.program_id(0) * K + tap, tl.sum(dz * mean, 0))


def map_strides(x: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the strides of (B, C, H, W) and WIDTH, as `_pixels` takes them."""
    row, col, width = token_steps(x, 2)
    return (x.stride(0), x.stride(1), row, col), width


def tiles_of(x: Tensor) -> ChannelGateTiles:
    batch, channels, height, width = x.shape
    return channel_gate_tiles(batch, channels, height * width, x.stride(1) == 1)


def launch_sums(x: Tensor, y: Tensor | None, tiles: ChannelGateTiles) -> Tensor:
    """Sums of x, or of x * y, over all pixels: (B, C) fp32."""
    batch, channels, height, width = x.shape
    parts = x.new_empty(batch, tiles.chunks, channels, dtype=torch.float32)
    other = x if y is None else y
    (x_strides, x_width), (other_strides, other_width) = map_strides(x), map_strides(other)
    sums_kernel[(batch * cdiv(channels, tiles.channels) * tiles.chunks,)](
        x, other, parts, x_strides, other_strides, channels, height * width, tiles.chunk, tiles.chunks,
        X_WIDTH=x_width, Y_WIDTH=other_width, PRODUCT=y is not None,
        BLOCK_C=tiles.channels, BLOCK_P=tiles.pixels, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return parts.sum(1)


def launch_gate(
    x: Tensor, sums: Tensor, weight: Tensor, dz: Tensor | None, out: Tensor, tiles: ChannelGateTiles
) -> None:
    batch, channels, height, width = x.shape
    programs = batch * cdiv(channels, tiles.channels) * cdiv(height * width, tiles.pixels)
    (x_strides, x_width), (out_strides, out_width) = map_strides(x), map_strides(out)
    gate_kernel[(programs,)](
        x, sums, weight, sums if dz is None else dz, out, x_strides, out_strides,
        channels, height * width,
        X_WIDTH=x_width, OUT_WIDTH=out_width, K=weight.shape[-1], BACK=dz is not None,
        BLOCK_C=tiles.channels, BLOCK_P=tiles.pixels, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def launch_logits_grad(x: Tensor, sums: Tensor, products: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the gates' logits (B, C), and of the weight, both fp32."""
    batch, channels, height, width = x.shape
    block = min(power_of_2(channels), 1024)
    programs = batch * cdiv(channels, block)
    dz, dweight = sums.new_empty(batch, channels), sums.new_empty(programs, weight.shape[-1])
    logits_grad_kernel[(programs,)](
        sums, products, weight, dz, dweight, channels, height * width,
        K=weight.shape[-1], BLOCK_C=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return dz, dweight.sum(0).view(weight.shape)


@torch.library.custom_op("foveate::channel_gate_forward", mutates_args=())
def channel_gate_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gated map, with the strides of x where x is dense, and its sums over pixels (B, C) fp32."""
    if not x.numel():
        return _empty_results(x)
    out = torch.empty_like(x)
    tiles = tiles_of(x)
    with on_device(x):
        sums = launch_sums(x, None, tiles)
        launch_gate(x, sums, weight.contiguous(), None, out, tiles)
    return out, sums


@channel_gate_forward.register_fake
def _(x, weight):
    return _empty_results(x)


def _empty_results(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("foveate::channel_gate_backward", mutates_args=())
@without_autocast
def channel_gate_backward(x: Tensor, weight: Tensor, sums: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, with the strides of x where x is dense, and of the weight."""
    dx, weight = torch.empty_like(x), weight.contiguous()
    if not x.numel():
        return dx, torch.zeros_like(weight)
    tiles = tiles_of(x)
    with on_device(x):
        dz, dweight = launch_logits_grad(x, sums, launch_sums(x, grad, tiles), weight)
        launch_gate(grad, sums, weight, dz, dx, tiles)
    return dx, dweight.to(weight.dtype)


@channel_gate_backward.register_fake
def _(x, weight, sums, grad):
    return torch.empty_like(x), torch.empty_like(weight, memory_format=torch.contiguous_format)


refuse_second_derivative(channel_gate_backward, "channel_gate")
call_backward = eager_backward(channel_gate_backward)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad, _):
    return call_backward(*ctx.saved_tensors, grad)


channel_gate = eager_forward(channel_gate_forward, _save, _backward)
