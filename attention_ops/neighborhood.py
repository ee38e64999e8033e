"""Neighborhood attention in two dimensions, with dilation, stride, causal axes and a relative position bias.

Papers     Hassani et al. 2023, arXiv:2204.07143 (NAT); Hassani and Shi 2022, arXiv:2209.15001 (DiNAT, dilation);
           Hassani et al. 2025, arXiv:2504.16922 (stride).
Semantics  those of the authors' library while it had a bias (up to 0.17): the window is clamped at the borders, so
           every query sees exactly kernel x kernel keys, and the bias is indexed by the difference of ranks inside a
           dilation group. On a causal axis (NATTEN, arXiv:2403.04690) the window ends at the query, and queries near
           the first border see fewer keys.
We differ  NATTEN had no bias on causal axes, and has none with a stride; here both may be given.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.local.plan import Pattern, pattern_of
from ._attend import accumulator
from ._checks import check_at_least, check_device, check_qkv, pair, why_no_local_kernel
from ._graph.local import neighborhood_attention_graph, neighborhood_attention_lse_graph
from ._graph.sizes import is_known, pad_to_least
from ._op import Flags, Impl, Pair, Size, declare, run
from .neighborhood_cpu import (
    Neighborhood,
    axis_intervals,
    first_key,
    neighborhood_attention_lse_tiled,
    neighborhood_attention_tiled,
)
from .packed import unpack
from .tiling import AxisWindow, crop

OP = "neighborhood_attention"
OP_LSE = "neighborhood_attention_lse"


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    *,
    stride: Size = 1,
    rpb: Tensor | None = None,
    is_causal: Flags = False,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every token to the kernel_size x kernel_size neighborhood around it.

    On one axis, tokens with the same remainder modulo `dilation` form a group; a query of rank p in a group of L tokens
    sees ranks [s, s + kernel) with s = clamp(p - kernel // 2, 0, L - kernel). On a causal axis it sees ranks
    max(p - kernel + 1, 0) to p. With a stride, `stride` queries in a row share the window of their leader g: in s, p is
    replaced by g = p // stride * stride + stride // 2. On a causal axis their window begins at max(g - kernel + 1, 0)
    with g = min(p // stride * stride + stride - 1, L - 1), and still ends at p. `stride=kernel_size` is window
    attention where kernel_size divides L.

    Cost: H * W * kernel_rows * kernel_cols * head_dim multiply-adds per head, twice. The tiled and the fused body
    compute 2.5 to 5 times as many in exchange for dense products, and keep no logits for the backward pass. The fused
    body has no double backward.

    Args:
        q, k: (B, H, W, heads, head_dim); v: (B, H, W, heads, value_dim). One dtype and device; strided views are fine.
        kernel_size: neighborhood in tokens, an int or (rows, columns); odd or even, at least 1.
        dilation: step between neighbors in tokens, an int or (rows, columns), at least 1.
        stride: queries that share one window, an int or (rows, columns), 1 to kernel_size.
        rpb: (heads, 2 * kernel_rows - 1, 2 * kernel_cols - 1), added to the scaled logits; cell [key rank - query rank
            + kernel - 1] on each axis.
        is_causal: a bool or (rows, columns); on a causal axis, a query sees itself and the kernel_size - 1 tokens of
            its group before it, fewer at the border.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, a size is below 1, stride is above kernel_size, or a side of
            the map is shorter than kernel_size * dilation.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, kernel_size, dilation, stride, rpb, is_causal, scale, impl)


def neighborhood_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    *,
    stride: Size = 1,
    rpb: Tensor | None = None,
    is_causal: Flags = False,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor]:
    """Run `neighborhood_attention`, and return the log-sum-exp of the logits too, for `merge_attention`.

    Both results are differentiable. The tiled body is slower than that of `neighborhood_attention`: SDPA in torch
    returns no log-sum-exp.

    Args:
        q, k, v, kernel_size, dilation, stride, rpb, is_causal, scale, impl: see `neighborhood_attention`.

    Returns:
        The output, (B, H, W, heads, value_dim), dtype of q, and the natural logarithm of the sum of exp(logit) over the
        keys that a query sees, with logits scaled and biased: (B, H, W, heads), float32, or float64 for float64.

    Raises:
        ValueError, NotImplementedError: in the cases of `neighborhood_attention`.
    """
    return run(OP_LSE, q, k, v, kernel_size, dilation, stride, rpb, is_causal, scale, impl)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, kernel_size: Pair, dilation: Pair, stride: Pair, rpb: Tensor | None
) -> None:
    check_qkv(op, q, k, v, value_dim=True)
    check_at_least(op, "kernel_size", kernel_size, 1)
    check_at_least(op, "dilation", dilation, 1)
    _check_stride(op, stride, kernel_size)
    least = [size * step for size, step in zip(kernel_size, dilation, strict=True)]
    if is_known(q.shape[1] < least[0]) or is_known(q.shape[2] < least[1]):
        raise ValueError(
            f"{op}: the map must be at least kernel_size * dilation = {tuple(least)} tokens, got {tuple(q.shape[1:3])}"
        )
    if rpb is not None:
        table = (q.shape[3], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
        if tuple(rpb.shape) != table:
            raise ValueError(f"{op}: rpb must be (heads, 2 * kernel_size - 1) = {table}, got {tuple(rpb.shape)}")
        check_device(op, "rpb", rpb, "q", q)


def _check_stride(op: str, stride: Sequence[int], kernel_size: Sequence[int]) -> None:
    check_at_least(op, "stride", stride, 1)
    if stride[0] > kernel_size[0] or stride[1] > kernel_size[1]:
        raise ValueError(f"{op}: stride must be at most kernel_size {tuple(kernel_size)}, got {tuple(stride)}")


def axis_window(
    length: int, kernel: int, dilation: int, causal: bool, stride: int = 1, device: torch.device | str = "cpu"
) -> AxisWindow:
    """Say what every query of one axis sees: `kernel` keys, of which a causal axis hides those after the query."""
    position = torch.arange(length, device=device)
    group, rank = position % dilation, position // dilation
    start = first_key(rank, (length - group + dilation - 1) // dilation, kernel, causal, stride)
    ranks = start[:, None] + torch.arange(kernel, device=device)
    cells = ranks - rank[:, None] + kernel - 1
    seen = (cells < kernel) if causal else torch.ones_like(cells, dtype=torch.bool)
    return AxisWindow(ranks * dilation + group[:, None], seen, cells)


def neighborhood_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float
) -> Tensor:
    """The definition: gather every query's own keys, kernel_size ** 2 copies of k and v. float32 inside at least."""
    return neighborhood_attention_lse_reference(q, k, v, rpb, neighborhood, scale)[0]


def neighborhood_attention_lse_reference(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, with the log-sum-exp of every query's logits."""
    wide = accumulator(q.dtype)
    rows, cols = (axis_window(*axis, q.device) for axis in zip(q.shape[1:3], *neighborhood, strict=True))
    near = (rows.keys[:, None, :, None], cols.keys[None, :, None, :])  # index (H, W, kh, kw)
    unseen = ~(rows.seen[:, None, :, None] & cols.seen[None, :, None, :])
    k, v = (t.to(wide)[:, near[0], near[1]].masked_fill(unseen[..., None, None], 0) for t in (k, v))
    logits = torch.einsum("bhwnd,bhwijnd->bnhwij", q.to(wide) * scale, k)
    if rpb is not None:
        logits = logits + rpb.to(wide)[:, rows.cells[:, None, :, None], cols.cells[None, :, None, :]]
    seen_logits = logits.masked_fill(unseen, -torch.inf).flatten(-2)  # (B, heads, H, W, keys)
    probs = seen_logits.softmax(-1).view_as(logits)
    out = torch.einsum("bnhwij,bhwijnd->bhwnd", probs, v).to(q.dtype)
    return out, seen_logits.logsumexp(-1).permute(0, 2, 3, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float) -> Tensor:
    from ..kernels.local.launch import local_attention  # here, so that CPU users need no Triton

    return local_attention(q, k, v, _pattern(neighborhood), bias=rpb, scale=scale)


def _fused_lse(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, neighborhood: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    from ..kernels.local.launch import local_attention_lse

    return local_attention_lse(q, k, v, _pattern(neighborhood), bias=rpb, scale=scale)


def _pattern(neighborhood: Neighborhood) -> Pattern:
    kernel_size, dilation, is_causal, stride = neighborhood
    return pattern_of("neighborhood", kernel_size, stride=stride, dilation=dilation, causal=is_causal)


def _macs(q: Tensor, v: Tensor, neighborhood: Neighborhood) -> int:
    rows, cols = (_pairs(*axis) for axis in zip(q.shape[1:3], *neighborhood, strict=True))
    return q.shape[0] * q.shape[3] * (q.shape[4] + v.shape[4]) * rows * cols  # q k^T and probs v, of every pair


def _pairs(length: int, kernel: int, dilation: int, causal: bool, stride: int) -> int:
    """Count the pairs of a query and a key that it sees, on one axis."""
    groups = [(length - group + dilation - 1) // dilation for group in range(dilation)]
    return sum(end - start for group in groups for start, end in axis_intervals(group, kernel, causal, stride))


declare(
    neighborhood_attention,
    check=partial(_check, OP),
    reference=neighborhood_attention_reference,
    tiled=neighborhood_attention_tiled,
    graph=neighborhood_attention_graph,
    fused=_fused,
    why_not_fused=why_no_local_kernel,
    macs=_macs,
    bundles={"neighborhood": Neighborhood},
)
declare(
    neighborhood_attention_lse,
    check=partial(_check, OP_LSE),
    reference=neighborhood_attention_lse_reference,
    tiled=neighborhood_attention_lse_tiled,
    graph=neighborhood_attention_lse_graph,
    fused=_fused_lse,
    why_not_fused=why_no_local_kernel,
    macs=_macs,
    bundles={"neighborhood": Neighborhood},
)


class NeighborhoodAttention2d(nn.Module):
    """Multi-head neighborhood attention with its projections, on channels-last maps (figure 2 of arXiv:2204.07143).

    A map shorter than kernel_size * dilation on a side is padded there, right or bottom, with zeros BEFORE the qkv
    projection: padded tokens carry the qkv bias and are attended like any other, as in the authors' library; the
    output is cropped before the output projection.

    Args:
        dim: channels; heads must divide it.
        heads: number of heads.
        kernel_size, dilation, stride, is_causal: as in `neighborhood_attention`.
        rel_pos_bias: learn a (heads, 2 * kernel_rows - 1, 2 * kernel_cols - 1) table `rpb`.
        qkv_bias: give the qkv projection a bias.
        scale: multiplies the logits; (dim // heads) ** -0.5 when None.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        *,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"NeighborhoodAttention2d: heads must divide dim {dim}, got {heads}")
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.kernel_size = pair("NeighborhoodAttention2d", "kernel_size", kernel_size)
        self.dilation = pair("NeighborhoodAttention2d", "dilation", dilation)
        self.stride = pair("NeighborhoodAttention2d", "stride", stride)
        self.is_causal = pair("NeighborhoodAttention2d", "is_causal", is_causal)
        check_at_least("NeighborhoodAttention2d", "kernel_size", self.kernel_size, 1)
        check_at_least("NeighborhoodAttention2d", "dilation", self.dilation, 1)
        _check_stride("NeighborhoodAttention2d", self.stride, self.kernel_size)
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        rows, cols = self.kernel_size
        self.rpb = nn.Parameter(torch.empty(heads, 2 * rows - 1, 2 * cols - 1, **dd)) if rel_pos_bias else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        height, width = x.shape[1], x.shape[2]
        least_h, least_w = self.kernel_size[0] * self.dilation[0], self.kernel_size[1] * self.dilation[1]
        if torch.jit.is_scripting():
            x = F.pad(x, [0, 0, 0, max(least_w - width, 0), 0, max(least_h - height, 0)])
        else:
            x = pad_to_least(x, least_h, least_w)
        q, k, v = unpack(self.qkv(x).unflatten(-1, (3, self.heads, -1)), 3)  # (B, H, W, heads, head_dim)
        out = neighborhood_attention(
            q,
            k,
            v,
            self.kernel_size,
            self.dilation,
            stride=self.stride,
            rpb=self.rpb,
            is_causal=self.is_causal,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(crop(out.flatten(3), height, width)))

    def extra_repr(self) -> str:
        sizes = f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"
        return f"heads={self.heads}, {sizes}, is_causal={self.is_causal}"
