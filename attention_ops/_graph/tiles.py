"""Attention of query tiles to key tiles, which are gathered by token.

Both axes are cut alike: into dilation groups, and the groups into tiles; a piece is a tile of a group. Places that no
token has stand for the first or last token of their group. Masks hide them as keys, and nothing reads them as queries.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import compiles
from .._attend import accumulator, of_one_layout
from .sizes import as_tensor, integers, known


class Axis(NamedTuple):
    """One axis in pieces; arrays of NumPy, or tensors where the length is a symbol."""

    length: int
    pieces: int
    queries: Any  # (pieces, query tile): positions on the map
    keys: Any  # (pieces, key tile)
    query_ranks: Any  # (groups, tiles, query tile): places in the dilation group, inside it
    key_ranks: Any  # (groups or 1, tiles, key tile): the same, some outside
    group_lengths: Any  # (groups, 1, 1)
    place: Any  # (length,): where a token is among the queries of all pieces


def cut_axis(
    length: int, dilation: int, tile: int, tiles: int, keys: int, before: int, keeps_inside: bool = False
) -> Axis:
    """Cut an axis into `dilation` groups of `tiles` tiles of `tile` queries and `keys` keys.

    A key tile begins `before` keys ahead of its queries, or where `keeps_inside` wants it so that it lies in its group.
    """
    xp = integers(length, tiles)
    group = xp.arange(dilation)[:, None, None]
    first = xp.arange(tiles)[None, :, None] * tile
    last = (length - group + dilation - 1) // dilation - 1
    query_ranks = xp.minimum(first + xp.arange(tile), last)
    start = first - before
    if keeps_inside:
        start = xp.minimum(start.clip(0, None), (last + 1 - keys).clip(0, None))
    key_ranks = start + xp.arange(keys)
    inside = xp.minimum(key_ranks.clip(0, None), last)
    position = xp.arange(length)
    rank = position // dilation
    place = (position % dilation * tiles + rank // tile) * tile + rest(rank, tile)
    return Axis(
        length,
        dilation * tiles,
        (query_ranks * dilation + group).reshape(-1, tile),
        (inside * dilation + group).reshape(-1, keys),
        query_ranks,
        key_ranks,
        last + 1,
        place,
    )


def rest(positions: Any, size: int) -> Any:
    """Return positions % size. ONNX has no remainder of a tensor and a free size."""
    return positions - positions // size * size


class Cut(NamedTuple):
    """Both axes of a map in pieces, and which keys of its tile a query sees."""

    rows: Axis
    cols: Axis
    seen: Tensor | None  # (pieces of both axes, query tokens, key tokens) bool; None: all

    @property
    def pieces(self) -> int:
        return self.rows.pieces * self.cols.pieces

    @property
    def queries(self) -> int:
        """Tokens of a query tile."""
        return self.rows.queries.shape[1] * self.cols.queries.shape[1]

    @property
    def keys(self) -> int:
        """Tokens of a key tile."""
        return self.rows.keys.shape[1] * self.cols.keys.shape[1]


def tokens(rows: Any, cols: Any, width: int) -> Any:
    """(Y, y) row and (X, x) column positions of pieces -> (Y * X * y * x,) positions in the map, piece by piece."""
    return (rows[:, None, :, None] * width + cols[None, :, None, :]).reshape(-1)


def join_tables(rows: Any, cols: Any, combine: Any) -> Any:
    """(Y, qy, ky) and (X, qx, kx) tables of two axes -> (Y * X, qy * qx, ky * kx)."""
    of_pairs = combine(rows[:, None, :, None, :, None], cols[None, :, None, :, None, :])  # (Y, X, qy, qx, ky, kx)
    queries, keys = rows.shape[1] * cols.shape[1], rows.shape[2] * cols.shape[2]
    return of_pairs.reshape(rows.shape[0] * cols.shape[0], queries, keys)


def pick(x: Tensor, axis: int, index: Any) -> Tensor:
    """Copy rows of an axis; the tensor itself where the index is all of it in order."""
    if not isinstance(index, Tensor):
        size = len(index)
        if size == x.shape[axis] and (index[:-1] + 1 == index[1:]).all():
            return x
    return x.index_select(axis, as_tensor(index, x.device))


def by_head(x: Tensor, index: Any) -> Tensor:
    """Pick tokens of (B, H, W, heads, d), as (B, heads, tokens, d)."""
    return pick(x.flatten(1, 2).transpose(1, 2), 2, index)


def to_map(out: Tensor, cut: Cut, heads: int) -> Tensor:
    """(B, heads, tokens of all pieces, d) -> (B, H, W, heads, d)."""
    rows, cols = cut.rows, cut.cols
    in_column, in_row = rows.queries.shape[1], cols.queries.shape[1]
    high, low = rows.place // in_column, rest(rows.place, in_column)
    left, right = cols.place // in_row, rest(cols.place, in_row)
    index = (high * cols.pieces * cut.queries + low * in_row)[:, None] + (left * cut.queries + right)
    return pick(out.transpose(1, 2), 1, index.reshape(-1)).unflatten(1, (rows.length, cols.length))


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, cut: Cut, bias: Tensor | None, scale: float, returns_lse: bool = False
) -> Any:
    """Attend from every query tile to its key tile.

    Args:
        q, k, v: (B, H, W, heads, d).
        cut: how maps are cut, and what queries see.
        bias: (heads, pieces or 1, query tokens, key tokens), added to the scaled logits; or None.
        returns_lse: return the log-sum-exp of the logits too, (B, H, W, heads).
    """
    heads, width, pieces = q.shape[3], cut.cols.length, cut.pieces
    queries = by_head(q, tokens(cut.rows.queries, cut.cols.queries, width)).unflatten(2, (pieces, cut.queries))
    of_keys = tokens(cut.rows.keys, cut.cols.keys, width)
    keys, values = (by_head(x, of_keys).unflatten(2, (pieces, cut.keys)) for x in (k, v))  # (B, heads, pieces, K, d)
    mask = additive_mask(bias, cut, accumulator(q.dtype))
    if not returns_lse:
        return of_one_layout(to_map(attend(queries, keys, values, mask, scale).flatten(2, 3), cut, heads))
    return map_results(attend_lse(queries, keys, values, mask, scale), cut, heads)


def map_results(results: tuple[Tensor, Tensor], cut: Cut, heads: int) -> tuple[Tensor, Tensor]:
    """Put the output and the log-sum-exp of all pieces together, (B, H, W, heads, d) and (B, H, W, heads)."""
    out, lse = (of_one_layout(to_map(x.flatten(2, 3), cut, heads)) for x in results)
    return out, lse.squeeze(-1)


def additive_mask(bias: Tensor | None, cut: Cut, dtype: torch.dtype) -> Tensor | None:
    """(heads or 1, pieces or 1, T, K): the bias where a key is seen, -inf elsewhere; None where nothing is added."""
    if cut.seen is None:
        return None if bias is None else bias.to(dtype)
    added = torch.zeros((), dtype=dtype, device=cut.seen.device) if bias is None else bias.to(dtype)
    mask = torch.where(cut.seen, added, -torch.inf)
    return mask if bias is not None else mask[None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v of (B, heads, pieces, tokens, d); a mask is (heads or 1, pieces or 1, T, K), or
    (B, 1, 1, T, K) where there is one piece.

    Spelled out for exporters: for SDPA, ONNX's would copy k to multiply and to transpose it. Compilers get SDPA, which
    keeps no logits for the backward pass.
    """
    if compiles():
        return _sdpa(q, k, v, mask, scale)
    return product(logits_of(q, k, mask, scale).softmax(-1).to(v.dtype), v)


def attend_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `attend` does; also the log-sum-exp of the logits, (..., T, 1) in the dtype of sums."""
    dtype = v.dtype
    q, k, v = (x.to(accumulator(x.dtype)) for x in (q, k, v))
    logits = logits_of(q, k, mask, scale)
    return product(logits.softmax(-1), v).to(dtype), logits.logsumexp(-1, keepdim=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA's fast kernels take four dimensions; a mask without heads is not repeated."""
    shape = (*q.shape[:-1], v.shape[-1])
    if mask is None or (mask.dim() == 4 and mask.shape[0] == 1):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    else:
        mask = (mask if mask.dim() == 5 else mask.expand(-1, q.shape[2], -1, -1)[None]).flatten(1, 2)
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(shape)


def logits_of(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(..., T, d) and (..., K, d) -> (..., T, K)."""
    logits = product(q * scale, k, transposes=True)
    return logits if mask is None else logits + mask


def product(a: Tensor, b: Tensor, transposes: bool = False) -> Tensor:
    """a @ b, or a @ b^T, for tensors with the same dimensions in front of the last two.

    Where these are free, torch.matmul would ask whether one of them is 1.
    """
    if known(*a.shape, *b.shape) or torch.jit.is_tracing():
        return torch.matmul(a, b.transpose(-2, -1) if transposes else b)
    few_a, few_b = a.flatten(0, -3), b.flatten(0, -3)
    return torch.bmm(few_a, few_b.transpose(1, 2) if transposes else few_b).unflatten(0, tuple(a.shape[:-2]))
