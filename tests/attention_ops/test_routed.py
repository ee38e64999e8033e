"""Routed attention against its definition and bad callers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foveate.attention_ops import bi_level_routes, routed_attention
from foveate.attention_ops.routed_cpu import RegionPlan, masking_is_cheaper

# (map of q, region of q, map of k, region of k, topk, whether the tiled body masks): never square
CASES = [
    ((8, 12), (4, 4), (8, 12), (4, 4), 1, False),
    ((8, 12), (2, 3), (8, 12), (2, 3), 5, True),
    ((6, 4), (1, 1), (6, 4), (1, 1), 7, True),
    ((24, 28), (8, 7), (24, 28), (8, 7), 2, False),
    ((24, 28), (8, 7), (6, 8), (2, 2), 3, False),
    ((12, 16), (6, 4), (12, 16), (6, 4), 8, True),
]
every_case = pytest.mark.parametrize(("size", "region", "kv_size", "kv_region", "topk", "masks"), CASES)


def inputs(size, region, kv_size, topk, heads=2, head_dim=8, batch=2, dtype=torch.float64, width=None):
    """Strided views, the leaves behind them, and routes without repetition."""
    generator = torch.Generator().manual_seed(0)

    def packed(size, parts, dim):
        return torch.randn(batch, *size, parts, heads, dim, generator=generator, dtype=dtype).requires_grad_()

    leaves = [packed(size, 2, head_dim), packed(kv_size, 2, head_dim), packed(kv_size, 2, width or head_dim)]
    regions = (size[0] // region[0]) * (size[1] // region[1])
    routes = torch.rand(batch, regions, regions, generator=generator).topk(topk).indices
    return leaves, [leaf[:, :, :, 1] for leaf in leaves], routes


def brute_force(q, k, v, routes, region, kv_region):
    """One query at a time, in numpy: nothing shared with the code under test."""
    q, k, v, routes = (t.detach().numpy() for t in (q, k, v, routes))
    batch, height, width, heads, dim = q.shape
    out = np.zeros((*q.shape[:4], v.shape[-1]))
    columns = width // region[1]
    for b, y, x, n in np.ndindex(batch, height, width, heads):
        keys = []
        for route in routes[b, y // region[0] * columns + x // region[1]]:
            top, left = route // columns * kv_region[0], route % columns * kv_region[1]
            keys += [(r, c) for r in range(top, top + kv_region[0]) for c in range(left, left + kv_region[1])]
        logits = np.array([q[b, y, x, n] @ k[b, r, c, n] for r, c in keys]) * dim**-0.5
        weights = np.exp(logits - logits.max())
        out[b, y, x, n] = sum(w * v[b, r, c, n] for w, (r, c) in zip(weights / weights.sum(), keys, strict=True))
    return torch.from_numpy(out)


@every_case
def test_reference_equals_brute_force(size, region, kv_size, kv_region, topk, masks):
    _, (q, k, v), routes = inputs(size, region, kv_size, topk, batch=1, head_dim=4, width=3)
    out = routed_attention(q, k, v, routes, region_size=region, kv_region_size=kv_region, impl="reference")
    torch.testing.assert_close(out, brute_force(q, k, v, routes, region, kv_region), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [8, 5, 11])  # of values; keys have 8
@every_case
def test_tiled_equals_reference_with_every_gradient(size, region, kv_size, kv_region, topk, masks, width):
    leaves, (q, k, v), routes = inputs(size, region, kv_size, topk, width=width)
    assert masking_is_cheaper(q, k, routes, RegionPlan(region, kv_region, 1.0)) == masks
    results = []
    for impl in ("tiled", "reference"):
        out = routed_attention(q, k, v, routes, region_size=region, kv_region_size=kv_region, impl=impl)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for tiled, reference in zip(*results, strict=True):
        torch.testing.assert_close(tiled, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("width", [8, 11])
@pytest.mark.parametrize("chunk", [1, 3000, 1 << 19])  # a tile; some of an image or several images; all
@pytest.mark.parametrize(("size", "region", "kv_size", "kv_region", "topk", "masks"), [CASES[0], CASES[4]])
def test_a_batch_of_several_parts_equals_the_reference(
    monkeypatch, size, region, kv_size, kv_region, topk, masks, chunk, width
):
    monkeypatch.setattr("foveate.attention_ops.tiled_attention.CHUNK_LOGITS", chunk)
    leaves, (q, k, v), routes = inputs(size, region, kv_size, topk, batch=17 if size == (8, 12) else 3, width=width)
    results = []
    for impl in ("tiled", "reference"):
        out = routed_attention(q, k, v, routes, region_size=region, kv_region_size=kv_region, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_the_tiled_body_is_deterministic(monkeypatch):
    monkeypatch.setattr("foveate.attention_ops.tiled_attention.CHUNK_LOGITS", 3000)
    leaves, (q, k, v), routes = inputs((24, 28), (8, 7), (24, 28), 2, dtype=torch.float32)

    def step():
        out = routed_attention(q, k, v, routes, region_size=(8, 7))
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "region", "kv_size", "kv_region", "topk", "masks"), [CASES[1], CASES[3]])
def test_tiled_is_no_worse_than_low_precision_torch(size, region, kv_size, kv_region, topk, masks, dtype):
    _, tensors, routes = inputs(size, region, kv_size, topk, head_dim=32, dtype=torch.float32)
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in low]

    def run(tensors, impl):
        out = routed_attention(*tensors, routes, region_size=region, impl=impl)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    def plain(tensors):
        """Dense torch at the same dtype, with a mask: every rounding that plain code makes."""
        place = torch.arange(size[0])[:, None] // region[0] * (size[1] // region[1])
        place = (place + torch.arange(size[1]) // region[1]).flatten()  # the region of every token
        seen = torch.zeros(2, *[routes.shape[1]] * 2).scatter(2, routes, 1)[:, place][:, :, place].bool()[:, None]
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in tensors)
        logits = (q * 32**-0.5 @ k.mT).masked_fill(~seen, -torch.inf)
        out = (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, size)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    for ours, torchs, truth in zip(run(low, "tiled"), plain(low), run(exact, "reference"), strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (torchs - truth).abs().max() + floor


def test_with_all_routes_it_is_dense_attention():
    _, (q, k, v), routes = inputs((6, 8), (3, 2), (6, 8), 8)
    dense = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    out = routed_attention(q, k, v, routes, region_size=(3, 2))
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), dense)


def test_the_order_of_routes_changes_nothing():
    _, (q, k, v), routes = inputs((24, 28), (8, 7), (24, 28), 3)
    out = routed_attention(q, k, v, routes, region_size=(8, 7))
    torch.testing.assert_close(routed_attention(q, k, v, routes.flip(2), region_size=(8, 7)), out)


# Routes


@pytest.mark.parametrize("size", [(8, 12), (7, 10), (5, 9)])
def test_routes_are_the_best_regions_by_means_over_real_tokens(size):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, *size, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    routes = bi_level_routes(q, k, region_size=(2, 3), topk=3)
    grid = -(-size[0] // 2), -(-size[1] // 3)
    cells = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    for b in range(2):
        means = [[t[b, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3].flatten(2).mean((0, 1)) for r, c in cells] for t in (q, k)]
        for i, query in enumerate(means[0]):
            scores = torch.stack([query @ key for key in means[1]])
            assert routes[b, i].tolist() == scores.argsort(descending=True)[:3].tolist()


def test_routes_carry_no_gradient_and_are_the_same_under_autocast():
    q = torch.randn(2, 8, 12, 2, 4, requires_grad=True)
    routes = bi_level_routes(q, q.flip(1), region_size=2, topk=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bi_level_routes(q, q.flip(1), region_size=2, topk=3), routes)
    assert routes.dtype == torch.int64 and not routes.requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((1, 4, 6, 8), (1, 4, 5, 8), 2, 1), r"q and k must be .* of one shape, got \(1, 4, 6, 8\) and \(1, 4, 5, 8\)"),
        (((4, 6, 8), (4, 6, 8), 2, 1), "q and k must be"),
        (((1, 4, 6, 8), (1, 4, 6, 8), 0, 1), r"region_size must be at least 1, got \(0, 0\)"),
        (((1, 4, 6, 8), (1, 4, 6, 8), 2, 0), r"topk must be at least 1, got \(0,\)"),
        (((1, 4, 6, 8), (1, 4, 6, 8), 2, 7), "topk must be at most the 6 regions, got 7"),
    ],
)
def test_bad_routing_input_is_refused_by_name(arguments, words):
    q, k, region, topk = arguments
    with pytest.raises(ValueError, match=f"bi_level_routes: {words}"):
        bi_level_routes(torch.zeros(q), torch.zeros(k), region_size=region, topk=topk)


# Bad callers


def call(**changes):
    arguments = {name: torch.zeros(1, 8, 12, 2, 4) for name in "qkv"}
    arguments |= {"routes": torch.zeros(1, 6, 1, dtype=torch.int64), "region_size": 4} | changes
    return routed_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(1, 8, 12, 8)}, r"q must be \(B, H, W, heads, head_dim\), .* got \(1, 8, 12, 8\)"),
        ({"k": torch.zeros(1, 8, 12, 2, 5)}, r"k must be .* as q \(1, 8, 12, 2, 4\), got \(1, 8, 12, 2, 5\)"),
        ({"v": torch.zeros(1, 8, 11, 2, 4)}, r"v must be .* as k \(1, 8, 12, 2, 4\), got \(1, 8, 11, 2, 4\)"),
        (
            {"v": torch.zeros(1, 8, 12, 2, 4, dtype=torch.float64)},
            "v must have the dtype of q torch.float32, got torch.float64",
        ),
        ({"k": torch.zeros(1, 8, 12, 2, 4, device="meta")}, "k must be on the device of q cpu, got meta"),
        ({"region_size": 3}, r"region_size \(3, 3\) must divide the map \(8, 12\)"),
        ({"region_size": 0}, r"region_size must be at least 1, got \(0, 0\)"),
        ({"kv_region_size": (8, 5)}, r"kv_region_size \(8, 5\) must divide the map \(8, 12\)"),
        ({"kv_region_size": 2}, r"kv_region_size must cut k into \(2, 3\) regions as q, got \(4, 6\)"),
        ({"routes": torch.zeros(1, 5, 1, dtype=torch.int64)}, r"routes must be .*regions = 6.* got \(1, 5, 1\)"),
        ({"routes": torch.zeros(1, 6, 7, dtype=torch.int64)}, r"routes must be .* got \(1, 6, 7\)"),
        ({"routes": torch.zeros(1, 6, 1)}, "routes must be int64 on cpu, got torch.float32 on cpu"),
        ({"routes": torch.full((1, 6, 1), 6)}, r"routes must be in 0 \.\.\. 5, got 6 \.\.\. 6"),
        ({"routes": torch.full((1, 6, 1), -1)}, r"routes must be in 0 \.\.\. 5, got -1 \.\.\. -1"),
        ({"impl": "quick"}, "impl must be one of .* got 'quick'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=f"routed_attention: .*{words}"):
        call(**changes)
