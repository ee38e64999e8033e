"""Tiles of agent attention on chip: rows of tokens or agents, biases, and one step of each pass (Triton helpers)."""

import triton
import triton.language as tl


@triton.jit
def program(heads, splits):
    """(image int64, head, split) of this program; splits vary fastest."""
    pid = tl.program_id(0)
    return (pid // (splits * heads)).to(tl.int64), pid // splits % heads, pid % splits


@triton.jit
def load_rows(ptr, strides, image, head, row, rows, DIM: tl.constexpr, PAD: tl.constexpr, first=0):
    """[row, PAD], from column `first`, of (B, rows, heads, DIM); zeros past the last row and DIM. image is int64."""
    c = first + tl.arange(0, PAD)
    mask = (row < rows)[:, None] & (c < DIM)[None, :]
    offs = row[:, None] * strides[1] + (c * strides[3])[None, :]
    return tl.load(ptr + (image * strides[0] + head * strides[2]) + offs, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, x, strides, image, head, row, rows, DIM: tl.constexpr, PAD: tl.constexpr):
    """Store a tile that `load_rows` could load."""
    c = tl.arange(0, PAD)
    mask = (row < rows)[:, None] & (c < DIM)[None, :]
    offs = row[:, None] * strides[1] + (c * strides[3])[None, :]
    tl.store(ptr + (image * strides[0] + head * strides[2]) + offs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(ptr, strides, head, row, rows, col, cols):
    """[row, col] of (heads, rows, cols), in fp32 and in powers of 2; zeros outside."""
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    offs = row[:, None] * strides[1] + (col * strides[2])[None, :]
    bias = tl.load(ptr + head.to(tl.int64) * strides[0] + offs, mask=mask, other=0.0)
    return bias.to(tl.float32) * 1.4426950408889634


@triton.jit
def attend_step(q, k, v, bias, seen, scale_log2, top, total, acc, PRECISION: tl.constexpr):
    """Add a tile of keys to the softmax of a tile of queries: (top, total, acc), all of one row a query.

    `top` begins finite, at -1e30: a tile may hold biases of -inf only.
    """
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    shrink = tl.exp2(top - new_top)
    probs = tl.exp2(logits - new_top[:, None])
    total = total * shrink + tl.sum(probs, 1)
    acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def gradient_step(x, y, grad_x, value_y, bias, seen, lse, delta, scale_log2, PRECISION: tl.constexpr):
    """Probabilities of a tile of logits x y^T, and the gradients of these logits, [X, Y] fp32.

    The softmax may be along either axis: `lse` and `delta` are columns or rows. grad_x value_y^T is the gradient of the
    probabilities. Where not `seen` both are 0; they are 0 as well where lse is inf.
    """
    logits = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    dprobs = tl.dot(grad_x, tl.trans(value_y), input_precision=PRECISION)
    return logit_gradients(logits, dprobs, bias, seen, lse, delta, scale_log2)


@triton.jit
def logit_gradients(logits, dprobs, bias, seen, lse, delta, scale_log2):
    """What `gradient_step` returns, of the products x y^T and grad_x value_y^T."""
    probs = tl.where(seen, tl.exp2(logits * scale_log2 + bias - lse), 0.0)
    return probs, probs * (dprobs - delta)
