"""The ops written from their papers in plain torch, without code of the package: the exact results are float64 runs.

All take maps as the ops do: (B, H, W, heads, head_dim) for attention, (B, C, H, W) for gates.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def neighborhood_axis(
    length: int,
    kernel: int,
    dilation: int,
    causal: bool = False,
    stride: int = 1,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return (length, length): whether a query sees a key, and the cell of the relative position table."""
    position = torch.arange(length, device=device)
    group, rank = position % dilation, position // dilation
    group_length = (length - group + dilation - 1) // dilation
    leader = torch.minimum(rank - rank % stride + (stride - 1 if causal else stride // 2), group_length - 1)
    start = torch.minimum((leader - kernel // 2).clamp(min=0), group_length - kernel)
    start = leader - kernel + 1 if causal else start
    from_start = rank[None] - start[:, None]
    seen = (group[:, None] == group[None]) & (from_start >= 0) & (from_start < kernel)
    if causal:
        seen &= rank[None] <= rank[:, None]
    return seen, (rank[None] - rank[:, None] + kernel - 1).clamp(0, 2 * kernel - 2)


def by_head(x: Tensor) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, H * W, d)."""
    return x.flatten(1, 2).transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attention of all tokens to all tokens where `seen`, (tokens, tokens) bool."""
    return dense_lse(q, k, v, seen, bias, scale)[0]


def dense_lse(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The same, with the log-sum-exp of every query's logits: (B, H, W, heads)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = by_head(q) @ by_head(k).mT * scale
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~seen, -math.inf)
    out, lse = logits.softmax(-1) @ by_head(v), logits.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, q.shape[1:3]), lse.transpose(1, 2).unflatten(1, q.shape[1:3])


def neighborhood_masks(
    size: Pair,
    kernel: Pair,
    dilation: Pair,
    causal: tuple[bool, bool],
    device: torch.device,
    stride: Pair = (1, 1),
) -> tuple[Tensor, Tensor]:
    """Return (tokens, tokens): whether a query sees a key, and the cell of the flattened table."""
    (seen_y, cell_y), (seen_x, cell_x) = (
        neighborhood_axis(*axis, device) for axis in zip(size, kernel, dilation, causal, stride, strict=True)
    )
    tokens = size[0] * size[1]
    seen = (seen_y[:, None, :, None] & seen_x[None, :, None, :]).reshape(tokens, tokens)
    cells = cell_y[:, None, :, None] * (2 * kernel[1] - 1) + cell_x[None, :, None, :]
    return seen, cells.reshape(tokens, tokens)


def neighborhood_attention(*args, **kwargs) -> Tensor:
    return neighborhood_attention_lse(*args, **kwargs)[0]


def neighborhood_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Pair,
    dilation: Pair,
    rpb: Tensor | None = None,
    causal: tuple[bool, bool] = (False, False),
    stride: Pair = (1, 1),
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    seen, cells = neighborhood_masks(tuple(q.shape[1:3]), kernel, dilation, causal, q.device, stride)
    return dense_lse(q, k, v, seen, None if rpb is None else rpb.flatten(1)[:, cells], scale)


def _positions(q: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = (torch.arange(length, device=q.device) for length in q.shape[1:3])
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    return y.flatten(), x.flatten()


def window_attention(*args, **kwargs) -> Tensor:
    return window_attention_lse(*args, **kwargs)[0]


def window_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, size: Pair, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, x = _positions(q)
    of_window = (y // size[0]) * q.shape[2] + x // size[1]
    place = (y % size[0]) * size[1] + x % size[1]
    bias = None if bias is None else bias[:, place[:, None], place[None]]
    return dense_lse(q, k, v, of_window[:, None] == of_window[None], bias, None)


def circle_lse(q: Tensor, k: Tensor, v: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    y, x = _positions(q)
    seen = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius * radius
    return dense_lse(q, k, v, seen, None, None)


def circle(q: Tensor, k: Tensor, v: Tensor, radius: int) -> Tensor:
    return circle_lse(q, k, v, radius)[0]


def halo(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return halo_lse(q, k, v, *arguments)[0]


def halo_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: Pair,
    reach: Pair,
    stride: int = 1,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pad the map, unfold the window of every block; zeros outside the map take part, as in timm's layer."""
    rows, cols = (-(-length // size) for length, size in zip(k.shape[1:3], block, strict=True))
    per_block = [size // stride for size in block]
    seen = [size + 2 * r for size, r in zip(block, reach, strict=True)]
    pad_x = (reach[1], cols * block[1] - k.shape[2] + reach[1])
    pad_y = (reach[0], rows * block[0] - k.shape[1] + reach[0])
    keys, values = (
        F.pad(t, (0, 0, 0, 0, *pad_x, *pad_y)).unfold(1, seen[0], block[0]).unfold(2, seen[1], block[1]) for t in (k, v)
    )  # (B, rows, cols, heads, d, window rows, window columns)
    overhang = (0, 0, 0, 0, 0, cols * per_block[1] - q.shape[2], 0, rows * per_block[0] - q.shape[1])
    queries = F.pad(q, overhang).unflatten(2, (cols, per_block[1])).unflatten(1, (rows, per_block[0]))
    logits = torch.einsum("byhxwnd,byxndij->byxnhwij", queries, keys) * q.shape[-1] ** -0.5
    if rel_h is not None and rel_w is not None:
        cells_h, cells_w = (_relative_cells(seen[i], per_block[i], q.device) for i in (0, 1))
        logits = logits + torch.einsum("byhxwnd,hid->byxnhwi", queries, rel_h[cells_h])[..., None]
        logits = logits + torch.einsum("byhxwnd,wjd->byxnhwj", queries, rel_w[cells_w])[..., None, :]
    probs = logits.flatten(-2).softmax(-1).unflatten(-1, seen)
    out = torch.einsum("byxnhwij,byxndij->byhxwnd", probs, values)
    lse = logits.flatten(-2).logsumexp(-1).permute(0, 1, 4, 2, 5, 3)  # (B, rows, h, columns, w, heads)
    both = (t.flatten(3, 4).flatten(1, 2)[:, : q.shape[1], : q.shape[2]] for t in (out, lse))
    return next(both), next(both)


def _relative_cells(window: int, queries: int, device: torch.device) -> Tensor:
    place, query = torch.arange(window, device=device), torch.arange(queries, device=device)
    return place[None] - query[:, None] + window - 1


def routed(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region: Pair, key_region: Pair) -> Tensor:
    def cut(x: Tensor, size: Pair) -> Tensor:  # (B, regions, tokens, heads, d)
        x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    image = torch.arange(len(q), device=q.device)[:, None, None]
    keys, values = (cut(t, key_region)[image, routes].flatten(2, 3) for t in (k, v))
    logits = torch.einsum("brtnd,brsnd->brnts", cut(q, region), keys) * q.shape[-1] ** -0.5
    out = torch.einsum("brnts,brsnd->brtnd", logits.softmax(-1), values)
    grid = (q.shape[1] // region[0], q.shape[2] // region[1])
    return out.unflatten(2, region).unflatten(1, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def agent(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, to: Tensor | None, of: Tensor | None) -> Tensor:
    queries, keys, values, few = (x.transpose(1, 2) for x in (q, k, v, agents))
    scale = q.shape[-1] ** -0.5
    to_keys, to_agents = few @ keys.mT * scale, queries @ few.mT * scale
    to_keys, to_agents = (a if b is None else a + b for a, b in ((to_keys, to), (to_agents, of)))
    return (to_agents.softmax(-1) @ (to_keys.softmax(-1) @ values)).transpose(1, 2)


def channel(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probs = (torch.einsum("bhwni,bhwnj->bnij", q, k) * scale).softmax(-1)
    return torch.einsum("bnij,bhwnj->bhwni", probs, v)


def channel_gate(x: Tensor, weight: Tensor) -> Tensor:
    reach = weight.shape[-1] // 2
    means = F.pad(x.mean((2, 3)), (reach, reach)).unfold(1, weight.shape[-1], 1)
    return x * (means @ weight.flatten()).sigmoid()[:, :, None, None]


def strip_gate(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_groups: int) -> Tensor:
    def gate(strip: Tensor) -> Tensor:  # (B, C, L)
        y = F.conv1d(strip, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0] // weight.shape[1])
        return F.group_norm(y, norm_groups, norm_weight, norm_bias).sigmoid()

    return x * gate(x.mean(3))[..., None] * gate(x.mean(2))[:, :, None]


def large_kernel(
    x: Tensor,
    local: Tensor,
    local_bias: Tensor,
    dilated: Tensor,
    dilated_bias: Tensor,
    point: Tensor,
    point_bias: Tensor,
    dilation: int,
) -> Tensor:
    channels = x.shape[1]
    y = F.conv2d(x, local, local_bias, padding=local.shape[-1] // 2, groups=channels)
    padding = dilation * (dilated.shape[-1] // 2)
    y = F.conv2d(y, dilated, dilated_bias, padding=padding, dilation=dilation, groups=channels)
    return x * F.conv2d(y, point, point_bias)


def clipped(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, clip: tuple[float, float] | None) -> Tensor:
    """Attention of tokens, (B, N, heads, d), where `seen`, (N, M) bool, with probabilities stretched and clipped."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    probs = (logits if seen is None else logits.masked_fill(~seen, -math.inf)).softmax(-1)
    if clip is not None:
        probs = ((clip[1] - clip[0]) * probs + clip[0]).clip(0, 1)
    probs = probs if seen is None else probs.masked_fill(~seen, 0)
    return torch.einsum("bhnm,bmhd->bnhd", probs, v)


def reversed_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """What every token gives to the tokens that it attends to, summed by receiver."""
    probs = (torch.einsum("bshd,brhd->bhsr", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhsr,bshd->brhd", probs, v * weight[..., None])


def same_window(size: Pair, window: Pair, shift: Pair, device: str | torch.device) -> Tensor:
    """(H * W, H * W) bool: two tokens are in one window, of a map that is cut where windows begin."""
    sides = zip(size, window, shift, strict=True)
    rows, cols = (torch.arange(n, device=device).sub(s).div(w, rounding_mode="floor") for n, w, s in sides)
    number = (rows[:, None] * (2 * size[1]) + cols).flatten()
    return number[:, None] == number


def aggregated(
    q: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_k: Tensor, local_v: Tensor, embedding: Tensor,
    temperature: Tensor, table: Tensor, rows: Tensor, cols: Tensor, local_bias: Tensor, tokens: Tensor,
    token_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Pooled and neighboring keys in one softmax; the neighbors' values get learned weights beside it."""
    kernel = (local_bias.shape[1], local_bias.shape[2])
    unit, local_k, pooled_k = (F.normalize(x, dim=-1) for x in (q, local_k, pooled_k))
    near_k, near_v, inside = (_around(x, kernel) for x in (local_k, local_v, torch.ones_like(local_k[..., :1])))
    inside = inside.squeeze(-1) > 0  # (B, H, W, heads, neighbors)
    count = inside.sum(-1, keepdim=True) + pooled_k.shape[1]
    scaled = (unit + embedding) * temperature[:, None] * count.double().log().float().to(q.dtype)
    near = (scaled[..., None, :] * near_k).sum(-1) + local_bias.flatten(1)
    of_pooled = table[:, rows[:, None, :, None], cols[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)
    far = torch.einsum("bhwnd,bpnd->bhwnp", scaled, pooled_k) + of_pooled
    probs = torch.cat([near.masked_fill(~inside, -torch.inf), far], -1).softmax(-1)
    weights = probs[..., : near.shape[-1]] + torch.einsum("bhwnd,ndk->bhwnk", unit, tokens) + token_bias
    out = (torch.where(inside, weights, 0)[..., None] * near_v).sum(-2)
    return out + torch.einsum("bhwnp,bpnd->bhwnd", probs[..., near.shape[-1] :], pooled_v)


def _around(x: Tensor, kernel: Pair) -> Tensor:
    """(B, H, W, heads, d) -> (B, H, W, heads, neighbors, d), zeros outside the map."""
    (height, width), (rows, cols) = x.shape[1:3], kernel
    padded = F.pad(x, (0, 0, 0, 0, cols // 2, cols // 2, rows // 2, rows // 2))
    shifts = [padded[:, y : y + height, c : c + width] for y in range(rows) for c in range(cols)]
    return torch.stack(shifts, -2)
