"""The channel gate's and the strip gate's kernels against their definitions, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from foveate.attention_ops import channel_gate, strip_gate
from foveate.attention_ops.channel_gate import channel_gate_reference
from foveate.attention_ops.strip_gate import strip_gate_reference
from foveate.kernels.gates import channel_gate as channel_kernels
from foveate.kernels.gates import strip_gate as strip_kernels
from foveate.kernels.gates.norm import StripNorm

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LAYOUTS = {  # how a (B, C, H, W) view lies in memory: leaf's shape, and the view
    "nchw": (lambda b, c, h, w: (b, c, h, w), lambda x: x),
    "channels last": (lambda b, c, h, w: (b, h, w, c), lambda x: x.permute(0, 3, 1, 2)),
    "a crop": (lambda b, c, h, w: (b, c, h + 1, w + 2), lambda x: x[:, :, 1:, :-2]),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def plain_channel_gate(x, weight):
    gate = F.conv1d(x.mean((2, 3))[:, None], weight, padding=weight.shape[-1] // 2).sigmoid()
    return x * gate[:, 0, :, None, None]


def plain_strip_gate(x, weight, norm_weight, norm_bias, groups):
    def gate(strip):
        y = F.conv1d(strip, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0] // weight.shape[1])
        return F.group_norm(y, groups, norm_weight, norm_bias).sigmoid()

    return x * gate(x.mean(3))[:, :, :, None] * gate(x.mean(2))[:, :, None]


def assert_exact(fused, plain, layout, shape, parameters, dtype):
    lies, view = layout
    torch.manual_seed(0)
    tensors = [torch.randn(lies(*shape)), *(torch.randn(size) for size in parameters)]
    leaves, grad = [t.to(dtype).requires_grad_() for t in tensors], torch.randn(shape).to(dtype)

    def results(body, leaves, grad):
        out = body(view(leaves[0]), *leaves[1:])
        return [out, *torch.autograd.grad(out, leaves, grad)]

    exact = results(plain, [leaf.detach().double().requires_grad_() for leaf in leaves], grad.double())
    ours = results(fused, leaves, grad)
    for x, torchs, truth in zip(ours, results(plain, leaves, grad), exact, strict=True):
        error, floor = (x - truth).abs().max(), torch.finfo(dtype).eps * truth.abs().max()
        assert error <= TOLERANCE[dtype] * truth.abs().max()
        if dtype != torch.float32:  # where sums cancel, two orders of adding fp32 differ by more than a factor of 2
            assert error <= 2 * (torchs - truth).abs().max() + floor
    assert ours[0].stride() == torch.empty_like(view(leaves[0])).stride()


def assert_channel_gate_exact(layout, shape, kernel, dtype=torch.float32):
    def fused(x, weight):
        return channel_gate(x, weight, impl="fused")

    assert_exact(fused, plain_channel_gate, layout, shape, [(1, 1, kernel)], dtype)


def assert_strip_gate_exact(layout, shape, weight, norm_groups, dtype=torch.float32):
    def fused(*tensors):
        return strip_gate(*tensors, norm_groups, impl="fused")

    def plain(*tensors):
        return plain_strip_gate(*tensors, norm_groups)

    assert_exact(fused, plain, layout, shape, [weight, shape[1:2], shape[1:2]], dtype)


@every_layout
@every_dtype
def test_a_channel_gate_is_as_exact_as_torch_with_every_gradient(layout, dtype):
    assert_channel_gate_exact(layout, (2, 20, 9, 7), 5, dtype)


@pytest.mark.parametrize(
    ("shape", "kernel"), [((1, 3, 2, 1), 7), ((2, 150, 3, 5), 3), ((1, 2, 50, 70), 1), ((1, 1100, 1, 1), 5)]
)
@pytest.mark.parametrize("layout", ["nchw", "channels last"])
def test_a_channel_gate_on_maps_of_any_size(layout, shape, kernel):
    assert_channel_gate_exact(LAYOUTS[layout], shape, kernel)


@every_layout
@pytest.mark.parametrize("size", [(7, 1), (1, 7)], ids=["one column", "one row"])
def test_maps_of_one_row_or_column_in_every_layout(layout, size):
    assert_channel_gate_exact(layout, (2, 6, *size), 3)
    assert_strip_gate_exact(layout, (2, 6, *size), (6, 1, 3), 2)


def test_sums_over_large_maps_are_made_in_parts():
    tiles = channel_kernels.tiles_of(torch.empty(1, 2, 50, 70))
    assert tiles.chunks > 1 and (tiles.chunks - 1) * tiles.chunk < 3500 <= tiles.chunks * tiles.chunk


@every_layout
@every_dtype
def test_a_strip_gate_is_as_exact_as_torch_with_every_gradient(layout, dtype):
    assert_strip_gate_exact(layout, (2, 16, 9, 7), (16, 2, 5), 4, dtype)


@pytest.mark.parametrize(
    ("shape", "weight", "norm_groups"),
    [
        ((2, 6, 1, 3), (6, 1, 7), 3),
        ((1, 80, 8, 5), (80, 8, 7), 16),
        ((1, 2, 70, 300), (2, 1, 1), 1),
        ((1, 4, 40, 33), (4, 4, 3), 2),
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "channels last"])
def test_a_strip_gate_on_maps_of_any_size(layout, shape, weight, norm_groups):
    assert_strip_gate_exact(LAYOUTS[layout], shape, weight, norm_groups)


@pytest.mark.parametrize("lies", [(0, 2, 1), (2, 0, 1), (1, 0, 2)], ids=str)
def test_weights_of_any_strides(lies):
    """torch's convolution gives strips the layout of its weight."""
    torch.manual_seed(0)
    x, scale, shift, grad = torch.randn(2, 8, 5, 6), torch.randn(8), torch.randn(8), torch.randn(2, 8, 5, 6)
    weight = torch.randn([(8, 8, 5)[axis] for axis in lies]).permute(*(lies.index(axis) for axis in range(3)))
    results = []
    for impl, dtype in (("fused", torch.float32), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, scale, shift)]
        assert leaves[1].stride() == weight.stride() and not leaves[1].is_contiguous()
        out = strip_gate(*leaves, 4, impl=impl)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_eps_is_used():
    x, weight, ones = torch.randn(1, 4, 5, 6), torch.randn(4, 1, 3), torch.ones(4)
    fused, small = (strip_gate(x, weight, ones, ones, 2, eps, impl="fused") for eps in (0.5, 1e-5))
    torch.testing.assert_close(fused, strip_gate_reference(x, StripNorm(weight, ones, ones, 2, 0.5)))
    assert not torch.allclose(fused, small)


def test_the_convolution_of_strips_is_not_cast_by_autocast():
    x, weight, ones = torch.randn(1, 8, 5, 6), torch.randn(8, 8, 5), torch.ones(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gated = strip_gate(x, weight, ones, ones, 2, impl="fused")
    assert torch.equal(gated, strip_gate(x, weight, ones, ones, 2, impl="fused"))


def test_the_kernels_stay_inside_their_tensors(fenced):
    x, y, out = (fenced(torch.randn(2, 5, 7, 3)) for _ in range(3))
    weight = fenced(torch.randn(1, 1, 3))
    tiles = channel_kernels.tiles_of(x)
    sums = fenced(channel_kernels.launch_sums(x, None, tiles))
    products = fenced(channel_kernels.launch_sums(x, y, tiles))
    dz, _ = channel_kernels.launch_logits_grad(x, sums, products, weight)
    channel_kernels.launch_gate(x, sums, weight, None, out, tiles)
    torch.testing.assert_close(out, channel_gate_reference(x, weight))
    channel_kernels.launch_gate(y, sums, weight, fenced(dz), out, tiles)
    strips = strip_kernels.Strips(*(fenced(t) for t in strip_kernels.launch_sums(x)))
    grads = strip_kernels.Strips(*(fenced(t) for t in strip_kernels.launch_sums(x, y, strips)))
    strip_kernels.launch_gate(x, strips, grads, out)
    assert all(t.isfinite().all() for t in (out, *strips, *grads))


def test_an_empty_batch_gives_empty_results():
    empty = torch.zeros(0, 4, 5, 6, requires_grad=True)
    weight, ones = torch.ones(1, 1, 3, requires_grad=True), torch.ones(4)
    channel_gate(empty, weight, impl="fused").sum().backward()
    strip_gate(empty, torch.ones(4, 1, 3), ones, ones, 2, impl="fused").sum().backward()
    assert empty.grad.shape == empty.shape and not weight.grad.any()


@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (1, 4, 5, 6)[::-1]])
def test_auto_takes_the_kernels_where_it_can_and_float64_is_refused(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, ones = torch.ones(1, 1, 3), torch.ones(shape[1])
    assert "foveate_channel_gate" in channel_gate(x, weight).grad_fn.name()
    assert "foveate_strip_gate" in strip_gate(x, torch.ones(shape[1], 1, 3), ones, ones, 1).grad_fn.name()
    with pytest.raises(NotImplementedError, match=r"channel_gate: .* the kernels take float32, .* got torch\.float64"):
        channel_gate(x.double(), weight, impl="fused")
    with pytest.raises(NotImplementedError, match=r"strip_gate: .* the kernels take float32, .* got torch\.float64"):
        strip_gate(x.double(), weight.expand(shape[1], 1, 3), ones, ones, 1, impl="fused")
