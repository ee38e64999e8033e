"""Window and HiLo attention for exporters and compilers: one transpose cuts a map, and one puts it together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._attend import accumulator, of_one_layout
from .sizes import sides
from .tiles import attend, logits_of


def window_attention_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend by differentiable operations."""
    queries, keys, values = (to_windows(x, window_size) for x in (q, k, v))
    out = attend(queries, keys, values, _added(q, bias, mask), scale)
    return of_one_layout(_to_map(out, sides(q), window_size))


def window_attention_lse_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend by differentiable operations; also the log-sum-exp."""
    queries, keys, values = (to_windows(x.to(accumulator(x.dtype)), window_size) for x in (q, k, v))
    logits = logits_of(queries, keys, _added(q, bias, mask), scale)
    out = torch.matmul(logits.softmax(-1), values).to(q.dtype)
    results = (_to_map(x, sides(q), window_size) for x in (out, logits.logsumexp(-1, keepdim=True)))
    out, lse = (of_one_layout(x) for x in results)
    return out, lse.squeeze(-1)


def hilo_attention_graph(
    high: Sequence[Tensor], low: Sequence[Tensor], window_size: tuple[int, int], scale: float
) -> Tensor:
    """Attend by differentiable operations; the heads of the high branch first."""
    outs = []
    if high[0].shape[3]:
        outs.append(window_attention_graph(high[0], high[1], high[2], window_size, None, None, scale))
    if low[0].shape[3]:
        tokens = (x.flatten(1, 2).transpose(1, 2)[:, :, None] for x in low)  # (B, heads, 1, tokens, d)
        queries, keys, values = tokens
        pooled = attend(queries, keys, values, None, scale).flatten(2, 3).transpose(1, 2)
        outs.append(pooled.unflatten(1, sides(low[0])))
    return of_one_layout(outs[0]) if len(outs) == 1 else torch.cat(outs, dim=3)


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, windows, tokens of a window, d)."""
    (height, width), (rows, cols) = sides(x), window
    cut = x.unflatten(2, (width // cols, cols)).unflatten(1, (height // rows, rows))
    return cut.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def _to_map(windows: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
    (height, width), (rows, cols) = size, window
    cut = windows.unflatten(3, (rows, cols)).unflatten(2, (height // rows, width // cols))
    return cut.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)


def _added(q: Tensor, bias: Tensor | None, mask: Tensor | None) -> Any:
    """(heads or 1, windows or 1, T, T): the bias where a key is seen, -inf elsewhere; None where nothing is added."""
    wide = accumulator(q.dtype)
    if mask is None:
        return None if bias is None else bias.to(wide)[:, None]
    seen = mask | ~mask.any(-1, keepdim=True)  # a row of nothing but -inf would make NaN
    added = torch.zeros((), dtype=wide, device=q.device) if bias is None else bias.to(wide)[:, None]
    combined = torch.where(seen, added, -torch.inf)
    return combined[None] if bias is None else combined
