"""Relative logits of halo attention (Triton): what a query adds to every row and to every column of its window.

Paper      Vaswani et al. 2021, arXiv:2103.12731; tables by row and column as in Ramachandran et al. 2019, 1906.05909.
Tensors    q: (B, H, W, heads, DIM), head_dim contiguous; table: (2 * window - 1, DIM), contiguous;
           logits: (B, H, W, heads, 2 * PLACES) = [rows | columns], zero past the window; they are not scaled.
Grid       B * lines * strips * heads: one program owns a strip of queries of one row (or column) of the map. They have
           one place in their blocks, so they use one piece of a table. For the table: lines' places * SHARES.
Numerics   products and sums in fp32, one rounding on store; every sum has a fixed order, no atomics.
Memory     q is read once for rows and once for columns; logits are 2 * PLACES numbers a query and head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, padded

STRIP = 64  # queries
SIZES = ("images", "heads", "lines", "length")  # arguments of which no kernel needs a version of its own
SHARES = 64  # programs that sum one place's part of a table's gradient (estimated)


@triton.jit
def strip_at(unit, heads, lines, length, STRIP: tl.constexpr):
    """Image, line, positions on the line, and head of a strip; heads fastest: they share cache lines."""
    head, unit = unit % heads, unit // heads
    strips = tl.cdiv(length, STRIP)
    along, unit = unit % strips * STRIP + tl.arange(0, STRIP), unit // strips
    return (unit // lines).to(tl.int64), unit % lines, along, head


@triton.jit
def piece_of_table(table_ptr, place, WINDOW: tl.constexpr, PLACES: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    """[PLACES, D]: for queries at `place` of their blocks, the cell of every row (or column) of the window."""
    p, d = tl.arange(0, PLACES)[:, None], tl.arange(0, PAD)[None, :]
    return tl.load(table_ptr + (p - place + WINDOW - 1) * DIM + d, mask=(p < WINDOW) & (d < DIM), other=0.0)


@triton.jit(do_not_specialize=SIZES)
def halo_logits_kernel(
    q_ptr, table_ptr, logits_ptr, q_strides, logits_strides, heads, lines, length,
    AXIS: tl.constexpr, PER: tl.constexpr, WINDOW: tl.constexpr, PLACES: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, line, along, head = strip_at(tl.program_id(0), heads, lines, length, STRIP)
    d, p = tl.arange(0, PAD), tl.arange(0, PLACES)
    q_ptr += image * q_strides[0] + line * q_strides[1 + AXIS] + head * q_strides[3]
    q_offs = along[:, None] * q_strides[2 - AXIS] + d[None, :]
    q = tl.load(q_ptr + q_offs, mask=(along < length)[:, None] & (d < DIM)[None, :], other=0.0)  # [STRIP, D]
    table = piece_of_table(table_ptr, line % PER, WINDOW, PLACES, DIM, PAD)
    logits = tl.dot(q, tl.trans(table.to(q.dtype)), input_precision=PRECISION)  # [STRIP, PLACES]
    logits_ptr += image * logits_strides[0] + line * logits_strides[1 + AXIS] + head * logits_strides[3]
    logits_offs = along[:, None] * logits_strides[2 - AXIS] + AXIS * PLACES + p[None, :]
    tl.store(logits_ptr + logits_offs, logits.to(logits_ptr.dtype.element_ty), mask=(along < length)[:, None])


@triton.jit(do_not_specialize=SIZES)
def halo_dq_kernel(
    dlogits_ptr, table_ptr, dq_ptr, dlogits_strides, dq_strides, heads, lines, length,
    AXIS: tl.constexpr, PER: tl.constexpr, WINDOW: tl.constexpr, PLACES: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq what comes through the logits of one axis."""
    image, line, along, head = strip_at(tl.program_id(0), heads, lines, length, STRIP)
    d, p = tl.arange(0, PAD), tl.arange(0, PLACES)
    dlogits_ptr += image * dlogits_strides[0] + line * dlogits_strides[1 + AXIS] + head * dlogits_strides[3]
    offs = along[:, None] * dlogits_strides[2 - AXIS] + AXIS * PLACES + p[None, :]
    dlogits = tl.load(dlogits_ptr + offs, mask=(along < length)[:, None], other=0.0)  # [STRIP, PLACES]
    table = piece_of_table(table_ptr, line % PER, WINDOW, PLACES, DIM, PAD)
    dq_ptr += image * dq_strides[0] + line * dq_strides[1 + AXIS] + head * dq_strides[3]
    dq_ptr += along[:, None] * dq_strides[2 - AXIS] + d[None, :]
    mask = (along < length)[:, None] & (d < DIM)[None, :]
    dq = tl.load(dq_ptr, mask=mask, other=0.0).to(tl.float32)
    dq = tl.dot(dlogits, table.to(dlogits.dtype), dq, input_precision=PRECISION)
    tl.store(dq_ptr, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def halo_table_kernel(
    q_ptr, dlogits_ptr, sums_ptr, q_strides, dlogits_strides, images, heads, lines, length,
    AXIS: tl.constexpr, PER: tl.constexpr, PLACES: tl.constexpr, SHARES: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the gradient of the piece of a table that one place uses: sums (PER, SHARES, PLACES, PAD)."""
    place, share = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES
    at_place = (lines - place + PER - 1) // PER
    d, p = tl.arange(0, PAD), tl.arange(0, PLACES)
    total = tl.zeros((PLACES, PAD), tl.float32)
    for unit in range(share, images * at_place * tl.cdiv(length, STRIP) * heads, SHARES):
        image, block, along, head = strip_at(unit, heads, at_place, length, STRIP)
        line = block * PER + place
        q_offs = image * q_strides[0] + line * q_strides[1 + AXIS] + head * q_strides[3]
        q_offs += along[:, None] * q_strides[2 - AXIS] + d[None, :]
        q = tl.load(q_ptr + q_offs, mask=(along < length)[:, None] & (d < DIM)[None, :], other=0.0)  # [STRIP, D]
        offs = image * dlogits_strides[0] + line * dlogits_strides[1 + AXIS] + head * dlogits_strides[3]
        offs += along[:, None] * dlogits_strides[2 - AXIS] + AXIS * PLACES + p[None, :]
        dlogits = tl.load(dlogits_ptr + offs, mask=(along < length)[:, None], other=0.0)  # [STRIP, PLACES]
        total = tl.dot(tl.trans(dlogits), q, total, input_precision=PRECISION)
    sums_ptr += tl.program_id(0) * PLACES * PAD
    tl.store(sums_ptr + p[:, None] * PAD + d[None, :], total)


def places(window: tuple[int, int]) -> int:
    """How many logits an axis gets: a power of two of at least 16, which a matrix product takes."""
    return padded(max(window))


def _windows(tables: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return tuple((table.shape[0] + 1) // 2 for table in tables)


def _launch(kernel, axis: int, x: Tensor, first: tuple, strides: tuple, precision: str, **constants):
    lines, length = x.shape[1 + axis], x.shape[2 - axis]
    grid = (x.shape[0] * lines * cdiv(length, STRIP) * x.shape[3],)
    kernel[grid](
        *first, *strides, x.shape[3], lines, length,
        AXIS=axis, STRIP=STRIP, PRECISION=precision, num_warps=4, num_stages=2, enable_fp_fusion=True, **constants,
    )  # fmt: skip


def halo_logits(q: Tensor, tables: tuple[Tensor, Tensor], per: tuple[int, int], precision: str) -> Tensor:
    """Return (B, H, W, heads, 2 * PLACES): q . table[place in window - place in block + window - 1].

    Args:
        tables: rel_h, rel_w. per: queries of a block.
    """
    windows = _windows(tables)
    out = q.new_empty(*q.shape[:4], 2 * places(windows))
    for axis in range(2):
        constants = {"PER": per[axis], "WINDOW": windows[axis], "PLACES": places(windows)}
        _launch(
            halo_logits_kernel, axis, q, (q, tables[axis], out), (q.stride()[:4], out.stride()[:4]), precision,
            DIM=q.shape[-1], PAD=padded(q.shape[-1]), **constants,
        )  # fmt: skip
    return out


def halo_logits_backward(
    q: Tensor, tables: tuple[Tensor, Tensor], dlogits: Tensor, dq: Tensor, per: tuple[int, int], precision: str
) -> list[Tensor]:
    """Add to `dq` in place; return the gradients of both tables in fp32."""
    windows, dim, grads = _windows(tables), q.shape[-1], []
    for axis in range(2):
        constants = {"PER": per[axis], "PLACES": places(windows), "DIM": dim, "PAD": padded(dim)}
        _launch(
            halo_dq_kernel, axis, dq, (dlogits, tables[axis], dq), (dlogits.stride()[:4], dq.stride()[:4]),
            precision, WINDOW=windows[axis], **constants,
        )  # fmt: skip
        sums = q.new_empty(per[axis], SHARES, places(windows), padded(dim), dtype=torch.float32)
        halo_table_kernel[(per[axis] * SHARES,)](
            q, dlogits, sums, q.stride()[:4], dlogits.stride()[:4],
            q.shape[0], q.shape[3], q.shape[1 + axis], q.shape[2 - axis],
            AXIS=axis, STRIP=STRIP, SHARES=SHARES, PRECISION=precision, num_warps=4, num_stages=2,
            enable_fp_fusion=True, **constants,
        )  # fmt: skip
        grads.append(_shift_and_add(sums.sum(1)[:, : windows[axis], :dim], windows[axis]))
    return grads


def _shift_and_add(pieces: Tensor, window: int) -> Tensor:
    """(places of a block, window, D) -> (2 * window - 1, D): add the piece of every place at its cells."""
    table = pieces.new_zeros(2 * window - 1, pieces.shape[-1])
    for place, piece in enumerate(pieces):
        table[window - 1 - place : 2 * window - 1 - place] += piece
    return table
