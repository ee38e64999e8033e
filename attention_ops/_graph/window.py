"""Window and HiLo attention for exporters and compilers: one transpose cuts a map, and one puts it together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._attend import accumulator, of_one_layout
from ..shifted_windows import ClippedWindows, Windows
from .clipped import attend_clipped
from .sizes import sides
from .tiles import attend, attend_lse


def window_attention_graph(q: Tensor, k: Tensor, v: Tensor, windows: ClippedWindows, scale: float) -> Tensor:
    """Attend by differentiable operations."""
    queries, keys, values = (to_windows(x, windows.window_size) for x in (q, k, v))
    if windows.clip is None:
        out = attend(queries, keys, values, _added(q, windows), scale)
    else:
        bias = None if windows.bias is None else windows.bias[:, None]
        out = attend_clipped(queries, keys, values, bias, windows.mask, windows.clip, scale)
    return of_one_layout(_to_map(out, sides(q), windows.window_size))


def window_attention_lse_graph(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by differentiable operations; also the log-sum-exp."""
    queries, keys, values = (to_windows(x, windows.window_size) for x in (q, k, v))
    results = attend_lse(queries, keys, values, _added(q, windows), scale)
    out, lse = (of_one_layout(_to_map(x, sides(q), windows.window_size)) for x in results)
    return out, lse.squeeze(-1)


def hilo_attention_graph(
    high: Sequence[Tensor], low: Sequence[Tensor], window_size: tuple[int, int], scale: float
) -> Tensor:
    """Attend by differentiable operations; the heads of the high branch first."""
    outs = []
    if high[0].shape[3]:
        outs.append(window_attention_graph(high[0], high[1], high[2], ClippedWindows(window_size), scale))
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


def _added(q: Tensor, windows: Windows | ClippedWindows) -> Tensor | None:
    """(heads or 1, windows or 1, T, T): the bias where a key is seen, -inf elsewhere; None where nothing is added."""
    wide, bias, mask = accumulator(q.dtype), windows.bias, windows.mask
    if mask is None:
        return None if bias is None else bias.to(wide)[:, None]
    seen = mask | ~mask.any(-1, keepdim=True)  # a row of nothing but -inf would make NaN
    added = torch.zeros((), dtype=wide, device=q.device) if bias is None else bias.to(wide)[:, None]
    combined = torch.where(seen, added, -torch.inf)
    return combined[None] if bias is None else combined
