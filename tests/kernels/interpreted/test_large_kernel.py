"""Large kernel attention's kernels against the plain convolutions, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from gates import by_op

from foveate.attention_ops import LargeKernelAttention, large_kernel_attention
from foveate.kernels.gates import depthwise, large_kernel, plan

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LAYOUTS = {  # how a (B, C, H, W) view lies in memory: leaf's shape, and the view
    "nchw": (lambda b, c, h, w: (b, c, h, w), lambda x: x),
    "channels last": (lambda b, c, h, w: (b, h, w, c), lambda x: x.permute(0, 3, 1, 2)),
    "a crop": (lambda b, c, h, w: (b, c, h + 1, w + 2), lambda x: x[:, :, 1:, :-2]),
}


def inputs(channels, size, local, dilated, dtype, batch=2, layout="nchw"):
    """A map and the weights of three convolutions, of a size that keeps the gate near 1."""
    torch.manual_seed(0)
    shapes = [(channels, 1, *local), (channels,), (channels, 1, *dilated), (channels,)]
    shapes += [(channels, channels, 1, 1), (channels,)]
    weights = [
        torch.randn(s) * (s[1:] if len(s) > 1 else torch.ones(1)).numel() ** -0.5 for s in map(torch.Size, shapes)
    ]
    return [t.to(dtype) for t in (torch.randn(LAYOUTS[layout][0](batch, channels, *size)), *weights)]


def plain(x, w0, b0, w1, b1, w2, b2, dilation):
    gate = F.conv2d(x, w0, b0, padding=[k // 2 for k in w0.shape[2:]], groups=x.shape[1])
    padding = [dilation * (k // 2) for k in w1.shape[2:]]
    gate = F.conv2d(gate, w1, b1, padding=padding, dilation=dilation, groups=x.shape[1])
    return x * F.conv2d(gate, w2, b2)


def fused(*tensors):
    return large_kernel_attention(*tensors, impl="fused")


def results(body, tensors, dilation, view):
    """The output, and the gradients of all tensors that are given."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = body(view(leaves[0]), *leaves[1:], dilation)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)]


def assert_exact(tensors, dilation, dtype, layout="nchw"):
    view = LAYOUTS[layout][1]
    exact = results(plain, [None if t is None else t.double() for t in tensors], dilation, view)
    ours, torchs = (results(body, tensors, dilation, view) for body in (fused, plain))
    for x, theirs, truth in zip(ours, torchs, exact, strict=True):
        error, floor = (x - truth).abs().max(), torch.finfo(dtype).eps * truth.abs().max()
        assert error <= TOLERANCE[dtype] * truth.abs().max()
        if dtype != torch.float32:
            assert error <= 2 * (theirs - truth).abs().max() + floor
    assert ours[0].dtype == dtype and ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_is_the_definition_with_every_gradient_in_every_layout(layout):
    assert_exact(inputs(20, (9, 7), (5, 5), (7, 7), torch.float32, 2, layout), 3, torch.float32, layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_as_exact_as_torch(dtype):
    assert_exact(inputs(20, (9, 7), (5, 5), (7, 7), dtype), 3, dtype)


@pytest.mark.parametrize(
    ("channels", "size", "local", "dilated", "dilation"),
    [
        (40, (1, 2), (3, 3), (5, 5), 4),
        (3, (13, 6), (1, 5), (3, 7), 1),
        (130, (4, 3), (3, 1), (1, 1), 2),
        (1, (5, 1), (5, 3), (7, 7), 2),
        (2, (3, 26), (1, 11), (3, 9), 2),  # more taps in a row than a thread keeps
    ],
    ids=str,
)
def test_any_map_and_any_kernels(channels, size, local, dilated, dilation):
    assert_exact(inputs(channels, size, local, dilated, torch.float32), dilation, torch.float32)


def test_missing_biases():
    x, w0, _, w1, _, w2, _ = inputs(6, (8, 9), (5, 5), (7, 7), torch.float32)
    assert_exact([x, w0, None, w1, None, w2, None], 3, torch.float32)


def test_programs_share_the_rows_of_a_large_map(monkeypatch):
    monkeypatch.setattr(plan, "TAPS_GRAD_PROGRAMS", 3)
    monkeypatch.setattr(plan, "DEPTHWISE_VALUES", 128)
    programs, turns = plan.taps_grad_tiles(3 * 29 * 2, 8)
    assert programs > 1 and turns > 1 and programs * turns * plan.depthwise_tiles(8)[0] >= 3 * 29 * 2
    assert_exact(inputs(8, (29, 6), (3, 3), (3, 3), torch.float32, 3), 2, torch.float32)


def test_taps_that_see_no_token_are_left_out_and_have_no_gradient():
    assert depthwise.trimmed((7, 4), (7, 7), 3) == (1, 2)
    tensors = inputs(4, (7, 4), (3, 3), (7, 7), torch.float32)
    dilated = results(fused, tensors, 3, lambda x: x)[4]
    assert not dilated[:, :, 0].any() and not dilated[:, :, :, :2].any() and dilated[:, :, 1:-1, 2:-2].all()


def test_only_what_is_asked_for_gets_a_gradient():
    tensors = inputs(6, (5, 7), (3, 3), (3, 3), torch.float32)
    for wanted in range(len(tensors)):
        grads = []
        for body in (fused, plain):
            leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
            body(*leaves, 2).square().sum().backward()
            assert all((leaf.grad is None) == (i != wanted) for i, leaf in enumerate(leaves))
            grads.append(leaves[wanted].grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", ["one expanded number", "nchw", "every other"])
def test_gradients_of_any_layout_are_taken(grad):
    tensors = inputs(6, (5, 7), (3, 3), (3, 3), torch.float32)
    shape = tensors[0].shape
    given = {
        "one expanded number": torch.ones(()).expand(shape),
        "nchw": torch.randn(shape),
        "every other": torch.randn(*shape[:3], 2 * shape[3])[..., ::2],
    }[grad]
    found = []
    for body in (fused, plain):
        leaves = [t.detach().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(body(*leaves, 2), leaves, given))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_two_runs_give_the_same_bits():
    tensors = inputs(20, (9, 7), (5, 5), (7, 7), torch.bfloat16)
    first, second = (results(fused, tensors, 3, lambda x: x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_casts_the_weights_and_returns_the_type_of_the_map():
    tensors = [t.requires_grad_() for t in inputs(8, (6, 5), (5, 5), (7, 7), torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = large_kernel_attention(*tensors, impl="fused")
        low = large_kernel_attention(tensors[0].bfloat16(), *tensors[1:], impl="fused")
        grads = torch.autograd.grad(out.square().sum(), tensors)
    assert (out.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    exact = plain(*tensors, 3)
    torch.testing.assert_close(out, exact, rtol=0.05, atol=0.05)
    for ours, truth in zip(grads, torch.autograd.grad(exact.square().sum(), tensors), strict=True):
        assert ours.dtype == torch.float32 and (ours - truth).abs().max() <= 0.05 * truth.abs().max()


def test_the_kernels_stay_inside_their_tensors(fenced):
    _, w0, b0, w1, b1, w2, b2 = (fenced(t) for t in inputs(6, (5, 7), (3, 5), (3, 5), torch.float32, 1))
    x, y, g, out, grad, dx, dlogits, dg, dy = (fenced(torch.randn(1, 5, 7, 6)).permute(0, 3, 1, 2) for _ in range(9))
    depthwise.launch_depthwise(x, w0, b0, 1, y)
    depthwise.launch_depthwise(y, w1, b1, 2, g)
    large_kernel.launch_gate(x, g, w2, b2, out)
    torch.testing.assert_close(out, plain(x, w0, b0, w1, b1, w2, b2, 2))
    sums = large_kernel.launch_gate_grad(x, g, w2, b2, grad, dx, dlogits, dg)
    more = depthwise.launch_depthwise(dg, w1, None, 2, dy, back=True, sums=True)
    depthwise.launch_depthwise(dy, w0, None, 1, out, addend=dx, back=True)
    taps = [depthwise.launch_taps_grad(*maps, (3, 5), step) for maps, step in (((y, dg), 2), ((x, dy), 1))]
    assert all(t.isfinite().all() for t in (out, dx, dlogits, dg, dy, *sums, more, *taps))


def test_an_empty_batch_gives_empty_results():
    tensors = [t.requires_grad_() for t in inputs(6, (5, 7), (3, 3), (3, 3), torch.float32, 0)]
    out = large_kernel_attention(*tensors, impl="fused")
    grads = torch.autograd.grad(out.sum(), tensors)
    assert out.numel() == 0 and all(not g.any() for g in grads)


def test_auto_takes_the_kernels_in_training_too():
    layer, x = by_op(LargeKernelAttention(8)), torch.randn(1, 8, 5, 6)
    assert "foveate_large_kernel_attention" in layer(x).grad_fn.name()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (inputs(1025, (1, 1), (1, 1), (1, 1), torch.float32, 1), "at most 1024 channels, got 1025"),
        (inputs(2, (1, 1), (1, 1), (1, 1), torch.float64, 1), "the kernels take float32, .* got torch.float64"),
    ],
    ids=["channels", "dtype"],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_reason(tensors, words):
    with pytest.raises(NotImplementedError, match=f"large_kernel_attention: .*{words}"):
        large_kernel_attention(*tensors, impl="fused")
