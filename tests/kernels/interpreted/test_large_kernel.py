"""Large kernel attention's kernel against the plain convolutions, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from gates import by_op

from foveate.attention_ops import LargeKernelAttention, large_kernel_attention
from foveate.kernels.gates.large_kernel import launch_dilated_gate

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def inputs(channels, size, local, dilated, dtype, batch=2):
    """A map and the weights of three convolutions, of a size that keeps the gate near 1."""
    torch.manual_seed(0)
    shapes = [(channels, 1, *local), (channels,), (channels, 1, *dilated), (channels,)]
    shapes += [(channels, channels, 1, 1), (channels,)]
    weights = [
        torch.randn(s) * (s[1:] if len(s) > 1 else torch.ones(1)).numel() ** -0.5 for s in map(torch.Size, shapes)
    ]
    return [t.to(dtype) for t in (torch.randn(batch, channels, *size), *weights)]


def plain(x, w0, b0, w1, b1, w2, b2, dilation):
    gate = F.conv2d(x, w0, b0, padding=[k // 2 for k in w0.shape[2:]], groups=x.shape[1])
    padding = [dilation * (k // 2) for k in w1.shape[2:]]
    gate = F.conv2d(gate, w1, b1, padding=padding, dilation=dilation, groups=x.shape[1])
    return x * F.conv2d(gate, w2, b2)


def assert_exact(tensors, dilation, dtype):
    exact, torchs = plain(*(t.double() for t in tensors), dilation), plain(*tensors, dilation)
    ours = large_kernel_attention(*tensors, dilation, impl="fused")
    error, floor = (ours - exact).abs().max(), torch.finfo(dtype).eps * exact.abs().max()
    assert error <= TOLERANCE[dtype] * exact.abs().max()
    if dtype != torch.float32:
        assert error <= 2 * (torchs - exact).abs().max() + floor
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fused_is_as_exact_as_torch(dtype, layout):
    x, *weights = inputs(20, (9, 7), (5, 5), (7, 7), dtype)
    assert_exact([x.contiguous(memory_format=layout), *weights], 3, dtype)


@pytest.mark.parametrize(
    ("channels", "size", "local", "dilated", "dilation"),
    [(40, (1, 2), (3, 3), (5, 5), 4), (3, (13, 6), (1, 5), (3, 7), 1), (130, (4, 3), (3, 1), (1, 1), 2)],
)
def test_any_map_and_any_kernels(channels, size, local, dilated, dilation):
    assert_exact(inputs(channels, size, local, dilated, torch.float32), dilation, torch.float32)


def test_a_crop_and_missing_biases():
    x, w0, _, w1, _, w2, _ = inputs(6, (8, 9), (5, 5), (7, 7), torch.float32)
    ours = large_kernel_attention(x[:, :, 1:, :-2], w0, None, w1, None, w2, None, impl="fused")
    torch.testing.assert_close(ours, plain(x[:, :, 1:, :-2], w0, None, w1, None, w2, None, 3))


def test_autocast_casts_the_weights_and_returns_the_type_of_the_map():
    tensors = inputs(8, (6, 5), (5, 5), (7, 7), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = large_kernel_attention(*tensors, impl="fused")
        low = large_kernel_attention(tensors[0].bfloat16(), *tensors[1:], impl="fused")
    assert (out.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(out, plain(*tensors, 3), rtol=0.05, atol=0.05)


def test_the_kernel_stays_inside_its_tensors(fenced):
    _, _, _, w1, b1, w2, b2 = inputs(6, (5, 7), (1, 1), (3, 5), torch.float32)
    maps = [fenced(torch.randn(1, 5, 7, 6)).permute(0, 3, 1, 2) for _ in range(3)]
    launch_dilated_gate(*maps[:2], *(fenced(t) for t in (w1, b1, w2, b2)), 2, maps[2])
    assert maps[2].isfinite().all()


def test_the_op_takes_the_kernel_in_inference_and_the_convolutions_in_training(monkeypatch):
    layer, x = by_op(LargeKernelAttention(8)), torch.randn(1, 8, 5, 6)
    calls = []
    monkeypatch.setattr(
        "foveate.kernels.gates.large_kernel.launch_dilated_gate", lambda *a: calls.append(a) or a[-1].zero_()
    )
    assert layer(x).grad_fn is not None and calls == []
    with torch.no_grad():
        assert not layer(x).any() and len(calls) == 1


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (inputs(1025, (1, 1), (1, 1), (1, 1), torch.float32, 1), "at most 1024 channels, got 1025"),
        (inputs(2, (1, 1), (1, 1), (1, 1), torch.float64, 1), "the kernels take float32, .* got torch.float64"),
        (
            [t.requires_grad_() for t in inputs(2, (1, 1), (1, 1), (1, 1), torch.float32, 1)],
            "the kernel has no gradient",
        ),
    ],
    ids=["channels", "dtype", "gradient"],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_reason(tensors, words):
    with pytest.raises(NotImplementedError, match=f"large_kernel_attention: .*{words}"):
        large_kernel_attention(*tensors, impl="fused")
