"""The ops as the papers define them, over all pairs of tokens in float64: slow, and without a line of attention_ops.

Maps are (B, H, W, heads, d); tokens are counted row by row. A token sees a key if it sees it on both axes, but for
circles and routes, which are no product of axes.
"""

import torch
from torch import Tensor

Axis = tuple[Tensor, Tensor]  # (queries, keys) bool: seen; int64: cell of the table of relative positions


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    """Attention of (B, T, heads, d) to (B, K, heads, d), with (T, K) or (B, 1, T, K) bool, bias (B|1, heads, T, K)."""
    return attend_lse(q, k, v, seen, scale, bias)[..., :-1]


def attend_lse(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, bias: Tensor | None = None
) -> Tensor:
    """The same with one more channel: the logarithm of the sum of exp(logit), (B, T, heads, d + 1)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthd,bkhd->bhtk", q, k) * scale
    logits = logits if bias is None else logits + bias
    logits = logits.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bhtk,bkhd->bthd", logits.softmax(-1), v)
    return torch.cat([out, logits.logsumexp(-1).transpose(1, 2)[..., None]], -1)


def attend_clipped(q, k, v, seen, scale, bias=None, *, clip=None) -> Tensor:
    """arXiv:2306.12929, equation 4: probabilities are stretched to (gamma, zeta) and clipped. seen broadcasts to
    (B, heads, T, K), bias to the logits; a query that sees nothing gives zeros."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthd,bkhd->bhtk", q, k) * scale
    logits = logits if bias is None else logits + bias
    probs = logits.masked_fill(~(seen | ~seen.any(-1, keepdim=True)), -torch.inf).softmax(-1)
    if clip is not None:
        probs = ((clip[1] - clip[0]) * probs + clip[0]).clip(0, 1)
    return torch.einsum("bhtk,bkhd->bthd", probs.masked_fill(~seen, 0), v)


def dense_attention(q, k, v, mask, clip, gate, scale) -> Tensor:
    seen = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool) if mask is None else mask
    out = attend_clipped(q, k, v, seen, scale, clip=clip)
    return out if gate is None else out * gate[..., None]


def sparse_attention(q, k, v, columns, scale) -> Tensor:
    """arXiv:2303.13755: a query sees the keys of its numbers."""
    seen = (columns[..., None] == torch.arange(k.shape[1])).any(-2)
    return attend_clipped(q, k, v, seen, scale)


def reversed_attention(q, k, v, weight, scale) -> Tensor:
    """arXiv:2304.03282: what a token gives to the tokens that it attends to."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probs = (torch.einsum("bshd,brhd->bhsr", q, k) * scale).softmax(-1)
    return torch.einsum("bhsr,bsh,bshd->brhd", probs, weight, v)


def of_both(rows: Tensor, cols: Tensor) -> Tensor:
    """(H, Y), (W, X) -> (H * W, Y * X): seen on both axes."""
    return (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def cells_of_both(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """(H, Y), (W, X) -> two of (H * W, Y * X): the row and the column of the table that a pair uses."""
    shape = (*rows.shape, *cols.shape)
    of_rows, of_cols = rows[:, :, None, None].expand(shape), cols[None, None].expand(shape)
    return _by_tokens(of_rows), _by_tokens(of_cols)


def _by_tokens(pairs: Tensor) -> Tensor:
    """(H, Y, W, X) -> (H * W, Y * X)."""
    return pairs.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)


def on_map(out: Tensor, like: Tensor) -> Tensor:
    return out.unflatten(1, like.shape[1:3])


def agent(q, k, v, agents, bias_to, bias_from, scale) -> Tensor:
    """arXiv:2312.08874: agents gather from all keys, queries read from all agents."""
    seen = [
        torch.ones(n, m, dtype=torch.bool) for n, m in ((agents.shape[1], k.shape[1]), (q.shape[1], agents.shape[1]))
    ]
    gathered = attend(agents, k, v, seen[0], scale, None if bias_to is None else bias_to[None])
    return attend(q, agents, gathered, seen[1], scale, None if bias_from is None else bias_from[None])


def neighborhood(q, k, v, kernel_size, dilation, stride, rpb, is_causal, scale, attend=attend) -> Tensor:
    """arXiv:2204.07143 and 2209.15001; causal axes as in arXiv:2403.04690, strides as in arXiv:2504.16922."""
    settings = zip(q.shape[1:3], kernel_size, dilation, is_causal, stride, strict=True)
    rows, cols = (neighborhood_axis(*of_axis) for of_axis in settings)
    bias = None
    if rpb is not None:
        of_rows, of_cols = cells_of_both(rows[1], cols[1])
        bias = rpb[:, of_rows, of_cols][None]
    out = attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), of_both(rows[0], cols[0]), scale, bias)
    return on_map(out, q)


def neighborhood_axis(length: int, kernel: int, dilation: int, causal: bool, stride: int) -> Axis:
    seen = torch.zeros(length, length, dtype=torch.bool)
    cells = torch.zeros(length, length, dtype=torch.int64)
    for query in range(length):
        group = range(query % dilation, length, dilation)
        rank = query // dilation
        leader = min(rank // stride * stride + (stride - 1 if causal else stride // 2), len(group) - 1)
        first = max(leader - kernel + 1, 0) if causal else min(max(leader - kernel // 2, 0), len(group) - kernel)
        last = rank if causal else first + kernel - 1
        for other in range(first, last + 1):
            seen[query, group[other]] = True
            cells[query, group[other]] = other - rank + kernel - 1
    return seen, cells


def window(q, k, v, window_size, bias, mask, scale, attend=attend, shift=(0, 0)) -> Tensor:
    """arXiv:2103.14030: windows of one size; shifted ones hold what lies side by side on the map."""
    place = [torch.arange(length) for length in q.shape[1:3]]
    # of the map rolled back by `shift`, whose last window holds both ends of the map
    rolled = [(at - step) % len(at) for at, step in zip(place, shift, strict=True)]
    number = [at // size for at, size in zip(rolled, window_size, strict=True)]
    inside = [at % size for at, size in zip(rolled, window_size, strict=True)]
    of_window = (number[0][:, None] * (q.shape[2] // window_size[1]) + number[1]).flatten()
    of_token = (inside[0][:, None] * window_size[1] + inside[1]).flatten()
    seen = of_window[:, None] == of_window
    first_end = [at < step for at, step in zip(place, shift, strict=True)]
    for end in (first_end[0][:, None].expand(q.shape[1:3]), first_end[1].expand(q.shape[1:3])):
        seen = seen & (end.flatten()[:, None] == end.flatten())
    if mask is not None:
        seen = seen & mask[of_window[:, None], of_token[:, None], of_token]
    dense = None if bias is None else bias[:, of_token[:, None], of_token][None]
    return on_map(attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), seen, scale, dense), q)


def halo(q, k, v, block_size, halo, stride, rel_h, rel_w, scale, attend=attend) -> Tensor:
    """arXiv:2103.12731: blocks see themselves and a border; zeros past the map are seen as keys."""
    sides = [halo_axis(*of_axis, stride) for of_axis in zip(q.shape[1:3], block_size, halo, strict=True)]
    (rows, _), (cols, _) = sides
    keys, values = (_with_border(x, rows.shape[1], cols.shape[1], halo) for x in (k, v))
    bias = None
    if rel_h is not None:
        of_rows, of_cols = cells_of_both(sides[0][1], sides[1][1])
        bias = torch.einsum("bthd,tkd->bhtk", q.flatten(1, 2), rel_h[of_rows] + rel_w[of_cols])
    return on_map(attend(q.flatten(1, 2), keys, values, of_both(rows, cols), scale, bias), q)


def halo_axis(queries: int, block: int, halo: int, stride: int) -> Axis:
    """Seen and cells of keys from `halo` before the map to `halo` past its last block."""
    of_block = block // stride
    blocks = -(-queries // of_block)
    seen = torch.zeros(queries, blocks * block + 2 * halo, dtype=torch.bool)
    cells = torch.zeros(seen.shape, dtype=torch.int64)
    for query in range(queries):
        for place in range(block + 2 * halo):
            key = query // of_block * block + place
            seen[query, key] = True
            cells[query, key] = place - query % of_block + block + 2 * halo - 1
    return seen, cells


def _with_border(x: Tensor, rows: int, cols: int, halo: tuple[int, int]) -> Tensor:
    wide = x.new_zeros(x.shape[0], rows + x.shape[1], cols + x.shape[2], *x.shape[3:])
    wide[:, halo[0] : halo[0] + x.shape[1], halo[1] : halo[1] + x.shape[2]] = x
    return wide[:, :rows, :cols].flatten(1, 2)


def circle(q, k, v, radius, scale, attend=attend) -> Tensor:
    """CLEAR, arXiv:2412.16112: keys at a distance below the radius."""
    y, x = (at.flatten() for at in torch.meshgrid(*(torch.arange(n) for n in q.shape[1:3]), indexing="ij"))
    seen = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    return on_map(attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), seen, scale), q)


def routed(q, k, v, routes, region_size, kv_region_size, scale) -> Tensor:
    """BiFormer, arXiv:2303.08810: a region sees the regions that it is routed to."""
    of_query, of_key = (_regions(x, size) for x, size in ((q, region_size), (k, kv_region_size)))
    allowed = torch.zeros(len(q), routes.shape[1], int(of_key.max()) + 1, dtype=torch.bool)
    for image, region, target in torch.cartesian_prod(*(torch.arange(n) for n in routes.shape)).tolist():
        allowed[image, region, routes[image, region, target]] = True
    seen = allowed[:, of_query[:, None], of_key][:, None]
    return on_map(attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), seen, scale), q)


def _regions(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(H * W,): the region of every token."""
    rows, cols = (torch.arange(length) // side for length, side in zip(x.shape[1:3], size, strict=True))
    return (rows[:, None] * (int(cols[-1]) + 1) + cols).flatten()


def hilo(hq, hk, hv, lq, lk, lv, window_size, scale) -> Tensor:
    """LITv2, arXiv:2205.13213: some heads attend in windows, the others to a pooled map."""
    low_seen = torch.ones(lq.shape[1] * lq.shape[2], lk.shape[1] * lk.shape[2], dtype=torch.bool)
    low = on_map(attend(lq.flatten(1, 2), lk.flatten(1, 2), lv.flatten(1, 2), low_seen, scale), lq)
    return torch.cat([window(hq, hk, hv, window_size, None, None, scale), low], 3)


def channel(q, k, v, scale) -> Tensor:
    """DaViT, arXiv:2204.03645: channels of a head attend to each other over all tokens."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (torch.einsum("byxhc,byxhd->bhcd", q, k) * scale).softmax(-1)
    return torch.einsum("bhcd,byxhd->byxhc", weights, v)


def channel_gate(x, weight) -> Tensor:
    """ECA-Net, arXiv:1910.03151."""
    return x * torch.sigmoid(strip_convolution(x.mean((2, 3))[:, None], weight))[:, 0, :, None, None]


def strip_gate(x, weight, norm_weight, norm_bias, norm_groups, eps) -> Tensor:
    """ELA, arXiv:2403.01123."""
    rows, cols = (_strip(x.mean(axis), weight, norm_weight, norm_bias, norm_groups, eps) for axis in (3, 2))
    return x * rows[:, :, :, None] * cols[:, :, None, :]


def _strip(x, weight, norm_weight, norm_bias, norm_groups, eps) -> Tensor:
    x = strip_convolution(x, weight).unflatten(1, (norm_groups, -1))
    mean = x.mean((2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((2, 3), keepdim=True)
    x = ((x - mean) / (variance + eps).sqrt()).flatten(1, 2)
    return torch.sigmoid(x * norm_weight[:, None] + norm_bias[:, None])


def strip_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, L), (D, C / groups, k) -> (B, D, L): zero padding keeps the length."""
    out_channels, of_group, taps = weight.shape
    groups, length, half = x.shape[1] // of_group, x.shape[2], taps // 2
    wide = torch.cat([x.new_zeros(*x.shape[:2], half), x, x.new_zeros(*x.shape[:2], half)], 2)
    wide = wide.unflatten(1, (groups, of_group))
    by_group = weight.unflatten(0, (groups, out_channels // groups))
    shifted = [torch.einsum("bgcl,gdc->bgdl", wide[..., tap : tap + length], by_group[..., tap]) for tap in range(taps)]
    return torch.stack(shifted).sum(0).flatten(1, 2)


def subspace_gate(x, scale, shift, weight, bias) -> Tensor:
    """ULSAM, arXiv:2006.15102, with the norms folded into the layers before them."""
    groups, (height, width) = weight.shape[0], x.shape[2:]
    y = (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    wide = y.new_zeros(*y.shape[:2], height + 2, width + 2)
    wide[:, :, 1:-1, 1:-1] = y
    shifted = [wide[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    tops = torch.stack(shifted).amax(0).unflatten(1, (groups, -1))
    logits = (torch.einsum("bgcyx,gc->bgyx", tops, weight) + bias[:, None, None]).clamp(min=0)
    powers = (logits - logits.amax((2, 3), keepdim=True)).exp()
    gate = powers / powers.sum((2, 3), keepdim=True)
    return (x.unflatten(1, (groups, -1)) * (1 + gate[:, :, None])).flatten(1, 2)


def grouped_query(q, k, v, key_heads, scale) -> Tensor:
    """GQA, arXiv:2305.13245, with any key head for a query head."""
    picked = torch.nn.functional.one_hot(key_heads, k.shape[2]).to(k.dtype)  # (B or 1, heads, kv_heads)
    keys, values = (torch.einsum("bmjd,bhj->bmhd", x, picked.expand(len(x), -1, -1)) for x in (k, v))
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    return attend(q, keys, values, seen, scale)


def large_kernel(
    x, local_weight, local_bias, dilated_weight, dilated_bias, point_weight, point_bias, dilation
) -> Tensor:
    """VAN, arXiv:2202.09741."""
    gate = depthwise(depthwise(x, local_weight, local_bias, 1), dilated_weight, dilated_bias, dilation)
    gate = torch.einsum("bcyx,dc->bdyx", gate, point_weight[:, :, 0, 0])
    return x * (gate if point_bias is None else gate + point_bias[:, None, None])


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    (_, _, rows, cols), (height, width) = weight.shape, x.shape[2:]
    top, left = rows // 2 * dilation, cols // 2 * dilation
    wide = x.new_zeros(*x.shape[:2], height + 2 * top, width + 2 * left)
    wide[:, :, top : top + height, left : left + width] = x
    shifted = [
        wide[:, :, i * dilation : i * dilation + height, j * dilation : j * dilation + width] * weight[:, :, i, j, None]
        for i in range(rows)
        for j in range(cols)
    ]
    total = torch.stack(shifted).sum(0)
    return total if bias is None else total + bias[:, None, None]


def dense(x, weight, bias, activation, residual) -> Tensor:
    out = torch.einsum("...k,nk->...n", x, weight)
    out = out if bias is None else out + bias
    if activation == "relu":
        out = out.clamp(min=0)
    elif activation == "gelu":
        out = out * (1 + torch.erf(out / 2**0.5)) / 2
    elif activation == "silu":
        out = out * torch.sigmoid(out)
    return out if residual is None else out + residual


def circle_with_more(q, k, v, cell_weight, text_k, text_v, radius, scale, attend=attend) -> Tensor:
    """CLEAR, arXiv:2412.16112: circles, text, and weighted sums of cells, in one softmax."""
    keys, values = [k.flatten(1, 2)], [v.flatten(1, 2)]
    y, x = (at.flatten() for at in torch.meshgrid(*(torch.arange(n) for n in q.shape[1:3]), indexing="ij"))
    seen = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    if text_k is not None:
        keys, values = [*keys, text_k], [*values, text_v]
    if cell_weight is not None:
        keys, values = [*keys, _cells(k, cell_weight)], [*values, _cells(v, cell_weight)]
    keys, values = torch.cat(keys, 1), torch.cat(values, 1)
    others = torch.ones(len(seen), keys.shape[1] - len(seen), dtype=torch.bool)
    return on_map(attend(q.flatten(1, 2), keys, values, torch.cat([seen, others], 1), scale), q)


def _cells(x: Tensor, weight: Tensor) -> Tensor:
    (rows, cols), (height, width) = weight.shape, x.shape[1:3]
    found = []
    for top in range(0, height, rows):
        for left in range(0, width, cols):
            cell = x[:, top : top + rows, left : left + cols]
            found.append((cell * weight[:, :, None, None]).sum((1, 2)))
    return torch.stack(found, 1)


def aggregated(
    q, pooled_k, pooled_v, local_k, local_v, embedding, temperature, table, rows, cols, local_bias, tokens, token_bias,
    gates,
) -> Tensor:  # fmt: skip
    """TransNeXt, arXiv:2311.17132, with the gates of MoH, arXiv:2410.11842, one query at a time."""
    height, width, pooled_w = q.shape[1], q.shape[2], cols.shape[1]
    near = (
        [] if local_bias is None else [(y, x) for y in range(local_bias.shape[1]) for x in range(local_bias.shape[2])]
    )
    out = []
    for y in range(height):
        for x in range(width):
            unit = _unit(q[:, y, x])
            of_pooled = torch.stack(
                [table[:, rows[y, t // pooled_w], cols[x, t % pooled_w]] for t in range(pooled_k.shape[1])]
            )  # fmt: skip
            keys, values, biases, linear = (
                list(_unit(pooled_k).unbind(1)),
                list(pooled_v.unbind(1)),
                list(of_pooled),
                [],
            )
            weights = [None] * len(keys)
            for place, (dy, dx) in enumerate(near):
                ky, kx = y + dy - local_bias.shape[1] // 2, x + dx - local_bias.shape[2] // 2
                if 0 <= ky < height and 0 <= kx < width:
                    keys.append(_unit(local_k[:, ky, kx]))
                    values.append(local_v[:, ky, kx])
                    biases.append(local_bias[:, dy, dx])
                    weights.append((unit * tokens[:, :, place]).sum(-1) + token_bias[:, place])
            scaled = (unit + embedding) * temperature[:, None] * _log(len(keys), bool(near))
            logits = torch.stack([(scaled * k).sum(-1) + b for k, b in zip(keys, biases, strict=True)], -1)
            probs = logits.softmax(-1)
            linear = [p if w is None else p + w for p, w in zip(probs.unbind(-1), weights, strict=True)]
            result = sum(w[..., None] * v for w, v in zip(linear, values, strict=True))
            out.append(result if gates is None else result * gates[:, y, x, :, None])
    return torch.stack(out, 1).unflatten(1, (height, width))


def _log(count: int, rounds: bool) -> float:
    """Of the number of keys; the authors round it to float32 where there are local keys."""
    log = torch.tensor(float(count), dtype=torch.float64).log()
    return float(log.float() if rounds else log)


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def flow(q, k, v, form) -> Tensor:
    """Flowformer, arXiv:2202.06258, one query at a time; causal: with the keys up to it."""
    eps, outer = 1e-6, 1e-6 if form == "vision" else 0.0
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    causal = form == "causal"

    def amounts(x, other, weights=None):  # what flows through every token of x
        other = other if weights is None else other * weights[..., None]
        totals = [(other[:, : i + 1] if causal else other).sum(1) for i in range(x.shape[1])]
        found = [((x[:, i] + eps) * (total + eps)).sum(-1) + outer for i, total in enumerate(totals)]
        return torch.stack(found, 1)  # (B, N, heads)

    place = torch.arange(1, q.shape[1] + 1, dtype=q.dtype)[:, None] if causal else 1.0
    incoming, outgoing = place / amounts(q, k), place / amounts(k, q)
    sinks = amounts(q, k, outgoing) / place
    sources = (amounts(k, q, incoming) / place).clamp(-1, 1)
    if not causal:
        sinks = sinks * (q.shape[1] / k.shape[1])
    out = []
    for i in range(q.shape[1]):
        last = i + 1 if causal else k.shape[1]
        # the competition of key j among those up to itself, or among all
        shares = [
            sources[:, j].exp()
            / (sources[:, : j + 1] if causal else sources).exp().sum(1)
            * (j + 1 if causal else last)
            for j in range(last)
        ]
        weights = [(q[:, i] * k[:, j]).sum(-1) * shares[j] for j in range(last)]
        mixed = sum(w[..., None] * v[:, j] for j, w in enumerate(weights))
        factor = incoming[:, i] / (i + 1 if causal else 1) * torch.sigmoid(sinks[:, i])
        out.append(mixed * factor[..., None])
    return torch.stack(out, 1)


def kernelized(q, k, v, omega, rel, size, prefix, normalize) -> Tensor:
    """NPRF, arXiv:2106.12566, equations 5 and 10, one query at a time."""
    q, k = (_unit(x) if normalize else x for x in (q, k))
    q, k = (torch.exp(x @ omega.mT - x.square().sum(-1, keepdim=True) / 2) for x in (q, k))  # (B, N, heads, m)
    out = []
    for i in range(q.shape[1]):
        weights = []
        for j in range(q.shape[1]):
            weight = (q[:, i] * k[:, j]).sum(-1)
            if rel is not None and min(i, j) >= prefix:
                (y, x), (ky, kx) = divmod(i - prefix, size[1]), divmod(j - prefix, size[1])
                weight = weight * rel[:, ky - y + size[0] - 1, kx - x + size[1] - 1].exp()
            weights.append(weight)
        weights = torch.stack(weights, 1)
        out.append((weights[..., None] * v).sum(1) / weights.sum(1)[..., None])
    return torch.stack(out, 1)


def clusters(q, k, v, q_members, k_members, memory_k, memory_v, mask, causal, self_logit, eps, scale) -> Tensor:
    """Routing Transformer, arXiv:2003.05997, one query of one cluster at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, counts = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.zeros(q.shape[:3], dtype=q.dtype)
    total: list[list[Tensor]] = [[] for _ in range(out[..., 0].numel())]
    for b, h, c, w in torch.cartesian_prod(*(torch.arange(n) for n in q_members.shape)).tolist():
        i = int(q_members[b, h, c, w])
        counts[b, i, h] += 1
        logits, values = [], []
        for m in range(0 if memory_k is None else memory_k.shape[2]):
            logits.append((q[b, i, h] * memory_k[h, c, m]).sum() * scale)
            values.append(memory_v[h, c, m])
        for j in k_members[b, h, c].tolist():
            if (causal and j > i) or (mask is not None and mask[b, h, j]):
                continue
            own = (q[b, i, h] * k[b, j, h]).sum() * scale
            logits.append(own * 0 + self_logit if j == i and self_logit is not None else own)
            values.append(v[b, j, h])
        if logits:
            probs = torch.stack(logits).softmax(0)
            total[(b * q.shape[1] + i) * q.shape[2] + h].append((probs[:, None] * torch.stack(values)).sum(0))
    zero = (q.sum() + k.sum() + v.sum()) * 0 + v.new_zeros(v.shape[-1])
    sums = torch.stack([sum(parts, zero) for parts in total]).view(out.shape)
    return sums / (counts[..., None] + eps)
