"""Aggregated attention for exporters and compilers, and what its bodies share: local keys are shifted maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attend import accumulator, of_one_layout
from ..aggregated_parts import Local, Pooled
from .sizes import sides
from .tiles import product


def offsets(kernel: tuple[int, int]) -> list[tuple[int, int]]:
    """Return how far every place of a kernel lies from its middle, row by row."""
    rows, cols = kernel
    return [(y - rows // 2, x - cols // 2) for y in range(rows) for x in range(cols)]


def log_keys_seen(
    size: tuple[int, int], kernel: tuple[int, int], pooled: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(H, W): the logarithm of how many keys every token sees; with local keys it is rounded to float32, see the op."""
    counts = []
    for length, side in zip(size, kernel, strict=True):
        place = torch.arange(length, device=device)
        counts.append((place + side // 2).clamp(max=length - 1) - (place - side // 2).clamp(min=0) + min(side, 1))
    logs = (counts[0][:, None] * counts[1] + pooled).double().log()
    return (logs.float() if kernel[0] > 0 else logs).to(dtype)


def pair_bias(table: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """(heads, R, C), (H, Ph), (W, Pw) -> (heads, H * W, Ph * Pw): the bias of every pair."""
    heads, (height, pooled_h), (width, pooled_w) = table.shape[0], rows.shape, cols.shape
    cells = table.index_select(1, rows.reshape(-1)).index_select(2, cols.reshape(-1))
    cells = cells.reshape(heads, height, pooled_h, width, pooled_w).transpose(2, 3)
    return cells.reshape(heads, height * width, pooled_h * pooled_w)


def gated(out: Tensor, gates: Tensor | None) -> Tensor:
    """Multiply heads by their gates; where a gate is 0, nothing depends on it."""
    if gates is None:
        return out
    gates = gates.to(out.dtype)[..., None]
    return torch.where(gates == 0, 0.0, out * gates)


def aggregated_attention_graph(
    q: Tensor, pooled: Pooled, local: Local, embedding: Tensor, temperature: Tensor, gates: Tensor | None
) -> Tensor:
    """Attend by differentiable operations."""
    wide, dtype, size = accumulator(q.dtype), q.dtype, sides(q)
    u = F.normalize(q.to(wide), dim=-1)
    seen = log_keys_seen(size, local.kernel, pooled.k.shape[1], q.device, wide)
    scaled = (u + embedding.to(wide)) * temperature.to(wide)[:, None] * seen[:, :, None, None]
    queries = scaled.flatten(1, 2).transpose(1, 2)  # (B, heads, H * W, d)
    keys, values = (x.to(wide).transpose(1, 2) for x in (F.normalize(pooled.k.to(wide), dim=-1), pooled.v))
    logits = product(queries, keys, transposes=True)
    logits = logits + pair_bias(pooled.table.to(wide), pooled.rows, pooled.cols)
    if not local.given:
        return _to_map(product(logits.softmax(-1), values), size, gates, dtype)
    k, v, bias, tokens, token_bias = (t.to(wide) for t in local)
    inside = q.new_ones(1, *size, 1, 1, dtype=wide)
    near_k, near_v, near_inside = (_shifted(x, local.kernel, size) for x in (F.normalize(k, dim=-1), v, inside))
    count = len(near_k)
    near = torch.stack([(scaled * k).sum(-1) for k in near_k], -1) + bias.flatten(1)  # (B, H, W, heads, places)
    outside = torch.stack([x.squeeze(-1) for x in near_inside], -1) == 0
    near = near.masked_fill(outside, -torch.inf).flatten(1, 2).transpose(1, 2)
    probs = torch.cat([near, logits], -1).softmax(-1)
    linear = torch.bmm(u.flatten(0, 2).transpose(0, 1), tokens).transpose(0, 1)  # (B * H * W, heads, places)
    linear = linear.unflatten(0, tuple(u.shape[:3])) + token_bias
    weights = probs.narrow(-1, 0, count).transpose(1, 2).unflatten(1, size) + linear
    local_out = sum(weights[..., i, None] * near_v[i] for i in range(count))
    out = product(probs.narrow(-1, count, pooled.k.shape[1]), values).transpose(1, 2).unflatten(1, size)
    return of_one_layout(gated(out + local_out, gates).to(dtype))


def _to_map(out: Tensor, size: tuple[int, int], gates: Tensor | None, dtype: torch.dtype) -> Tensor:
    return of_one_layout(gated(out.transpose(1, 2).unflatten(1, size), gates).to(dtype))


def _shifted(x: Tensor, kernel: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    """The map as every place of a kernel sees it: zeros past the map."""
    (top, left), (height, width) = (kernel[0] // 2, kernel[1] // 2), size
    padded = F.pad(x, (0, 0, 0, 0, left, left, top, top))
    return [
        padded.narrow(1, top + y, height).narrow(2, left + x_step, width) for y, x_step in offsets(kernel)
    ]  # fmt: skip
