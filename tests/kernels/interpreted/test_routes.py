"""The kernels that make routes and invert them, in Triton's interpreter: routes are those of torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.attention_ops import bi_level_routes, routed_attention
from foveate.attention_ops.routed import region_means
from foveate.kernels.routed import backward, invert, routes
from foveate.kernels.routed.forward import routed_attention_forward
from foveate.kernels.routed.inverse import invert_routes

# (B, H, W, C), region, topk: never square; regions overhang in the last two
CASES = [((2, 8, 12, 8), (4, 4), 5), ((1, 6, 4, 33), (1, 2), 12), ((2, 9, 7, 16), (4, 2), 3), ((1, 5, 1, 3), (2, 3), 2)]
LAYOUTS = {  # how (B, H, W, C) maps lie in memory: leaf's shape, and the view
    "plain": (lambda b, h, w, c: (b, h, w, c), lambda x: x),
    "a slice of a packed qkv": (lambda b, h, w, c: (b, h, w, 3 * c), lambda x: x[..., x.shape[3] // 3 :][..., ::2]),
    "channels before tokens": (lambda b, h, w, c: (b, c, h, w), lambda x: x.permute(0, 2, 3, 1)),
    "a crop": (lambda b, h, w, c: (b, h + 1, w + 2, c), lambda x: x[:, 1:, :-2]),
}
every_case = pytest.mark.parametrize(("shape", "region", "topk"), CASES, ids=str)


def scores(q, k, region):
    means = (region_means(x.double(), region) for x in (q, k))
    return torch.matmul(next(means), next(means).mT)


def whole_numbers(shape, layout, seed):
    """Numbers whose means over regions, and products of them, float32 holds exactly where regions have 2**n tokens."""
    leaf, view = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    return view(torch.randint(-4, 5, leaf(*shape), generator=generator).float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_in_exact_arithmetic_they_are_those_of_torch_and_equal_scores_go_by_region(layout, dtype):
    q, k = (whole_numbers((2, 8, 12, 8), layout, seed).to(dtype) for seed in (0, 1))
    exact = scores(q, k, (4, 2))
    assert any(len(row.unique()) < len(row) for row in exact.flatten(0, 1))  # some are equal
    expected = exact.sort(dim=-1, descending=True, stable=True).indices[..., :7]
    assert torch.equal(bi_level_routes(q, k, region_size=(4, 2), topk=7), expected)


@every_case
def test_elsewhere_the_kept_regions_are_those_of_torch(shape, region, topk):
    q, k = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found, exact = bi_level_routes(q, k, region_size=region, topk=topk), scores(q, k, region)
    best = exact.topk(topk)
    apart = exact.gather(-1, found) - best.values  # the same scores, in the same order, but for rounding
    assert apart.abs().max() <= 1e-5 and found.dtype == torch.int64
    assert all(len(set(row)) == topk for row in found.flatten(0, 1).tolist())


def test_heads_are_taken_together():
    q, k = torch.randn(2, 1, 6, 8, 2, 3)
    expected = bi_level_routes(q.flatten(3), k.flatten(3), region_size=2, topk=3)
    assert torch.equal(bi_level_routes(q, k, region_size=2, topk=3), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_routes_of_numbers_that_are_not_finite_are_in_range_and_differ(odd):
    q, k = torch.randn(2, 1, 4, 6, 4)
    k[0, 0, 0, 0] = odd
    found = bi_level_routes(q, k, region_size=2, topk=6)
    assert torch.equal(found.sort(-1).values, torch.arange(6).expand(1, 6, 6))
    q[:] = torch.nan
    assert torch.equal(bi_level_routes(q, k, region_size=2, topk=6)[0], torch.arange(6).expand(6, 6))


def test_many_regions_take_torch_and_equal_the_kernel_below_the_limit(monkeypatch):
    q, k = (whole_numbers((1, 8, 4, 4), "plain", seed) for seed in (0, 1))
    found = bi_level_routes(q, k, region_size=1, topk=1)
    monkeypatch.setattr("foveate.attention_ops.routed.MOST_REGIONS", 31)
    monkeypatch.setattr(routes, "launch_routes", None)
    assert torch.equal(scores(q, k, (1, 1)).gather(-1, found), scores(q, k, (1, 1)).amax(-1, keepdim=True))
    bi_level_routes(q, k, region_size=1, topk=1)


def test_more_routes_than_regions_are_refused():
    q = torch.randn(1, 4, 6, 4)
    with pytest.raises(ValueError, match="bi_level_routes: topk must be at most the 6 regions, got 7"):
        bi_level_routes(q, q, region_size=2, topk=7)


def test_an_empty_batch_has_empty_routes():
    q = torch.zeros(0, 4, 6, 4)
    assert bi_level_routes(q, q, region_size=2, topk=2).shape == (0, 6, 2)


def test_the_kernels_stay_inside_their_tensors(fenced, monkeypatch):
    q, k = (fenced(torch.randn(2, 5, 7, 6)) for _ in range(2))
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *s, **o: y if (y := plain(x, *s, **o)).dtype == torch.int64 else fenced(y)
    )
    found = routes.launch_routes(q, k, (3, 4), (2, 2), 5)
    assert found.min() >= 0 and found.max() < 12


class Torchs(TorchDispatchMode):
    """The names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def test_routes_take_two_launches_and_their_inverse_one(monkeypatch):
    """Before: about 22 launches, and a sort, two searches and sums; a forward pass looked at all routes first."""
    launches = []
    for module, names in (
        (routes, ("region_means_kernel", "routes_kernel")),
        (invert, ("invert_routes_kernel",)),
        (backward, ("queries_kernel", "keys_kernel")),
    ):
        for name in names:
            kernel = getattr(module, name)
            monkeypatch.setattr(kernel, "run", lambda *a, k=kernel.run, n=name, **o: (launches.append(n), k(*a, **o)))
    q, k, v = torch.randn(1, 4, 6, 3, 2, 4).unbind(3)
    with Torchs() as torchs:
        found = bi_level_routes(q.flatten(3), k.flatten(3), region_size=2, topk=2)
        forward = routed_attention_forward._init_fn(q, k, v, found, [2, 3], [2, 2], [2, 2], 1.0)
        backward.routed_attention_backward._init_fn(q, k, v, found, *forward, forward[0], [2, 3], [2, 2], [2, 2], 1.0)
    assert launches == ["region_means_kernel", "routes_kernel", "invert_routes_kernel", "queries_kernel", "keys_kernel"]
    assert {"sort", "searchsorted", "cumsum", "aminmax", "topk", "matmul", "sum"} & set(torchs.names) == set()


# A route out of range


@pytest.mark.parametrize("odd", [-1, 6, 2**32, -(2**40)])
def test_a_route_out_of_range_makes_its_region_nan_and_reads_nothing(odd):
    q, k, v = torch.randn(1, 4, 6, 3, 1, 8).unbind(3)
    found = torch.arange(6)[None, :, None].repeat(1, 1, 2)
    found[0, :, 1] = (found[0, :, 0] + 1) % 6
    good = routed_attention(q, k, v, found, region_size=2, impl="fused")
    found[0, 4, 1] = odd
    call = ([2, 3], [2, 2], [2, 2], 8**-0.5)
    out, lse = routed_attention_forward(q, k, v, found, *call)
    assert out[0, 2:, 2:4].isnan().all()
    out[0, 2:, 2:4] = good[0, 2:, 2:4]
    torch.testing.assert_close(out, good, rtol=0, atol=0)
    dq, dk, _ = backward.routed_attention_backward(q, k, v, found, out, lse, torch.ones_like(out), *call)
    assert dq[0, 2:, 2:4].isnan().all() and dq[0, :2].isfinite().all()
    assert dk[0, 2:, 2:4].isnan().all() and dk[0, :2, :4].isfinite().all()


# Lists of who sees a region


@pytest.mark.parametrize("tokens", [1, 64, 10**6])
@pytest.mark.parametrize(("batch", "regions", "topk"), [(3, 12, 1), (2, 49, 4), (1, 64, 64), (2, 1, 1)])
def test_lists_in_one_launch_are_those_of_a_sort(batch, regions, topk, tokens):
    found = torch.rand(batch, regions, regions, generator=torch.Generator().manual_seed(2)).topk(topk).indices
    found[0, :, 0] = 0  # a region that all see, with repetitions
    ours, sorts = invert.launch_inverse(found, tokens), invert_routes(found, tokens)
    for name in ("queries", "starts", "ends"):
        assert torch.equal(getattr(ours, name), getattr(sorts, name)), name
    assert ours.piece == sorts.piece and ours.extras <= sorts.extras
    lengths = ours.ends - ours.starts
    for owner in range(batch * regions if ours.extras else 0):
        places = (ours.extra_owners == owner).nonzero().flatten().tolist()
        count = max(int(lengths[owner]) - 1, 0) // ours.piece
        first = int(ours.extra_starts[owner])
        assert places == list(range(first, first + count))
