"""Channel attention's kernels against its definition, in Triton's interpreter."""

import pytest
import torch

from foveate.attention_ops import channel_attention
from foveate.attention_ops.channel import channel_attention_reference
from foveate.kernels import channel as kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LAYOUTS = {  # how a (B, H, W, heads, d) view lies in memory: leaf's shape for (b, h, w, n, d), and the view
    "a slice of a packed qkv": (lambda b, h, w, n, d: (b, h, w, 3, n, d), lambda x: x[:, :, :, 1]),
    "channels before tokens": (lambda b, h, w, n, d: (b, n, d, h, w), lambda x: x.permute(0, 3, 4, 1, 2)),
    "a crop": (lambda b, h, w, n, d: (b, h + 1, w + 2, n, d), lambda x: x[:, :-1, 2:]),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def plain(q, k, v, scale):
    """Every rounding that plain code makes."""
    q, k, v = (t.flatten(1, 2).permute(0, 2, 3, 1) for t in (q, k, v))  # (B, heads, d, N)
    return ((q * scale) @ k.mT).softmax(-1) @ v


def assert_exact(layout, dtype, size=(9, 7), heads=2, dim=8, batch=2, scale=None):
    shape, view = layout
    torch.manual_seed(0)
    leaves = [torch.randn(shape(batch, *size, heads, dim)).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(batch, *size, heads, dim).to(dtype)
    scale_used = dim**-0.5 if scale is None else scale

    def results(attend, leaves, grad):
        out = attend(*map(view, leaves))
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def with_torch(q, k, v):
        return plain(q, k, v, scale_used).permute(0, 3, 1, 2).unflatten(1, size)

    exact = results(with_torch, [leaf.detach().double().requires_grad_() for leaf in leaves], grad.double())
    ours = results(lambda q, k, v: channel_attention(q, k, v, scale=scale, impl="fused"), leaves, grad)
    for x, torchs, truth in zip(ours, results(with_torch, leaves, grad), exact, strict=True):
        error, floor = (x - truth).abs().max(), torch.finfo(dtype).eps * truth.abs().max()
        assert error <= TOLERANCE[dtype] * truth.abs().max()
        if dtype != torch.float32:  # where sums cancel, two orders of adding fp32 differ by more than a factor of 2
            assert error <= 2 * (torchs - truth).abs().max() + floor


@every_layout
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fused_is_as_exact_as_torch_with_every_gradient(layout, dtype):
    assert_exact(layout, dtype)


@pytest.mark.parametrize(("size", "dim", "heads"), [((1, 1), 8, 1), ((3, 45), 24, 3), ((2, 5), 33, 1)])
def test_any_map_and_any_width_of_heads(size, dim, heads):
    assert_exact(LAYOUTS["a slice of a packed qkv"], torch.float32, size, heads, dim)


@every_layout
@pytest.mark.parametrize("size", [(7, 1), (1, 7)], ids=["one column", "one row"])
def test_maps_of_one_row_or_column_in_every_layout(layout, size):
    assert_exact(layout, torch.float32, size)


def test_many_tokens_are_summed_in_parts():
    splits, chunk = kernels.token_splits(2, 31 * 23, 32)
    assert splits == 2 and splits * chunk >= 31 * 23
    assert_exact(LAYOUTS["channels before tokens"], torch.float32, (31, 23), heads=1)


@pytest.mark.parametrize("tokens", [1, 49, 196, 3136, 12544, 99999])
@pytest.mark.parametrize("heads", [1, 6, 384, 10**5])
def test_the_parts_cover_all_tokens_and_none_is_empty(tokens, heads):
    splits, chunk = kernels.token_splits(heads, tokens, 64)
    assert (splits - 1) * chunk < tokens <= splits * chunk and chunk % 64 == 0


def test_scale_is_used():
    assert_exact(LAYOUTS["a crop"], torch.float32, scale=0.05)


def test_the_scale_by_tokens_of_florence_2():
    assert_exact(LAYOUTS["channels before tokens"], torch.float32, scale=(9 * 7) ** -0.5)


def test_the_kernels_stay_inside_their_tensors(fenced):
    q, k, v, out = (fenced(torch.randn(1, 5, 7, 2, 12)) for _ in range(4))
    probs = fenced(kernels.launch_softmax(kernels.launch_product(q, k), 0.3))
    kernels.launch_mixture(v, probs, out)
    torch.testing.assert_close(out, channel_attention_reference(q, k, v, 0.3))
    dlogits = fenced(kernels.launch_softmax_grad(fenced(kernels.launch_product(out, v)), probs))
    kernels.launch_mixture(k, dlogits, out, 0.3, back=True)
    assert out.isfinite().all()


def test_gradients_are_laid_out_as_their_tensors():
    leaves = [torch.randn(2, 2, 8, 5, 3, requires_grad=True) for _ in range(3)]
    q, k, v = (leaf.permute(0, 3, 4, 1, 2) for leaf in leaves)
    grads = torch.autograd.grad(channel_attention(q, k, v, impl="fused").sum(), [q, k, v])
    assert [grad.stride() for grad in grads] == [q.stride()] * 3


def test_an_empty_batch_gives_empty_results():
    empty = torch.zeros(0, 8, 12, 2, 4, requires_grad=True)
    out = channel_attention(empty, empty, empty, impl="fused")
    out.sum().backward()
    assert out.shape == empty.grad.shape == empty.shape


def test_what_the_kernel_cannot_take_is_refused_with_the_reason():
    wide = torch.zeros(1, 4, 6, 1, 129)
    with pytest.raises(NotImplementedError, match=r"channel_attention: .* head_dim of at most 128, got 129"):
        channel_attention(wide, wide, wide, impl="fused")
