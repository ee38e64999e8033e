"""Large kernel attention (Triton): two depthwise convolutions, then the pointwise one and the gate at once.

Paper      Guo et al. 2022, arXiv:2202.09741 (VAN), figure 2.
Tensors    x, y, g, out, grad: (B, C, H, W), channels last; y: the local convolution of x, g: the dilated one of y.
Grid       gate: tiles of pixels of all images; a program owns all channels of its pixels. Convolutions: depthwise.py.
Numerics   sums and products in fp32; y, g and the gradients of both are rounded once to the map's type, as by torch.
Memory     forward reads x twice, y and g once, and writes y, g and out. Backward moves the map 17 times, a chain of
           torch's operations 24 times. y and g are kept for the backward pass; the gate's logits are computed again.

Backward on paper, with the arithmetic of benchmarks/roofline.py: H100, bf16, batch 128, 64 x 56x56, machine code of
Triton 3.8: 551 us. Gate 92, inputs of the convolutions 132 and 79, their taps 144 and 73, pointwise weight 31. A chain
of torch's operations needs 368 us to move its maps, and 456 us if a convolution took one instruction a tap, the least
that fp32 sums allow; torch's own depthwise kernel takes about ten. Instructions for each number differ by less than
20 % on VAN's smaller maps, and taps outside a 7x7 map are left out, so there is no choice by size. Not timed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import (
    cdiv,
    dot_precision,
    eager_backward,
    eager_forward,
    on_device,
    refuse_second_derivative,
    without_autocast,
)
from .depthwise import launch_depthwise, launch_taps_grad
from .plan import large_kernel_tiles


@triton.jit
def _gate_logits(
    g_ptr, weight_ptr, bias_ptr, p, n, pixels, C: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[pixels, channels]: the pointwise convolution of g."""
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        g = tl.load(g_ptr + p[:, None] * C + c[None, :], mask=(p < pixels)[:, None] & (c < C)[None, :], other=0.0)
        inside_weight = (c < C)[:, None] & (n < C)[None, :]
        weight = tl.load(weight_ptr + n[None, :] * C + c[:, None], mask=inside_weight, other=0.0)  # [K, N]
        acc = tl.dot(g, weight, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def large_kernel_gate_kernel(
    x_ptr, g_ptr, weight_ptr, bias_ptr, out_ptr, pixels, C: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    logits = _gate_logits(g_ptr, weight_ptr, bias_ptr, p, n, pixels, C, HAS_BIAS, BLOCK_P, BLOCK_K, BLOCK_N, PRECISION)
    mask, at = (p < pixels)[:, None] & (n < C)[None, :], p[:, None] * C + n[None, :]
    out = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * logits
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def large_kernel_gate_grad_kernel(
    x_ptr, g_ptr, weight_ptr, bias_ptr, grad_ptr, dx_ptr, dlogits_ptr, dg_ptr, dbias_ptr, dg_sums_ptr, pixels,
    C: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x through the gate's product, of the logits and of g; sums of the last two over the pixels."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    logits = _gate_logits(g_ptr, weight_ptr, bias_ptr, p, n, pixels, C, HAS_BIAS, BLOCK_P, BLOCK_K, BLOCK_N, PRECISION)
    mask, at = (p < pixels)[:, None] & (n < C)[None, :], p[:, None] * C + n[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, (grad * logits).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dlogits_ptr + at, (grad * x).to(dlogits_ptr.dtype.element_ty), mask=mask)
    sums_at = tl.program_id(0) * C + n
    tl.store(dbias_ptr + sums_at, tl.sum(grad * x, 0), mask=n < C)

    dg = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        here, inside = p[:, None] * C + c[None, :], (p < pixels)[:, None] & (c < C)[None, :]
        dlogits = tl.load(grad_ptr + here, mask=inside, other=0.0).to(tl.float32)  # computed again: other threads
        dlogits *= tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)  # hold what was stored
        inside_weight = (c < C)[:, None] & (n < C)[None, :]
        weight = tl.load(weight_ptr + c[:, None] * C + n[None, :], mask=inside_weight, other=0.0)  # [K, N]
        dg = tl.dot(dlogits.to(weight.dtype), weight, dg, input_precision=PRECISION)  # [P, N]
    tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(dg_sums_ptr + sums_at, tl.sum(dg, 0), mask=n < C)


def _gate_constants(x: Tensor, bias: Tensor | None, grad: bool = False) -> dict[str, Any]:
    block_p, block_k, block_n, warps = large_kernel_tiles(x.shape[1], x.itemsize, grad)
    return {
        "C": x.shape[1], "HAS_BIAS": bias is not None, "BLOCK_P": block_p, "BLOCK_K": block_k, "BLOCK_N": block_n,
        "PRECISION": dot_precision(x.dtype), "num_warps": warps, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def launch_gate(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x * (weight g + bias); maps channels last, weight (C, C, 1, 1), bias (C,)."""
    constants, pixels = _gate_constants(x, bias), x.numel() // x.shape[1]
    weight, bias = weight.flatten(1).contiguous(), x if bias is None else bias.contiguous()
    large_kernel_gate_kernel[(cdiv(pixels, constants["BLOCK_P"]),)](x, g, weight, bias, out, pixels, **constants)


def launch_gate_grad(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, dx: Tensor, dlogits: Tensor, dg: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradients of x, of the gate's logits and of g; return the sums of the last two, (C,) fp32."""
    constants, (pixels, channels) = _gate_constants(x, bias, grad=True), (x.numel() // x.shape[1], x.shape[1])
    weight, bias = weight.flatten(1).contiguous(), x if bias is None else bias.contiguous()
    programs = cdiv(pixels, constants["BLOCK_P"])
    sums = x.new_empty(2, programs, channels, dtype=torch.float32)
    large_kernel_gate_grad_kernel[(programs,)](
        x, g, weight, bias, grad, dx, dlogits, dg, sums[0], sums[1], pixels, **constants
    )
    dbias, dg_sums = sums.sum(1)
    return dbias, dg_sums


@torch.library.custom_op("foveate::large_kernel_attention_forward", mutates_args=())
def large_kernel_attention_forward(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated map, the local convolution of x and the dilated one of that, channels last.

    Map and weights of one type. An NCHW map is copied once.
    """
    out, y, g = (_empty_like(x) for _ in range(3))
    if x.numel():
        x = _channels_last(x)
        with on_device(x):
            launch_depthwise(x, local_weight, local_bias, 1, y)
            launch_depthwise(y, dilated_weight, dilated_bias, dilation, g)
            launch_gate(x, g, point_weight, point_bias, out)
    return out, y, g


@large_kernel_attention_forward.register_fake
def _(x, *_):
    return tuple(_empty_like(x) for _ in range(3))


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("foveate::large_kernel_attention_backward", mutates_args=())
@without_autocast
def large_kernel_attention_backward(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    y: Tensor,
    g: Tensor,
    grad: Tensor,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, channels last, and of the weights and biases; an empty tensor for a bias of None."""
    weights = (local_weight, local_bias, dilated_weight, dilated_bias, point_weight, point_bias)
    grads = _empty_grads(x, *weights)
    dx, dweights = grads[0], grads[1:]
    if not x.numel():
        for dweight in dweights:
            dweight.zero_()
        return grads
    x, grad = _channels_last(x), _channels_last(grad)
    gate_dx, dlogits, dg, dy = (_empty_like(x) for _ in range(4))
    with on_device(x):
        dpoint_bias, ddilated_bias = launch_gate_grad(x, g, point_weight, point_bias, grad, gate_dx, dlogits, dg)
        dlocal_bias = launch_depthwise(dg, dilated_weight, None, dilation, dy, back=True, sums=True)
        launch_depthwise(dy, local_weight, None, 1, dx, addend=gate_dx, back=True)
        ddilated = launch_taps_grad(y, dg, dilated_weight.shape[2:], dilation)
        dlocal = launch_taps_grad(x, dy, local_weight.shape[2:], 1)
    by_pixel = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (dlogits, g)]  # (pixels, C)
    dpoint = torch.mm(by_pixel[0].t(), by_pixel[1])
    found = (dlocal, dlocal_bias, ddilated, ddilated_bias, dpoint, dpoint_bias)
    for dweight, sums in zip(dweights, found, strict=True):
        if dweight.numel() and sums is not None:
            dweight.copy_(sums.view(dweight.shape))
    return grads


@large_kernel_attention_backward.register_fake
def _(x, *others):
    return _empty_grads(x, *others[:6])


def _empty_grads(x: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    local, local_bias, dilated, dilated_bias, point, point_bias = (
        x.new_empty(0 if weight is None else weight.shape) for weight in weights
    )
    return _empty_like(x), local, local_bias, dilated, dilated_bias, point, point_bias


refuse_second_derivative(large_kernel_attention_backward, "large_kernel_attention")
call_backward = eager_backward(large_kernel_attention_backward)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # y and g are results for the backward pass only
    ctx.dilation = inputs[-1]
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _backward(ctx, grad, *_):
    saved = ctx.saved_tensors
    grads = call_backward(*saved, torch.zeros_like(saved[0]) if grad is None else grad, ctx.dilation)
    return *(None if given is None else found for given, found in zip(saved[:7], grads, strict=True)), None


call_forward = eager_forward(large_kernel_attention_forward, _save, _backward)


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
    """Return the gated map, channels last; differentiable once."""
    weights = (local_weight, local_bias, dilated_weight, dilated_bias, point_weight, point_bias)
    return call_forward(x, *weights, dilation)[0]
