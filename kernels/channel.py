"""Channel attention (Triton): a head's channels attend to each other, over all tokens of the map.

Paper      Ding et al. 2022, arXiv:2204.03645 (DaViT), figure 3b.
Tensors    q, k, v, out: (B, H, W, heads, D) of any strides; logits, probabilities, gradients: (B * heads, D, D) fp32.
Grid       products over tokens: B * heads * splits of the tokens; their softmax: B * heads * tiles of rows; mixtures of
           channels: B * heads * tiles of tokens.
Numerics   sums over tokens in fp32, in two stages of fixed order; softmax in fp32; one rounding on store.
Memory     forward reads q, k, v once and writes out once; backward reads grad_out twice, q, k, v once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    LEAST_PROGRAMS,
    cdiv,
    dot_precision,
    eager_backward,
    eager_forward,
    on_device,
    padded,
    refuse_second_derivative,
    token_steps,
    without_autocast,
)
from .packed import together

LOG2_E = math.log2(math.e)
LEAST_CHUNK = 256  # tokens of one program's sum, below which its partial sum costs as much as its reads


@triton.jit
def _token_offs(n, strides, WIDTH: tl.constexpr):
    """Element offsets of tokens in an image, WIDTH tokens a row; 1 where no token needs a division."""
    if WIDTH == 1:
        offs = n * strides[1]
    else:
        offs = n // WIDTH * strides[1] + n % WIDTH * strides[2]
    return offs


@triton.jit
def _load_channels(
    ptr, strides, head, n, tokens, heads, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """[tokens, BLOCK_D] of a map (B, H, W, heads, D), WIDTH tokens a row; zeros past the map and past D."""
    d = tl.arange(0, BLOCK_D)
    image = (head // heads).to(tl.int64)
    offs = _token_offs(n, strides, WIDTH)[:, None] + (d * strides[4])[None, :]
    mask = (n < tokens)[:, None] & (d < D)[None, :]
    return tl.load(ptr + (image * strides[0] + head % heads * strides[3]) + offs, mask=mask, other=0.0)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, a_strides, b_strides, heads, tokens, chunk, splits,
    A_WIDTH: tl.constexpr, B_WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        a = _load_channels(a_ptr, a_strides, head, n, tokens, heads, A_WIDTH, D, BLOCK_D)  # [N, D]
        b = _load_channels(b_ptr, b_strides, head, n, tokens, heads, B_WIDTH, D, BLOCK_D)  # [N, D]
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)  # [D, D]
    i, j = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    out_ptr += tl.program_id(0).to(tl.int64) * D * D
    tl.store(out_ptr + i * D + j, acc, mask=(i < D) & (j < D))


@triton.jit
def _sum_of_splits(parts_ptr, offs, mask, head, splits, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (head * splits + split) * (D * D) + offs, mask=mask, other=0.0)
    return total


@triton.jit
def softmax_kernel(
    parts_ptr, probs_ptr, scale_log2, splits, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_I)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    i, j = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (i < D) & (j < D)
    logits = _sum_of_splits(parts_ptr, i * D + j, mask, head, splits, D, BLOCK_I, BLOCK_D) * scale_log2
    logits = tl.where(j < D, logits, float("-inf"))
    probs = tl.exp2(logits - tl.max(logits, 1)[:, None])
    probs = probs / tl.sum(probs, 1)[:, None]
    tl.store(probs_ptr + head * D * D + i * D + j, probs, mask=mask)


@triton.jit
def softmax_grad_kernel(
    parts_ptr, probs_ptr, dlogits_ptr, splits, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(D, BLOCK_I)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    i, j = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (i < D) & (j < D)
    dprobs = _sum_of_splits(parts_ptr, i * D + j, mask, head, splits, D, BLOCK_I, BLOCK_D)
    probs = tl.load(probs_ptr + head * D * D + i * D + j, mask=mask, other=0.0)
    dlogits = probs * (dprobs - tl.sum(probs * dprobs, 1)[:, None])
    tl.store(dlogits_ptr + head * D * D + i * D + j, dlogits, mask=mask)


@triton.jit
def mixture_kernel(
    x_ptr, mix_ptr, out_ptr, x_strides, out_strides, scale, heads, tokens,
    X_WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """out[n, i] = scale * sum_j mix[i, j] * x[n, j], or with mix[j, i] where BACK."""
    tiles = tl.cdiv(tokens, BLOCK_N)
    head = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _load_channels(x_ptr, x_strides, head, n, tokens, heads, X_WIDTH, D, BLOCK_D)  # [N, D]
    j, i = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mix_offs = (j * D + i) if BACK else (i * D + j)
    mix = tl.load(mix_ptr + head.to(tl.int64) * D * D + mix_offs, mask=(i < D) & (j < D), other=0.0)  # [D, D]
    out = tl.dot(x, mix.to(x.dtype), input_precision=PRECISION) * scale  # [N, D]
    image = (head // heads).to(tl.int64)
    out_ptr += image * out_strides[0] + head % heads * out_strides[3]
    offs = _token_offs(n, out_strides, OUT_WIDTH)[:, None] + i * out_strides[4]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=(n < tokens)[:, None] & (i < D))


def token_strides(x: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the strides of (B, H, W, heads, D) and WIDTH, as `_token_offs` takes them."""
    row, col, width = token_steps(x, 1)
    return (x.stride(0), row, col, x.stride(3), x.stride(4)), width


def token_splits(heads: int, tokens: int, block: int) -> tuple[int, int]:
    """(splits, tokens of a split) for the sums over tokens, for so many heads of all images together."""
    splits = max(1, min(-(-LEAST_PROGRAMS // heads), tokens // LEAST_CHUNK))
    chunk = -(-tokens // (splits * block)) * block
    return -(-tokens // chunk), chunk


def _tiles(x: Tensor) -> dict[str, int | str | bool]:
    """Tiles and warps, from head_dim and type."""
    dim = x.shape[-1]
    block_d = padded(dim)
    block_n = 32 if block_d == 128 or x.dtype == torch.float32 else 64
    warps = 8 if block_d == 128 else 4
    launch = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
    return {"D": dim, "BLOCK_D": block_d, "BLOCK_N": block_n, "PRECISION": dot_precision(x.dtype), **launch}


def launch_product(a: Tensor, b: Tensor) -> Tensor:
    """sum over tokens of a[n, i] * b[n, j], in parts to be summed: (B * heads, splits, D, D) fp32."""
    batch, height, width, heads, dim = a.shape
    tiles = _tiles(a)
    splits, chunk = token_splits(batch * heads, height * width, tiles["BLOCK_N"])
    (a_strides, a_width), (b_strides, b_width) = token_strides(a), token_strides(b)
    parts = a.new_empty(batch * heads, splits, dim, dim, dtype=torch.float32)
    product_kernel[(batch * heads * splits,)](
        a, b, parts, a_strides, b_strides, heads, height * width, chunk, splits,
        A_WIDTH=a_width, B_WIDTH=b_width, **tiles,
    )  # fmt: skip
    return parts


def launch_mixture(x: Tensor, mix: Tensor, out: Tensor, scale: float = 1.0, back: bool = False) -> None:
    """Write scale * mix x to out, channel by channel; its transpose where `back`."""
    batch, height, width, heads, _ = x.shape
    tiles = _tiles(x)
    (x_strides, x_width), (out_strides, out_width) = token_strides(x), token_strides(out)
    mixture_kernel[(batch * heads * cdiv(height * width, tiles["BLOCK_N"]),)](
        x, mix, out, x_strides, out_strides, scale, heads, height * width,
        X_WIDTH=x_width, OUT_WIDTH=out_width, BACK=back, **tiles,
    )  # fmt: skip


def softmax_rows(dim: int) -> dict[str, int]:
    """Tiles of the softmax: rows of logits for one program."""
    blocks = {"BLOCK_I": 16, "BLOCK_D": padded(dim)}
    return {"D": dim, **blocks, "num_warps": 4, "enable_fp_fusion": True}


def launch_softmax(parts: Tensor, scale: float) -> Tensor:
    heads, splits, dim, _ = parts.shape
    probs = parts.new_empty(heads, dim, dim)
    rows = softmax_rows(dim)
    softmax_kernel[(heads * cdiv(dim, rows["BLOCK_I"]),)](parts, probs, scale * LOG2_E, splits, **rows)
    return probs


def launch_softmax_grad(parts: Tensor, probs: Tensor) -> Tensor:
    heads, splits, dim, _ = parts.shape
    dlogits = torch.empty_like(probs)
    rows = softmax_rows(dim)
    softmax_grad_kernel[(heads * cdiv(dim, rows["BLOCK_I"]),)](parts, probs, dlogits, splits, **rows)
    return dlogits


@torch.library.custom_op("foveate::channel_attention_forward", mutates_args=())
def channel_attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out as contiguous (B, H, W, heads, D), and the probabilities (B * heads, D, D) fp32."""
    if not q.numel():
        return _empty_results(q)
    out = q.new_empty(q.shape)
    with on_device(q):
        probs = launch_softmax(launch_product(q, k), scale)
        launch_mixture(v, probs, out)
    return out, probs


@channel_attention_forward.register_fake
def _(q, k, v, scale):
    return _empty_results(q)


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    heads, dim = q.shape[3:]
    return q.new_empty(q.shape), q.new_empty(q.shape[0] * heads, dim, dim, dtype=torch.float32)


@torch.library.custom_op("foveate::channel_attention_backward", mutates_args=())
@without_autocast
def channel_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, probs: Tensor, grad: Tensor, scale: float, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv: with the strides of q, k and v where these are dense, or where `packed` is allowed."""
    dq, dk, dv = (together(q, k, v) if packed else None) or _empty_gradients(q, k, v)
    if not q.numel():
        return dq, dk, dv
    with on_device(q):
        launch_mixture(grad, probs, dv, back=True)
        dlogits = launch_softmax_grad(launch_product(grad, v), probs)
        launch_mixture(k, dlogits, dq, scale)
        launch_mixture(q, dlogits, dk, scale, back=True)
    return dq, dk, dv


@channel_attention_backward.register_fake
def _(q, k, v, probs, grad, scale, packed=False):
    return _empty_gradients(q, k, v)


def _empty_gradients(*maps: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in maps)


refuse_second_derivative(channel_attention_backward, "channel_attention")
call_backward = eager_backward(channel_attention_backward, packed=True)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _backward(ctx, grad, _):
    return *call_backward(*ctx.saved_tensors, grad, ctx.scale), None


channel_attention = eager_forward(channel_attention_forward, _save, _backward)
