"""Efficient channel attention against a loop, the official layers and bad callers."""

import pytest
import torch
import torch.nn.functional as F
from gates import by_op

from foveate.attention_ops import EfficientChannelAttention, channel_gate
from foveate.attention_ops.channel_gate import adaptive_kernel_size


def by_loop(x, weight):
    """The definition, one channel at a time."""
    taps = weight.flatten()
    means, reach = x.mean((2, 3)), len(taps) // 2
    out = []
    for c in range(x.shape[1]):
        near = [(j, c + j - reach) for j in range(len(taps)) if 0 <= c + j - reach < x.shape[1]]
        logit = sum(taps[j] * means[:, i] for j, i in near)
        out.append(x[:, c] * torch.sigmoid(logit)[:, None, None])
    return torch.stack(out, 1)


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(("channels", "size", "k"), [(6, (5, 3), 3), (2, (1, 4), 7), (9, (2, 2), 1)])
def test_it_is_the_definition_with_every_gradient(channels, size, k, layout, impl):
    x = torch.randn(2, channels, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(1, 1, k, dtype=torch.float64, requires_grad=True)
    out, expected = channel_gate(x, weight, impl=impl), by_loop(x, weight)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), [x, weight]) for y in (out, expected)))


def check_the_official_layers(det, golden, relative_error, form):
    """`form` makes what is called of a layer."""
    cases, arrays = golden("module__eca")
    kinds = set()
    for name, case in cases.items():
        official = case["kind"].startswith("official")
        layer = EfficientChannelAttention(case["channels"], case["k"] if official else None)
        prefix = case["weights_key_prefix"]
        weights = det.det_state_dict(case["state_dict"])
        layer.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items()})
        x = torch.from_numpy(det.det_input(case["x"]["shape"], case["x"]["seed"])).requires_grad_()
        out = form(layer)(x)
        (out * torch.from_numpy(det.det_input(out.shape, 15))).sum().backward()
        assert relative_error(out, arrays[f"{name}/out"]) < 1e-6, name
        assert relative_error(x.grad, arrays[f"{name}/dx"]) < 1e-5, name
        assert relative_error(layer.conv.weight.grad, arrays[f"{name}/d.conv.weight"]) < 1e-4, name
        kinds.add(official)
    assert kinds == {True, False}


@pytest.mark.parametrize("form", [lambda layer: layer, by_op], ids=["layer", "op"])
def test_the_layer_equals_the_official_ones(form, det, golden, relative_error):
    check_the_official_layers(det, golden, relative_error, form)


def test_the_adaptive_kernel_is_timms():
    from timm.layers import EcaModule

    for channels in (8, 32, 64, 96, 128, 256, 1024, 1536, 2048):
        assert adaptive_kernel_size(channels) == EcaModule(channels).conv.weight.shape[-1], channels


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.zeros(6, 9, 9), torch.zeros(1, 1, 3), r"x must be \(B, C, H, W\), got shape \(6, 9, 9\)"),
        (torch.zeros(1, 6, 9, 9), torch.zeros(1, 1, 4), r"weight must be \(1, 1, k\) with k odd, got \(1, 1, 4\)"),
        (torch.zeros(1, 6, 9, 9), torch.zeros(6, 1, 3), r"weight must be \(1, 1, k\) with k odd, got \(6, 1, 3\)"),
    ],
)
def test_bad_input_is_refused_by_name(x, weight, words):
    with pytest.raises(ValueError, match=f"channel_gate: {words}"):
        channel_gate(x, weight)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="EfficientChannelAttention: kernel_size must be odd and positive, got 4"):
        EfficientChannelAttention(8, 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_is_no_worse_than_the_authors_layers(layout):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 96, 7, 9).contiguous(memory_format=layout), torch.randn(1, 1, 5)

    def authors(x, weight):
        means = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(1, 2)
        return x * F.conv1d(means, weight, padding=2).transpose(1, 2).unsqueeze(-1).sigmoid()

    exact = authors(x.double(), weight.double())
    floor = torch.finfo(torch.float32).eps * exact.abs().max()
    layer = EfficientChannelAttention(96, 5)
    layer.load_state_dict({"conv.weight": weight})
    for out in (channel_gate(x, weight), layer(x)):
        assert (out - exact).abs().max() <= 2 * (authors(x, weight) - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_layer_sums_16_bit_tokens_in_float32(dtype):
    """A mean of 3 over 208 x 208 tokens: a sum in float16 overflows at 65504."""
    torch.manual_seed(0)
    x, layer = (3 + torch.randn(1, 8, 208, 208)).to(dtype), EfficientChannelAttention(8, 3).to(dtype)
    out, exact = layer(x), layer.double()(x.double())
    assert (out - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
