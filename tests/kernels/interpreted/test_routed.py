"""Routed attention's kernels against dense attention with a mask, in Triton's interpreter."""

import pytest
import torch

from foveate.attention_ops import routed_attention
from foveate.kernels.routed import inverse as routed_inverse
from foveate.kernels.routed.backward import launch_keys, launch_queries
from foveate.kernels.routed.forward import launch_forward
from foveate.kernels.routed.inverse import invert_routes, piece_size
from foveate.kernels.routed.plan import Regions

# (map of q, region of q, map of k, region of k, topk, head_dim, width of v): never square
CASES = {
    "a tile of keys holds three regions and a half": ((8, 12), (4, 4), (8, 12), (4, 4), 5, 8, 8),
    "regions of one token": ((6, 4), (1, 1), (6, 4), (1, 1), 7, 16, 5),
    "49 tokens in tiles of 64, one route": ((14, 21), (7, 7), (14, 21), (7, 7), 1, 24, 24),
    "pooled keys, all regions seen": ((16, 12), (8, 4), (4, 6), (2, 2), 6, 8, 20),
    "regions of two tiles": ((10, 18), (10, 9), (10, 18), (10, 9), 2, 8, 8),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def random_routes(batch, regions, topk):
    return torch.rand(batch, regions, regions, generator=torch.Generator().manual_seed(1)).topk(topk).indices


def inputs(case, dtype=torch.float32, heads=2, batch=2):
    """Leaves, of which q, k and v are strided views; and the gradient of out."""
    size, _, kv_size, _, _, dim, width = case
    torch.manual_seed(0)
    shapes = [(*size, 2, heads, dim), (*kv_size, 2, heads, dim), (*kv_size, 2, heads, width)]
    leaves = [torch.randn(batch, *shape).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn(batch, *size, heads, width).to(dtype)


def places(size, region):
    """The region of every token of a map, row-major."""
    rows, cols = (torch.arange(length) // step for length, step in zip(size, region, strict=True))
    return (rows[:, None] * (size[1] // region[1]) + cols).flatten()


def dense(q, k, v, routes, region, kv_region):
    """Every rounding that plain code makes; exact enough in float64."""
    regions = routes.shape[1]
    seen = torch.zeros(len(q), regions, regions, dtype=torch.bool).scatter(2, routes, True)
    seen = seen[:, places(q.shape[1:3], region)][:, :, places(k.shape[1:3], kv_region)][:, None]
    tokens = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    logits = (tokens[0] * q.shape[-1] ** -0.5 @ tokens[1].mT).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ tokens[2]).transpose(1, 2).unflatten(1, q.shape[1:3])


def results(attend, leaves, grad):
    out = attend(*(leaf[:, :, :, 1] for leaf in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_exact(case, routes, dtype):
    _, region, _, kv_region, _, _, _ = case
    leaves, grad = inputs(case, dtype)

    def fused(q, k, v):
        return routed_attention(q, k, v, routes, region_size=region, kv_region_size=kv_region, impl="fused")

    def plain(q, k, v):
        return dense(q, k, v, routes, region, kv_region)

    exact = results(plain, [leaf.detach().double().requires_grad_() for leaf in leaves], grad.double())
    for ours, torchs, truth in zip(results(fused, leaves, grad), results(plain, leaves, grad), exact, strict=True):
        error, floor = (ours - truth).abs().max(), torch.finfo(dtype).eps * truth.abs().max()
        assert error <= TOLERANCE[dtype] * truth.abs().max()
        if dtype != torch.float32:  # where sums cancel, two orders of adding fp32 differ by more than a factor of 2
            assert error <= 2 * (torchs - truth).abs().max() + floor


@every_case
def test_fused_equals_dense_attention_with_a_mask(case):
    size, region, *_ = case
    regions = (size[0] // region[0]) * (size[1] // region[1])
    assert_exact(case, random_routes(2, regions, case[4]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_is_no_worse_than_low_precision_torch(dtype):
    assert_exact(((8, 12), (4, 4), (8, 12), (4, 4), 5, 32, 32), random_routes(2, 6, 5), dtype)


@pytest.mark.parametrize("split", [False, True], ids=["one program a list", "long lists in pieces"])
def test_a_region_that_all_see_and_regions_that_nobody_sees(monkeypatch, split):
    case = ((6, 8), (2, 1), (6, 8), (2, 1), 2, 8, 8)  # 24 regions
    routes = torch.stack([torch.arange(24) % 3, torch.full((24,), 7)], 1).expand(2, -1, -1)
    if split:
        monkeypatch.setattr(routed_inverse, "PIECE_TOKENS", 1)
        assert invert_routes(routes, 2).extras > 0
    assert_exact(case, routes, torch.float32)


def test_gradients_are_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(routed_inverse, "PIECE_TOKENS", 1)
    leaves, grad = inputs(CASES["regions of one token"], heads=1, batch=1)
    routes = random_routes(1, 24, 2)
    assert invert_routes(routes, 1).extras > 0
    first, second = (
        results(lambda q, k, v: routed_attention(q, k, v, routes, region_size=1, impl="fused"), leaves, grad)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scale_is_used():
    leaves, _ = inputs(CASES["pooled keys, all regions seen"])
    q, k, v = (leaf[:, :, :, 1] for leaf in leaves)
    routes = random_routes(2, 6, 2)
    cut = {"region_size": (8, 4), "kv_region_size": (2, 2)}
    fused = routed_attention(q, k, v, routes, **cut, scale=0.7, impl="fused")
    torch.testing.assert_close(fused, routed_attention(q, k, v, routes, **cut, scale=0.7, impl="reference"))


def test_the_kernels_stay_inside_their_tensors(fenced):
    size, region, kv_size, kv_region, topk, dim, width = CASES["regions of one token"]
    q, k, v = (fenced(torch.randn(1, *s, 2, w)) for s, w in ((size, dim), (kv_size, dim), (kv_size, width)))
    cut = Regions((6, 4), region, kv_region)
    routes = random_routes(1, cut.count, topk)
    out, grad, dv = (fenced(torch.ones_like(v)) for _ in range(3))
    lse, delta = (fenced(torch.ones(1, 2, cut.count, 1)) for _ in range(2))
    dq, dk = (fenced(torch.ones_like(q)) for _ in range(2))
    launch_forward(q, k, v, routes, out, lse, cut, 1.0)
    launch_queries(q, k, v, routes, out, lse, grad, delta, dq, cut, 1.0)
    sums = [fenced(torch.ones(1, 2, 1, w)) for w in (dim, width)]
    launch_keys(q, k, v, invert_routes(routes, 1), lse, grad, delta, dk, dv, sums, cut, 1.0, False)
    assert all(t.isfinite().all() for t in (out, lse, delta, dq, dk, dv))


def test_an_empty_batch_gives_empty_results():
    empty = torch.zeros(0, 8, 12, 2, 4, requires_grad=True)
    out = routed_attention(empty, empty, empty, torch.zeros(0, 6, 2, dtype=torch.int64), region_size=4, impl="fused")
    out.sum().backward()
    assert out.shape == empty.grad.shape == empty.shape


def test_auto_takes_the_kernel_where_it_can():
    leaves, _ = inputs(CASES["pooled keys, all regions seen"])
    q, k, v = (leaf[:, :, :, 1] for leaf in leaves)
    call = {"routes": random_routes(2, 6, 2), "region_size": (8, 4), "kv_region_size": (2, 2)}
    assert "foveate_routed" in routed_attention(q, k, v, **call).grad_fn.name()
    tiled = routed_attention(q.double(), k.double(), v.double(), **call)
    assert "foveate_routed" not in tiled.grad_fn.name()


@pytest.mark.parametrize(
    ("q", "v", "words"),
    [
        (torch.zeros(1, 4, 6, 1, 8).double(), torch.zeros(1, 4, 6, 1, 8).double(), "float32, .* got torch.float64"),
        (torch.zeros(1, 4, 6, 1, 8), torch.zeros(1, 4, 6, 1, 129), "head_dim of at most 128, got 129"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_reason(q, v, words):
    with pytest.raises(NotImplementedError, match=f"routed_attention: impl='fused' cannot run here: .*{words}"):
        routed_attention(q, q, v, torch.zeros(1, 6, 1, dtype=torch.int64), region_size=2, impl="fused")


# Lists of who sees a region


@pytest.mark.parametrize("topk", [1, 3, 12])
def test_inverse_lists_hold_every_route_once_in_order(topk):
    routes = random_routes(3, 12, topk)
    lists = invert_routes(routes, 16)
    for image in range(3):
        for region in range(12):
            start, end = lists.starts[image * 12 + region], lists.ends[image * 12 + region]
            seers = [query for query in range(12) if region in routes[image, query]]
            assert lists.queries[start:end].tolist() == seers


def test_extra_pieces_cover_exactly_what_the_first_ones_leave():
    routes = torch.zeros(2, 100, 1, dtype=torch.int64)
    routes[1, 90:] = 5
    lists = invert_routes(routes, 10**6)
    assert lists.piece == piece_size(100, 1, 10**6) == 4
    owned = [lists.extra_owners.tolist().count(owner) for owner in range(200)]
    lengths = [(routes[i // 100] == i % 100).sum().item() for i in range(200)]
    assert owned == [max(-(-length // 4) - 1, 0) for length in lengths]
    assert sum(owned) <= lists.extras == 50


def test_lists_as_long_as_a_piece_need_no_sums():
    assert invert_routes(random_routes(2, 49, 4), 64).extras > 0
    assert invert_routes(random_routes(2, 49, 16), 64).extras == 0
