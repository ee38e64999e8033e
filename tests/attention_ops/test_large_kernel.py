"""Large kernel attention against the plain convolutions and bad callers."""

import pytest
import torch
import torch.nn.functional as F
from gates import by_op

from foveate.attention_ops import LargeKernelAttention, large_kernel_attention


def weights(channels, local=5, dilated=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(channels, 1, local, local), (channels,), (channels, 1, dilated, dilated), (channels,)]
    shapes += [(channels, channels, 1, 1), (channels,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(
    ("size", "local", "dilated", "dilation"),
    [((14, 28), 5, 7, 3), ((5, 9), 5, 7, 3), ((1, 2), 3, 5, 4), ((10, 7), 1, 3, 1)],
)
def test_it_is_the_gate_of_figure_2_with_every_gradient(size, local, dilated, dilation, layout, impl):
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    w = weights(6, local, dilated)
    gate = F.conv2d(x, w[0], w[1], padding=local // 2, groups=6)
    gate = F.conv2d(gate, w[2], w[3], padding=dilation * (dilated // 2), dilation=dilation, groups=6)
    expected = x * F.conv2d(gate, w[4], w[5])
    out = large_kernel_attention(x, *w, dilation, impl=impl)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *w]) for y in (out, expected)]
    torch.testing.assert_close(*grads)


def check_the_official_layer(det, golden, relative_error, form):
    """`form` makes what is called of a layer."""
    cases, arrays = golden("module__van")
    for name, case in cases.items():
        if case["ctor"]["cls"] != "LKA":
            continue
        layer = LargeKernelAttention(case["ctor"]["dim"])
        layer.load_state_dict(det.det_state_dict(case["state_dict"]))
        out = form(layer)(torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])))
        assert relative_error(out.contiguous(), arrays[f"{name}__out"]) < 1e-5, name


@pytest.mark.parametrize("form", [lambda layer: layer, by_op], ids=["layer", "op"])
def test_the_layer_equals_the_official_one(form, det, golden, relative_error):
    check_the_official_layer(det, golden, relative_error, form)


def test_the_layer_equals_the_op():
    torch.manual_seed(0)
    layer, x = LargeKernelAttention(6, 3, 5, 2).double(), torch.randn(2, 6, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_op(layer)(x))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.zeros(6, 9, 9), r"x must be \(B, C, H, W\), got shape \(6, 9, 9\)"),
        (1, torch.zeros(6, 1, 4, 4), r"local_weight must be \(C = 6, 1, k, k\) with k odd, got \(6, 1, 4, 4\)"),
        (3, torch.zeros(5, 1, 7, 7), r"dilated_weight must be .* got \(5, 1, 7, 7\)"),
        (5, torch.zeros(6, 5, 1, 1), r"point_weight must be \(6, 6, 1, 1\), got \(6, 5, 1, 1\)"),
        (2, torch.zeros(5), r"local_bias must be \(C = 6,\), got \(5,\)"),
        (5, torch.zeros(6, 6, 1, 1, dtype=torch.float64), "point_weight must have the dtype of x torch.float32"),
        (7, 0, r"dilation must be at least 1, got \(0,\)"),
    ],
)
def test_bad_input_is_refused_by_name(place, value, words):
    arguments = [torch.zeros(1, 6, 9, 9), *weights(6, dtype=torch.float32), 3]
    arguments[place] = value
    with pytest.raises(ValueError, match=f"large_kernel_attention: {words}"):
        large_kernel_attention(*arguments)
