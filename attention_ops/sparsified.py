"""Sparsifiner's attention: a low-rank predictor chooses, for every image, head and query, which keys are attended.

Paper      Wei, Duggal, Lin, Liu, Urtasun 2023, arXiv:2303.13755.
Official   https://github.com/lim142857/Sparsifiner (MIT): layers and keys are theirs.
We differ  the authors compute the whole matrix and mask it; other image sizes resample the predictor's tables as maps,
           where theirs are tied to one number of tokens; with fewer than 8 basis vectors all coefficients are kept.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

from ._graph.sizes import known
from .dense_attention import dense_attention
from .mixers import register_mixer
from .positions import resample_table
from .sparse import sparse_attention

TOP = 8  # basis coefficients that a query keeps
BASIS_FLOOR = 0.02  # basis entries up to this count as 0
COEFFICIENT_FLOOR = 0.05  # the same for coefficients, where `top` is None


def share_of(count: int, share: float) -> int:
    """Return the smallest integer that is not below share * count; also of a free size of a traced graph."""
    if torch.jit.is_scripting():
        return math.ceil(share * count)
    else:
        return _share_of_any(count, share)


def _share_of_any(count: int, share: float) -> int:
    if known(count):
        return math.ceil(share * count)
    part = Fraction(share).limit_denominator(10**6)
    return (count * part.numerator + part.denominator - 1) // part.denominator


class MaskPredictor(nn.Module):
    """Predict which keys a query attends to, from a low-rank form of the attention matrix.

    Queries and keys are projected to half their channels, and keys from N tokens to a few basis vectors. The softmax
    over basis vectors, times a second table, approximates a query's row of the matrix. The scale is num_heads ** -0.5,
    as in the authors' code. Rows of prefix tokens are not predicted: those see everything.

    Args:
        dim: channels of all heads together.
        num_heads: number of heads; they share all weights.
        map_size: (rows, columns) of the map for which the tables are made.
        prefix_tokens: tokens before those of the map.
        basis: basis vectors; (prefix_tokens + rows * columns) // 6 when None, at least 1.
        shares_tables: one table for both directions.
        top: coefficients that a query keeps; None: those above 0.05.
        score_floor: keep the keys whose score is above it, in place of a budget; for `mask` only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        prefix_tokens: int = 1,
        basis: int | None = None,
        shares_tables: bool = False,
        top: int | None = TOP,
        score_floor: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        tokens, head_dim = prefix_tokens + map_size[0] * map_size[1], dim // num_heads
        basis = max(tokens // 6, 1) if basis is None else basis
        self.map_size, self.prefix_tokens = (map_size[0], map_size[1]), prefix_tokens
        self.scale = num_heads**-0.5
        self.top = 0 if top is None else min(top, basis)
        self.score_floor = score_floor
        self.basis_floor, self.coefficient_floor = BASIS_FLOOR, COEFFICIENT_FLOOR
        self.proj_n = nn.Parameter(torch.empty(tokens, basis, **dd))
        self.proj_back_n = self.proj_n if shares_tables else nn.Parameter(torch.empty(tokens, basis, **dd))
        self.proj_c_q = nn.Linear(head_dim, max(head_dim // 2, 1), **dd)
        self.proj_c_k = nn.Linear(head_dim, max(head_dim // 2, 1), **dd)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        for table in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(table, std=0.02)

    @torch.jit.ignore
    @torch.no_grad()
    def resize(self, map_size: tuple[int, int]) -> None:
        """Resample both tables for a map of this size, in place; the number of basis vectors stays."""
        shared = self.proj_back_n is self.proj_n
        into, back = (table.clone() for table in self.tables(map_size))
        self.proj_n = nn.Parameter(into, requires_grad=self.proj_n.requires_grad)
        self.proj_back_n = self.proj_n if shared else nn.Parameter(back, requires_grad=self.proj_back_n.requires_grad)
        self.map_size = map_size

    def tables(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return both tables, (tokens, basis), for a map of this size."""
        return (
            resample_table(self.proj_n, size, self.map_size, self.prefix_tokens),
            resample_table(self.proj_back_n, size, self.map_size, self.prefix_tokens),
        )

    def coefficients(self, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        """(B, heads, N, d), twice, and (N, basis) or (B, 1, N, basis) -> (B, heads, N - prefix, basis), a softmax."""
        keys = torch.matmul(self.proj_c_k(k).transpose(-2, -1), table)  # (B, heads, c, basis)
        logits = torch.matmul(self.proj_c_q(q[:, :, self.prefix_tokens :]), keys) * self.scale
        return logits.softmax(-1)

    def approximate(self, q: Tensor, k: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the approximated rows of the attention matrix, (B, heads, N - prefix, N): what phase 1 trains."""
        into, back = self.tables(size)
        return torch.matmul(self.coefficients(q, k, into), back.transpose(-2, -1))

    def forward(self, q: Tensor, k: Tensor, size: tuple[int, int], numbers: Tensor | None = None) -> Tensor:
        """Return the score of every connection, (B, heads, N - prefix, N), by thresholded coefficients and basis.

        Args:
            q, k: (B, heads, N, head_dim).
            size: of the map.
            numbers: (B, N - prefix), which of the map's tokens the images have left, one prefix token before them; all
                when None.
        """
        into, back = self.tables(size)
        if numbers is not None:
            rows = torch.cat([torch.zeros_like(numbers[:, :1]), numbers + 1], dim=1)
            into, back = into[rows][:, None], back[rows][:, None]  # (B, 1, N, basis)
        coefficients, basis = self.coefficients(q, k, into), back.abs()
        if self.top > 0:
            best, where = coefficients.topk(self.top, sorted=False)
            coefficients = torch.zeros_like(coefficients).scatter(-1, where, best)
        else:
            coefficients = torch.where(coefficients > self.coefficient_floor, coefficients, 0.0)
        basis = torch.where(basis > self.basis_floor, basis, 0.0)
        return torch.matmul(coefficients, basis.transpose(-2, -1))

    @torch.jit.ignore
    def mask(self, scores: Tensor, budget: int) -> Tensor:
        """Return (B, heads, N, N) bool: what every query sees. Prefix tokens see everything."""
        if self.score_floor is not None:
            rows = scores > self.score_floor
        else:
            rows = torch.zeros_like(scores).scatter(-1, best_columns(scores, budget), 1.0) > 0
        return torch.cat([rows.new_ones(*rows.shape[:2], self.prefix_tokens, rows.shape[3]), rows], dim=2)

    def extra_repr(self) -> str:
        return f"top={self.top}, map_size={self.map_size}"


@register_mixer("sparsified")
class SparsifiedAttention(nn.Module):
    """Attention to the keys that a MaskPredictor chooses. No gradient flows through the choice.

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        map_size, prefix_tokens, basis, shares_tables, top: see `MaskPredictor`.
        keep: share of the keys that a query sees, above 0 and at most 1.
        qkv_bias: give the qkv projection a bias.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        keep: float = 0.25,
        basis: int | None = None,
        shares_tables: bool = False,
        top: int | None = TOP,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"SparsifiedAttention: num_heads must divide dim {dim}, got {num_heads}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.prefix_tokens, self.keep = num_heads, prefix_tokens, keep
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mask_predictor = MaskPredictor(
            dim, num_heads, map_size=map_size, prefix_tokens=prefix_tokens, basis=basis,
            shares_tables=shares_tables, top=top, **dd,
        )  # fmt: skip

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, N, C) -> (B, N, C)
        q, k, v = self.project(x)
        return self.attend(q, k, v, share_of(x.shape[1], self.keep), size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, (B, N, heads, head_dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        budget: int,
        size: tuple[int, int],
        numbers: Tensor | None = None,
        dropped: int = 0,
    ) -> Tensor:
        """Choose `budget` keys of every query that is no prefix token, attend, and project: (B, N, C).

        Args:
            size, numbers: as in `MaskPredictor`.
            dropped: tokens that were dropped before. Prefix tokens see them as keys and values of zero.
        """
        scores = self.mask_predictor(q.transpose(1, 2), k.transpose(1, 2), size=size, numbers=numbers)
        columns = best_columns(scores.detach(), budget)
        out = sparse_attention(q[:, self.prefix_tokens :], k, v, columns, scale=self.scale)
        if self.prefix_tokens > 0:
            rows = q[:, : self.prefix_tokens]
            seeing_all = dense_attention(rows, k, v, scale=self.scale)
            if dropped > 0:
                seeing_all = seeing_all * share_of_kept(rows, k, self.scale, dropped)[..., None]
            out = torch.cat([seeing_all, out], dim=1)
        out = out.flatten(2)
        if scores.requires_grad:  # a gradient of zero: distributed training waits for the gradient of every parameter
            out = out + 0.0 * scores.sum()
        return self.proj_drop(self.proj(out))

    @torch.jit.ignore
    def masks(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what every query sees, (B, heads, N, N) bool."""
        q, k, _ = self.project(x)
        scores = self.mask_predictor(q.transpose(1, 2), k.transpose(1, 2), size=size)
        return self.mask_predictor.mask(scores, share_of(x.shape[1], self.keep))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, keep={self.keep}"


def best_columns(scores: Tensor, budget: int) -> Tensor:
    """Return the keys of the largest scores, (B, heads, queries, budget) int64, in no order."""
    return scores.topk(budget, sorted=False)[1]


def share_of_kept(q: Tensor, k: Tensor, scale: float, dropped: int) -> Tensor:
    """Return the share of a softmax that the keys have beside `dropped` keys of zero: (B, queries, heads)."""
    logits = torch.einsum("bqhd,bnhd->bqhn", q, k) * scale
    return 1 / (1 + dropped * torch.exp(-logits.logsumexp(-1)))


def keep_tokens(scores: Tensor, count: int) -> Tensor:
    """(B, N) scores of tokens -> (B, count) numbers of those with the largest, in their order."""
    return scores.topk(count, sorted=False)[1].sort(-1)[0]


def take_tokens(x: Tensor, numbers: Tensor) -> Tensor:
    """(B, N, C), and (B, count) numbers of tokens -> (B, count, C)."""
    return x.gather(1, numbers[..., None].expand(-1, -1, x.shape[-1]))
