"""Efficient local attention against torch's own layers and bad callers."""

import pytest
import torch
from gates import by_op
from torch import nn

from foveate.attention_ops import EfficientLocalAttention, strip_gate


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(
    ("size", "k", "groups", "norm_groups"), [((5, 9), 7, 12, 4), ((3, 2), 5, 3, 6), ((1, 4), 3, 1, 1)]
)
def test_it_is_the_definition_with_every_gradient(size, k, groups, norm_groups, layout, impl):
    x = torch.randn(2, 12, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    conv = nn.Conv1d(12, 12, k, padding=k // 2, groups=groups, bias=False, dtype=torch.float64)
    norm = nn.GroupNorm(norm_groups, 12, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    rows, cols = (torch.sigmoid(norm(conv(x.mean(axis)))) for axis in (3, 2))
    expected = x * rows[:, :, :, None] * cols[:, :, None, :]
    out = strip_gate(x, conv.weight, norm.weight, norm.bias, norm_groups, impl=impl)
    torch.testing.assert_close(out, expected)
    probe, inputs = torch.randn_like(expected), [x, conv.weight, norm.weight, norm.bias]
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), inputs) for y in (out, expected)))


@pytest.mark.parametrize(
    ("variant", "channels", "kernel", "groups", "norm_groups"),
    [
        ("t", 64, 5, 64, 32),
        ("b", 64, 7, 64, 16),
        ("s", 64, 5, 8, 16),
        ("l", 64, 7, 8, 16),
        ("t", 144, 5, 144, 24),  # 32 groups do not divide 144 channels
        ("l", 20, 7, 2, 10),  # nor do 16 groups 20
    ],
)
def test_variants_are_the_papers(variant, channels, kernel, groups, norm_groups):
    layer = EfficientLocalAttention(channels, variant)
    assert layer.conv.kernel_size == (kernel,)
    assert (layer.conv.groups, layer.norm.num_groups) == (groups, norm_groups)
    assert layer(torch.randn(2, channels, 6, 5)).shape == (2, channels, 6, 5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_the_layer_equals_the_op(layout):
    torch.manual_seed(0)
    layer, x = EfficientLocalAttention(16, "s"), torch.randn(2, 16, 6, 5).contiguous(memory_format=layout)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    torch.testing.assert_close(layer(x), by_op(layer)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_layer_sums_16_bit_tokens_in_float32(dtype):
    """Rows and columns of 4096 tokens of mean 30: a sum in float16 overflows at 65504."""
    torch.manual_seed(0)
    x, layer = (30 + torch.randn(1, 8, 4096, 3)).to(dtype), EfficientLocalAttention(8).to(dtype)
    out, exact = layer(x), layer.double()(x.double())
    assert (out - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_residual_adds_the_input():
    x = torch.randn(2, 16, 6, 5)
    plain, residual = EfficientLocalAttention(16), EfficientLocalAttention(16, residual=True)
    residual.load_state_dict(plain.state_dict())
    torch.testing.assert_close(residual(x), x + plain(x))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.zeros(6, 9, 9), r"x must be \(B, C, H, W\), got shape \(6, 9, 9\)"),
        (1, torch.zeros(6, 1, 4), r"weight must be \(C = 6, C / groups, k\) with k odd, got \(6, 1, 4\)"),
        (1, torch.zeros(6, 4, 3), r"weight must be .* got \(6, 4, 3\)"),
        (2, torch.zeros(5), r"norm_weight must be \(C = 6,\), got \(5,\)"),
        (4, 4, "norm_groups must divide C = 6, got 4"),
    ],
)
def test_bad_input_is_refused_by_name(place, value, words):
    arguments = [torch.zeros(1, 6, 9, 9), torch.zeros(6, 1, 3), torch.zeros(6), torch.zeros(6), 2]
    arguments[place] = value
    with pytest.raises(ValueError, match=f"strip_gate: {words}"):
        strip_gate(*arguments)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match=r"EfficientLocalAttention: variant must be one of .* got 'x'"):
        EfficientLocalAttention(16, "x")
