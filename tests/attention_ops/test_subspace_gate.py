"""The subspace gate (ULSAM) against loops, the official layers and bad callers."""

import math
import zlib

import pytest
import torch

from foveate.attention_ops import SubspaceAttention, subspace_gate
from foveate.attention_ops.subspace_gate import merge_subspaces


def by_loop(x, scale, shift, weight, bias):
    """The definition, one position of one group at a time."""
    batch, channels, height, width = x.shape
    groups, size = weight.shape
    y = torch.relu(x * scale[:, None, None] + shift[:, None, None])
    out = []
    for b in range(batch):
        for g in range(groups):
            part, logits = y[b, g * size : (g + 1) * size], []
            for i in range(height):
                for j in range(width):
                    near = part[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].amax((1, 2))
                    logits.append(torch.relu((near * weight[g]).sum() + bias[g]))
            powers = [logit.exp() for logit in logits]
            gate = torch.stack([p / sum(powers) for p in powers]).view(height, width)
            own = x[b, g * size : (g + 1) * size]
            out.append(own * gate + own)
    return torch.stack(out).view(batch, channels, height, width)


def weights(channels, groups):
    shapes = ((channels,), (channels,), (groups, channels // groups), (groups,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(("channels", "groups", "size"), [(6, 2, (5, 3)), (4, 4, (1, 4)), (3, 1, (2, 2))])
def test_it_is_the_definition_with_every_gradient(channels, groups, size, layout, impl):
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    given = weights(channels, groups)
    out, expected = subspace_gate(x, *given, impl=impl), by_loop(x, *given)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), [x, *given]) for y in (out, expected)))


def official(det, case):
    layer = SubspaceAttention(case["ctor"]["nin"], case["ctor"]["num_splits"]).eval()
    return layer, det.det_state_dict(case["state_dict"], case["mul"])


def test_the_layer_equals_the_official_ones(det, golden):
    cases, arrays = golden("module__ulsam")[0]["cases"], golden("module__ulsam")[1]
    assert len(cases) == 4
    for name, case in cases.items():
        layer, weights = official(det, case)
        layer.load_state_dict(weights)
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
        for ours, key in ((layer.attention(x).flatten(2), "attention"), (layer(x), "out")):
            theirs = torch.from_numpy(arrays[f"{name}__{key}"])
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
        assert sum(p.numel() for p in layer.parameters()) == case["params"]


def test_gradients_equal_the_official_ones(det, golden):
    for name, case in golden("module__ulsam")[0]["cases"].items():
        layer, weights = official(det, case)
        leaves = {k: w.requires_grad_(k in case["grads"]) for k, w in weights.items()}
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
        out = torch.func.functional_call(layer, merge_subspaces(leaves), (x,))
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        largest = max(l2 for l2, _ in case["grads"].values())
        for key, (l2, dot) in case["grads"].items():
            grad = leaves[key].grad
            probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
            off = max(abs(grad.norm() - l2), abs((grad * probe).sum() - dot))
            assert off <= 1e-4 * l2 + 1e-6 * largest, (name, key)


def test_the_op_with_folded_norms_is_the_layer():
    torch.manual_seed(0)
    layer = SubspaceAttention(12, 3).double().eval()
    for norm in (layer.bn_dws, layer.bn_point):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(layer.conv_point.weight)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(subspace_gate(x, *folded(layer)), layer(x))


def folded(layer):
    """Arguments of the op from a layer in eval mode."""
    found = []
    for conv, norm in ((layer.conv_dws, layer.bn_dws), (layer.conv_point, layer.bn_point)):
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        found += [conv.weight.flatten(1) * factor[:, None], (conv.bias - norm.running_mean) * factor + norm.bias]
    return [found[0][:, 0], *found[1:]]


def test_maps_sum_to_one():
    layer = SubspaceAttention(8, 2).eval()
    assert torch.allclose(layer.attention(torch.randn(2, 8, 4, 5)).sum((2, 3)), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(6, 5, 5)}, r"x must be \(B, C, H, W\), got shape \(6, 5, 5\)"),
        ({"weight": torch.zeros(4, 2)}, r"weight must be \(groups, C / groups\) for C = 6, got \(4, 2\)"),
        ({"channel_scale": torch.zeros(5)}, r"channel_scale must be \(6,\), got \(5,\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(2,\), got \(3,\)"),
    ],
)
def test_bad_input_is_refused_by_name(changes, words):
    fine = {"x": torch.zeros(1, 6, 5, 5), "channel_scale": torch.zeros(6), "channel_shift": torch.zeros(6)}
    fine |= {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"subspace_gate: {words}"):
        subspace_gate(**{**fine, **changes})


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="SubspaceAttention: groups must divide the 10 channels, got 4"):
        SubspaceAttention(10, 4)


def test_the_norms_follow_the_last_batch():
    layer = SubspaceAttention(4, 2).train()
    x = torch.randn(8, 4, 6, 6) + 3
    layer(x)
    mean = layer.conv_dws(x).mean((0, 2, 3))
    torch.testing.assert_close(layer.bn_dws.running_mean, 0.9 * mean.detach())
    assert math.isclose(layer.bn_point.momentum, 0.9)
