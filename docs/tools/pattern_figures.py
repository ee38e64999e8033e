"""What a query sees, for every op: weights that the op's reference body gives to an identity of values.

If entry j of value j is 1 and all others are 0, entry j of an op's output is the weight of key j. With q = k = 0 all
keys that a query sees weigh the same, which shows the pattern alone. Patterns that depend on the content are computed
on one random, smooth map, `scene`.
"""

import math

import torch
import torch.nn.functional as F
from panels import Panel
from torch import Tensor

from foveate.attention_ops import (
    MaskPredictor,
    agent_attention,
    bi_level_routes,
    channel_attention,
    circle_attention,
    cluster_attention,
    cluster_members,
    dense_attention,
    flow_attention,
    halo_attention,
    hilo_attention,
    kernelized_attention,
    neighborhood_attention,
    reversed_attention,
    routed_attention,
    window_attention,
)
from foveate.attention_ops.local_queries import local_queries, rollout_row

SIZE = HEIGHT, WIDTH = 12, 16  # never square, so that swapped axes show
TOKENS = HEIGHT * WIDTH
INSIDE, CORNER = (5, 8), (0, 1)
REFERENCE = "reference"


def scene(channels: int, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """Return a random smooth map, (1, H, W, channels), with mean 0 and standard deviation 1."""
    coarse = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    return (smooth - smooth.mean()) / smooth.std()


def identity(size: tuple[int, int] = SIZE) -> Tensor:
    """Return values (1, H, W, 1, H * W): entry j of token j is 1."""
    return torch.eye(size[0] * size[1]).view(1, *size, 1, -1)


def zeros(dim: int = 1, size: tuple[int, int] = SIZE) -> Tensor:
    """Return queries or keys (1, H, W, 1, dim) that make all logits 0."""
    return torch.zeros(1, *size, 1, dim)


def of_query(out: Tensor, query: tuple[int, int], size: tuple[int, int] = SIZE) -> Tensor:
    """Return the weights of one query, (H, W), from the output (1, H, W, 1, H * W)."""
    return out[0, query[0], query[1], 0].view(size)


def neighborhood_weights(query: tuple[int, int], kernel_size: int, **options) -> Tensor:
    """Return which keys neighborhood attention shows to a query, with equal logits."""
    out = neighborhood_attention(zeros(), zeros(), identity(), kernel_size, impl=REFERENCE, **options)
    return of_query(out, query)


def neighborhood() -> list[Panel]:
    return [
        Panel("kernel 7", neighborhood_weights(INSIDE, 7), INSIDE),
        Panel("kernel 7 at the border", neighborhood_weights(CORNER, 7), CORNER),
        Panel("kernel 5, dilation 2", neighborhood_weights(INSIDE, 5, dilation=2), INSIDE),
        Panel("kernel 5, causal", neighborhood_weights(INSIDE, 5, is_causal=True), INSIDE),
    ]


def biased() -> list[Panel]:
    """One window over the whole map, as ViT-rpb, with a bias that falls with the distance."""
    rows, cols = torch.arange(1 - HEIGHT, HEIGHT)[:, None], torch.arange(1 - WIDTH, WIDTH)
    table = -0.4 * (rows.square() + cols.square()).sqrt()[None]
    out = neighborhood_attention(zeros(), zeros(), identity(), SIZE, rpb=table, impl=REFERENCE)
    plain = neighborhood_attention(zeros(), zeros(), identity(), SIZE, impl=REFERENCE)
    return [
        Panel("all tokens, no bias", of_query(plain, INSIDE), INSIDE),
        Panel("bias by distance", of_query(out, INSIDE), INSIDE),
        Panel("the same at the border", of_query(out, CORNER), CORNER),
    ]


def window_weights(query: tuple[int, int], window: int, shift: int = 0) -> Tensor:
    """Return which keys window attention shows to a query, with equal logits."""
    return of_query(window_attention(zeros(), zeros(), identity(), window, shift=shift, impl=REFERENCE), query)


def dual() -> list[Panel]:
    """DaViT: attention in windows, and attention of channels to channels."""
    x = scene(8, seed=1)[:, :, :, None]
    values = torch.zeros_like(x)
    for channel in range(8):
        values[0, 0, channel, 0, channel] = 1  # token c of the first row holds an identity of channels
    mixed = channel_attention(x, x, values, scale=4 / TOKENS, impl=REFERENCE)[0, 0, :8, 0]
    return [
        Panel("window attention, 4x4", window_weights(INSIDE, 4), INSIDE, (4, 4)),
        Panel("channel attention", mixed.T, labels=("channel of k", "channel of q")),
    ]


def halo_weights(query: tuple[int, int], block: int, halo: int) -> Tensor:
    """Return the weights of a block and its halo; zeros outside the map take the rest of the sum."""
    return of_query(halo_attention(zeros(), zeros(), identity(), block, halo, impl=REFERENCE), query)


def halo() -> list[Panel]:
    inside, corner = halo_weights(INSIDE, 4, 2), halo_weights(CORNER, 4, 2)
    return [
        Panel("block 4, halo 2", inside, INSIDE, (4, 4)),
        Panel(f"at the border: sum {corner.sum():.2f}", corner, CORNER, (4, 4)),
    ]


def routed() -> list[Panel]:
    """BiFormer: the regions whose mean keys agree most with the mean query of the region."""
    x = scene(16, seed=3)[:, :, :, None]
    routes = bi_level_routes(x, x, region_size=2, topk=6)

    def weights(q: Tensor) -> Tensor:
        return of_query(routed_attention(q, x, identity(), routes, region_size=2, impl=REFERENCE), INSIDE)

    return [
        Panel("6 of 48 regions", weights(torch.zeros_like(x)), INSIDE, (2, 2)),
        Panel("attention to their tokens", weights(x), INSIDE, (2, 2)),
    ]


def hilo() -> list[Panel]:
    """LITv2: windows for some heads, pooled tokens of the whole map for the others."""

    def pool(x: Tensor) -> Tensor:  # (1, H, W, 1, d) -> (1, H / 4, W / 4, 1, d)
        return F.avg_pool2d(x[:, :, :, 0].permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)[:, :, :, None]

    x = F.pad(scene(16, seed=4)[:, :, :, None], (0, TOKENS - 16))  # as wide as the identity of values
    high = [zeros(TOKENS), zeros(TOKENS), identity()]
    out = hilo_attention(high, [x, pool(x), pool(identity())], 4, scale=16**-0.5, impl=REFERENCE)
    return [
        Panel("high-frequency heads: 4x4 windows", of_query(out[..., :1, :], INSIDE), INSIDE, (4, 4)),
        Panel("low-frequency heads: pooled cells", of_query(out[..., 1:, :], INSIDE), INSIDE, (4, 4)),
    ]


def circle() -> list[Panel]:
    def weights(query: tuple[int, int], **options) -> Tensor:
        return of_query(circle_attention(zeros(), zeros(), identity(), 4, impl=REFERENCE, **options), query)

    cells = torch.full((4, 4), 1 / 16)
    return [
        Panel("radius 4", weights(INSIDE), INSIDE),
        Panel("radius 4 at the border", weights(CORNER), CORNER),
        Panel("and means of 4x4 cells", weights(INSIDE, cell_weight=cells), INSIDE, (4, 4)),
    ]


# Attention of tokens: q and k of the scene


def tokens(channels: int, seed: int, factor: float = 1.0) -> Tensor:
    """Return the scene as queries and keys of one head, (1, H * W, 1, channels)."""
    return factor * scene(channels, seed).flatten(1, 2)[:, :, None]


def token_values() -> Tensor:
    return torch.eye(TOKENS)[None, :, None]


def of_token(out: Tensor, query: tuple[int, int], size: tuple[int, int] = SIZE) -> Tensor:
    """Return the weights of one query, (H, W), from the output (1, N, 1, H * W)."""
    return out[0, query[0] * WIDTH + query[1], 0].view(size)


def agents() -> list[Panel]:
    x, few = tokens(16, seed=5, factor=1.5), (3, 4)
    pooled = F.adaptive_avg_pool2d(1.5 * scene(16, seed=5).permute(0, 3, 1, 2), few).flatten(2).mT[:, :, None]
    wide = [F.pad(t, (0, TOKENS - 16)) for t in (x, pooled)]  # as wide as the identity of values
    scale = 16**-0.5
    gathers = dense_attention(pooled, x, token_values(), scale=scale, impl=REFERENCE)
    reads = dense_attention(x, pooled, torch.eye(12)[None, :, None], scale=scale, impl=REFERENCE)
    both = agent_attention(wide[0], wide[0], token_values(), wide[1], scale=scale, impl=REFERENCE)
    return [
        Panel("a query reads from 12 agents", of_token(reads, INSIDE, few)),
        Panel("one agent gathers from all keys", gathers[0, 6, 0].view(SIZE), cell=(4, 4)),
        Panel("query to keys, both together", of_token(both, INSIDE), INSIDE, (4, 4)),
    ]


def flow() -> list[Panel]:
    x = tokens(16, seed=6)
    soft = dense_attention(x, x, token_values(), impl=REFERENCE)
    linear = flow_attention(x, x, token_values(), impl=REFERENCE)
    return [
        Panel("softmax attention", of_token(soft, INSIDE), INSIDE),
        Panel("Flow-Attention", of_token(linear, INSIDE), INSIDE),
    ]


def clipped() -> list[Panel]:
    x = tokens(16, seed=7)
    plain = dense_attention(x, x, token_values(), impl=REFERENCE)
    clip = dense_attention(x, x, token_values(), clip=(-0.01, 1.0), impl=REFERENCE)
    rows = torch.stack([of_token(out, INSIDE).flatten().sort(descending=True).values for out in (plain, clip)])
    return [
        Panel("softmax", of_token(plain, INSIDE), INSIDE),
        Panel("clipped, gamma = -0.01", of_token(clip, INSIDE), INSIDE),
        Panel("sorted weights", rows, labels=("key", "weight"), lines=("softmax", "clipped")),
    ]


def sparsified() -> list[Panel]:
    """A predictor with random weights chooses 25 % of the keys."""
    x = F.pad(scene(32, seed=8).flatten(1, 2), (0, 0, 1, 0)).unflatten(2, (2, 16)).transpose(1, 2)  # class token first
    torch.manual_seed(0)
    predictor = MaskPredictor(32, 2, map_size=SIZE, prefix_tokens=1)
    torch.nn.init.normal_(predictor.proj_n, std=0.2)
    mask = predictor.mask(predictor(x, x, SIZE), math.ceil((TOKENS + 1) / 4))
    queries, values = x.transpose(1, 2), torch.eye(TOKENS + 1)[None, :, None].expand(-1, -1, 2, -1)
    out = dense_attention(queries, queries, values, mask=mask, impl=REFERENCE)
    place = 1 + INSIDE[0] * WIDTH + INSIDE[1]
    return [
        Panel("keys that are chosen", mask[0, 0, place, 1:].float().view(SIZE), INSIDE),
        Panel("attention to them", out[0, place, 0, 1:].view(SIZE), INSIDE),
    ]


def reverse() -> list[Panel]:
    x, other = tokens(16, seed=9), tokens(16, seed=10)
    sees = dense_attention(x, other, token_values(), impl=REFERENCE)
    receives = reversed_attention(x, other, token_values(), torch.ones(1, TOKENS, 1), impl=REFERENCE)
    return [
        Panel("forward: what a token attends to", of_token(sees, INSIDE), INSIDE),
        Panel("reversed: who attends to it", of_token(receives, INSIDE), INSIDE),
    ]


def clusters() -> list[Panel]:
    x = tokens(16, seed=11)
    means = x[0, torch.tensor([10, 60, 110, 160]), 0][None]  # (heads, clusters, d)
    members = cluster_members(x, means, window=64)
    out = cluster_attention(x, x, token_values(), members, members, impl=REFERENCE)
    query = divmod(int(members[0, 0, 1, 20]), WIDTH)
    inside = torch.zeros(4, TOKENS).scatter(1, members[0, 0], 1.0)
    return [
        Panel("clusters of a token", inside.sum(0).view(SIZE)),
        Panel("one cluster of 64 tokens", inside[1].view(SIZE), query),
        Panel("attention in its clusters", of_token(out, query), query),
    ]


def kernelized() -> list[Panel]:
    x = tokens(16, seed=12)
    omega = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    rows, cols = torch.arange(1 - HEIGHT, HEIGHT)[:, None], torch.arange(1 - WIDTH, WIDTH)
    table = -0.4 * (rows.square() + cols.square()).sqrt()[None]
    plain, near = (
        kernelized_attention(x, x, token_values(), omega, SIZE, rel=rel, impl=REFERENCE) for rel in (None, table)
    )
    return [
        Panel("random features", of_token(plain, INSIDE), INSIDE),
        Panel("with relative positions", of_token(near, INSIDE), INSIDE),
    ]


def rollout() -> list[Panel]:
    """DCAL: one row of the rollout of three layers, and the patches that it picks."""
    values = torch.eye(TOKENS + 1)[None, :, None]
    layers = []
    for seed in (13, 14, 15):
        x = F.pad(tokens(16, seed), (0, 0, 0, 0, 1, 0), value=1.0)  # class token first
        layers.append(dense_attention(x, x, values, impl=REFERENCE).transpose(1, 2))  # (1, 1, N, N)
    row = rollout_row(reversed(layers))
    picked = torch.zeros(1, TOKENS + 1).scatter(1, local_queries(row, 0.1), 1.0)
    return [
        Panel("rollout of the class token", row[0, 1:].view(SIZE)),
        Panel("local queries, 10 %", picked[0, 1:].view(SIZE)),
    ]
