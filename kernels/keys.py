"""Attention of a map to a short list of keys (Triton): pooled maps, cells, text.

Papers     Shi 2024, arXiv:2311.17132 (pooled keys); Liu et al. 2024, arXiv:2412.16112 (cells, text).
Tensors    q, out: (B, N, heads, D or DV), N = H * W tokens row by row; k, v: (B, T, heads, D or DV); any strides but a
           head_dim's, which is 1. lse: (B, heads, N) fp32, base 2. table: (heads, R, C); rows: (H, Ph), cols: (W, Pw)
           int32, cells of the table, T = Ph * Pw.
Grid       forward, dq: B * heads * tiles of queries; dkv: B * heads * tiles of keys; dbias: heads * tiles of both.
Numerics   logits, softmax and sums in fp32, probabilities and logit gradients rounded to the dtype of v and q for
           products; exp2.
Memory     O(tile) on chip; no logits reach HBM but in dbias, whose sums over images are heads * 4096 queries * T fp32
           at a time. No atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    cdiv,
    dot_precision,
    eager_backward,
    eager_forward,
    on_device,
    padded,
    refuse_second_derivative,
    without_autocast,
)
from .packed import separate

LOG2_E = math.log2(math.e)
DKV_BLOCK = 32  # queries of a step of dkv: with 64, the registers do not hold the biases of their pairs
SLAB = 4096  # queries whose bias gradients are in memory at once


@triton.jit
def _rows(ptr, strides, image, head, token, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """[tokens, PAD] of (B, tokens, heads, DIM); zeros where not inside and past DIM."""
    d = tl.arange(0, PAD)
    ptr += image * strides[0] + head * strides[2]
    return tl.load(ptr + token[:, None] * strides[1] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _store(ptr, tile, strides, image, head, token, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    d = tl.arange(0, PAD)
    ptr += image * strides[0] + head * strides[2] + token[:, None] * strides[1] + d[None, :]
    tl.store(ptr, tile.to(ptr.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def _bias(table_ptr, rows_ptr, cols_ptr, head, query, key, inside, sizes):
    """The biases of pairs, 0 where not inside. query, key: of any shapes that broadcast; sizes: W, Ph, Pw, R, C."""
    row = tl.load(rows_ptr + query // sizes[0] * sizes[1] + key // sizes[2], mask=inside, other=0)
    col = tl.load(cols_ptr + query % sizes[0] * sizes[2] + key % sizes[2], mask=inside, other=0)
    return tl.load(table_ptr + (head * sizes[3] + row) * sizes[4] + col, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def keys_forward_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, cols_ptr, out_ptr, lse_ptr, q_strides, k_strides, v_strides, out_strides,
    sizes, heads, queries, keys, scale, factor,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % heads
    image = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < queries
    q = _rows(q_ptr, q_strides, image, head, m, inside, DIM, PAD)  # [M, D]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PAD_V), tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < keys
        k = _rows(k_ptr, k_strides, image, head, n, seen, DIM, PAD)  # [N, D]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, N]
        if HAS_BIAS:
            both = inside[:, None] & seen[None, :]
            logits += _bias(table_ptr, rows_ptr, cols_ptr, head, m[:, None], n[None, :], both, sizes)
        logits = tl.where(seen[None, :], logits * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))  # finite: every tile holds a key
        shrink = tl.exp2(top - new_top)
        probs = tl.exp2(logits - new_top[:, None])
        total = total * shrink + tl.sum(probs, 1)
        v = _rows(v_ptr, v_strides, image, head, n, seen, DIM_V, PAD_V)  # [N, DV]
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    _store(out_ptr, acc / total[:, None], out_strides, image, head, m, inside, DIM_V, PAD_V)
    tl.store(lse_ptr + (image * heads + head) * queries + m, top + tl.log2(total), mask=inside)


@triton.jit
def keys_dq_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, cols_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, dq_ptr, delta_ptr,
    q_strides, k_strides, v_strides, out_strides, grad_strides, dq_strides,
    sizes, heads, queries, keys, scale, factor,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % heads
    image = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < queries
    lines = (image * heads + head) * queries + m
    q = _rows(q_ptr, q_strides, image, head, m, inside, DIM, PAD)  # [M, D]
    out = _rows(out_ptr, out_strides, image, head, m, inside, DIM_V, PAD_V)
    grad = _rows(grad_ptr, grad_strides, image, head, m, inside, DIM_V, PAD_V)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:  # lse is in base 2
        delta -= tl.load(grad_lse_ptr + lines, mask=inside, other=0.0) * 1.4426950408889634
    tl.store(delta_ptr + lines, delta, mask=inside)
    lse = tl.load(lse_ptr + lines, mask=inside, other=0.0)
    dq = tl.zeros((BLOCK_M, PAD), tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < keys
        k = _rows(k_ptr, k_strides, image, head, n, seen, DIM, PAD)
        v = _rows(v_ptr, v_strides, image, head, n, seen, DIM_V, PAD_V)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            both = inside[:, None] & seen[None, :]
            logits += _bias(table_ptr, rows_ptr, cols_ptr, head, m[:, None], n[None, :], both, sizes)
        probs = tl.where(seen[None, :], tl.exp2(logits * factor - lse[:, None]), 0.0)
        dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        dlogits = (probs * (dprobs - delta[:, None])).to(k.dtype)
        dq = tl.dot(dlogits, k, dq, input_precision=PRECISION)
    _store(dq_ptr, dq * scale, dq_strides, image, head, m, inside, DIM, PAD)


@triton.jit
def keys_dkv_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, cols_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
    sizes, heads, queries, keys, scale, factor,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_N)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % heads
    image = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = n < keys
    k = _rows(k_ptr, k_strides, image, head, n, seen, DIM, PAD)  # [N, D]
    v = _rows(v_ptr, v_strides, image, head, n, seen, DIM_V, PAD_V)
    dk = tl.zeros((BLOCK_N, PAD), tl.float32)
    dv = tl.zeros((BLOCK_N, PAD_V), tl.float32)
    for start in range(0, queries, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < queries
        lines = (image * heads + head) * queries + m
        q = _rows(q_ptr, q_strides, image, head, m, inside, DIM, PAD)
        grad = _rows(grad_ptr, grad_strides, image, head, m, inside, DIM_V, PAD_V)
        lse = tl.load(lse_ptr + lines, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + lines, mask=inside, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [N, M]
        both = seen[:, None] & inside[None, :]
        if HAS_BIAS:
            logits += _bias(table_ptr, rows_ptr, cols_ptr, head, m[None, :], n[:, None], both, sizes)
        probs = tl.where(both, tl.exp2(logits * factor - lse[None, :]), 0.0)
        dv = tl.dot(probs.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dprobs = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dlogits = (probs * (dprobs - delta[None, :])).to(q.dtype)
        dk = tl.dot(dlogits, q, dk, input_precision=PRECISION)
    _store(dk_ptr, dk * scale, dk_strides, image, head, n, seen, DIM, PAD)
    _store(dv_ptr, dv, dv_strides, image, head, n, seen, DIM_V, PAD_V)


@triton.jit
def keys_dbias_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, cols_ptr, grad_ptr, lse_ptr, delta_ptr, sums_ptr,
    q_strides, k_strides, v_strides, grad_strides, sizes, heads, queries, keys, scale, factor, images, first, slab,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the logit gradients of queries `first` to `first + slab` over all images: (heads, slab, keys)."""
    m_tiles, n_tiles = tl.cdiv(slab, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    place = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // m_tiles % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(0) // (m_tiles * n_tiles)
    m = first + place
    inside, seen = place < slab, n < keys
    both = inside[:, None] & seen[None, :]
    bias = _bias(table_ptr, rows_ptr, cols_ptr, head, m[:, None], n[None, :], both, sizes)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(images):
        image = tl.cast(index, tl.int64)
        lines = (image * heads + head) * queries + m
        q = _rows(q_ptr, q_strides, image, head, m, inside, DIM, PAD)
        grad = _rows(grad_ptr, grad_strides, image, head, m, inside, DIM_V, PAD_V)
        k = _rows(k_ptr, k_strides, image, head, n, seen, DIM, PAD)
        v = _rows(v_ptr, v_strides, image, head, n, seen, DIM_V, PAD_V)
        lse = tl.load(lse_ptr + lines, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + lines, mask=inside, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        probs = tl.where(both, tl.exp2(logits * factor - lse[:, None]), 0.0)
        acc += probs * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    sums_ptr += head.to(tl.int64) * slab * keys
    tl.store(sums_ptr + place[:, None] * keys + n[None, :], acc, mask=both)


class Call:
    """What the kernels of one call share: sizes, constants, and the bias with its cells."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: tuple[Tensor, ...] | None, scale: float) -> None:
        self.images, self.queries, self.heads, dim = q.shape
        self.keys, self.scale = k.shape[1], scale
        self.bias = (
            None if bias is None else (bias[0].contiguous(), *(t.to(torch.int32).contiguous() for t in bias[1:]))
        )
        self.pointers = (q, q, q) if self.bias is None else self.bias  # q where nothing is read
        self.sizes = (1, 1, 1, 1, 1)
        if self.bias is not None:
            table, rows, cols = self.bias
            self.sizes = (cols.shape[0], rows.shape[1], cols.shape[1], table.shape[1], table.shape[2])
        wide = max(padded(dim), padded(v.shape[-1]))
        self.block_m, self.block_n = keys_tile(wide, q.element_size())
        self.constants = {
            "DIM": dim, "DIM_V": v.shape[-1], "PAD": padded(dim), "PAD_V": padded(v.shape[-1]),
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "PRECISION": dot_precision(q.dtype, "ieee"),
            "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
        }  # fmt: skip

    @property
    def numbers(self) -> tuple:
        return self.sizes, self.heads, self.queries, self.keys, self.scale, LOG2_E


def keys_tile(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Return (queries, keys) of a tile of logits; `head_dim` is the larger one, padded."""
    return (64, 32) if itemsize == 2 and head_dim <= 64 else (32, 32)


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(t.stride()[:3] for t in tensors)


def _tiles_of_queries(call: Call) -> tuple[int]:
    return (call.images * call.heads * cdiv(call.queries, call.block_m),)


def launch_forward(call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    keys_forward_kernel[_tiles_of_queries(call)](
        q, k, v, *call.pointers, out, lse, *_strides(q, k, v, out), *call.numbers,
        HAS_BIAS=call.bias is not None, **call.constants,
    )  # fmt: skip


def launch_backward(call: Call, q, k, v, out, lse, grad, grad_lse, dq, dk, dv) -> Tensor:
    """Write dq, dk and dv; return what is subtracted from the gradients of probabilities."""
    delta, has_bias = torch.empty_like(lse), call.bias is not None
    keys_dq_kernel[_tiles_of_queries(call)](
        q, k, v, *call.pointers, out, grad, lse, lse if grad_lse is None else grad_lse, dq, delta,
        *_strides(q, k, v, out, grad, dq), *call.numbers,
        HAS_BIAS=has_bias, HAS_GRAD_LSE=grad_lse is not None, **call.constants,
    )  # fmt: skip
    keys_dkv_kernel[(call.images * call.heads * cdiv(call.keys, call.block_n),)](
        q, k, v, *call.pointers, grad, lse, delta, dk, dv, *_strides(q, k, v, grad, dk, dv), *call.numbers,
        HAS_BIAS=has_bias, **call.constants | {"BLOCK_M": DKV_BLOCK},
    )  # fmt: skip
    return delta


def launch_bias_gradient(call: Call, q, k, v, grad, lse, delta) -> Tensor:
    """Return the gradient of the table, (heads, R, C) fp32."""
    assert call.bias is not None
    table, rows, cols = call.bias
    of_rows, of_cols = (_one_hot(cells, length) for cells, length in zip((rows, cols), table.shape[1:], strict=True))
    lines, total = max(1, SLAB // cols.shape[0]), q.new_zeros(table.shape, dtype=torch.float32)
    for first in range(0, rows.shape[0], lines):
        part = of_rows[first : first + lines]  # (rows of the map, Ph, R)
        slab = len(part) * cols.shape[0]
        sums = q.new_empty(call.heads, slab, call.keys, dtype=torch.float32)
        tiles = cdiv(slab, call.block_m) * cdiv(call.keys, call.block_n)
        keys_dbias_kernel[(call.heads * tiles,)](
            q, k, v, *call.pointers, grad, lse, delta, sums, *_strides(q, k, v, grad), *call.numbers,
            call.images, first * cols.shape[0], slab, **call.constants,
        )  # fmt: skip
        pairs = sums.unflatten(2, rows.shape[1:] + cols.shape[1:]).unflatten(1, (len(part), -1))  # (h, y, x, py, px)
        by_row = pairs.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2) @ part.flatten(0, 1)  # (h, x * px, R)
        total += (of_cols.flatten(0, 1).mT @ by_row).mT
    return total


def _one_hot(cells: Tensor, length: int) -> Tensor:
    """(a, b) int -> (a, b, length) fp32."""
    return (cells[..., None] == torch.arange(length, device=cells.device)).float()


def _last_dim(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("foveate::keys_attention_forward", mutates_args=())
def keys_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, rows: Tensor | None, cols: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out as contiguous (B, N, heads, DV), and lse as (B, heads, N), fp32, base 2."""
    out, lse = _empty_results(q, v)
    if out.numel():
        q, k, v = (_last_dim(t) for t in (q, k, v))
        with on_device(q):
            launch_forward(Call(q, k, v, _bias_of(table, rows, cols), scale), q, k, v, out, lse)
    return out, lse


def _bias_of(table: Tensor | None, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, ...] | None:
    return None if table is None or rows is None or cols is None else (table, rows, cols)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[-1]), q.new_empty(batch, heads, queries, dtype=torch.float32)


@keys_attention_forward.register_fake
def _(q, k, v, table, rows, cols, scale):
    return _empty_results(q, v)


@torch.library.custom_op("foveate::keys_attention_backward", mutates_args=())
@without_autocast
def keys_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, rows: Tensor | None, cols: Tensor | None,
    out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v and of the table; an empty tensor where there is no table."""
    dq, dk, dv, dtable = _empty_gradients(q, k, v, table)
    if not out.numel():
        return dq, dk.zero_(), dv.zero_(), dtable.zero_()
    q, k, v, grad = (_last_dim(t) for t in (q, k, v, grad))
    call = Call(q, k, v, _bias_of(table, rows, cols), scale)
    with on_device(q):
        delta = launch_backward(
            call, q, k, v, out, lse, grad, None if grad_lse is None else grad_lse.contiguous(), dq, dk, dv
        )  # fmt: skip
        if call.bias is not None:
            dtable.copy_(launch_bias_gradient(call, q, k, v, grad, lse, delta))
    return dq, dk, dv, dtable


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> tuple[Tensor, ...]:
    return *separate(q, k, v), q.new_empty(0) if table is None else table.new_empty(table.shape)


@keys_attention_backward.register_fake
def _(q, k, v, table, rows, cols, out, lse, grad, grad_lse, scale):
    return _empty_gradients(q, k, v, table)


refuse_second_derivative(keys_attention_backward, "keys_attention")
call_backward = eager_backward(keys_attention_backward)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, grad_lse):
    saved = ctx.saved_tensors
    grad = torch.zeros_like(saved[6]) if grad is None else grad
    dq, dk, dv, dtable = call_backward(*saved, grad, grad_lse, ctx.scale)
    return dq, dk, dv, None if saved[3] is None else dtable, None, None, None


call_forward = eager_forward(keys_attention_forward, _save, _differentiate)


def keys_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attend from every token of a map to all keys of a list; differentiable once.

    Args:
        q: (B, H, W, heads, head_dim).
        k: (B, T, heads, head_dim); v: (B, T, heads, value_dim).
        bias: a table (heads, R, C) and its cells, (H, Ph) and (W, Pw), of a list that is a map of Ph x Pw.

    Returns:
        (B, H, W, heads, value_dim), and the log-sum-exp of the logits, (B, H, W, heads) fp32.
    """
    size = q.shape[1:3]
    out, lse = call_forward(q.flatten(1, 2), k, v, *(bias or (None, None, None)), scale)
    return out.unflatten(1, size), (lse * math.log(2)).transpose(1, 2).unflatten(1, size)
