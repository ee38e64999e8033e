"""Channel attention against a loop, the official layers and bad callers."""

import pytest
import torch

from foveate.attention_ops import ChannelAttention, channel_attention


def by_loop(q, k, v, scale):
    """The definition, one head of one image at a time."""
    out = torch.empty_like(v)
    for b in range(q.shape[0]):
        for head in range(q.shape[3]):
            one = [t[b, :, :, head].flatten(0, 1) for t in (q, k, v)]  # (N, d)
            probs = (scale * one[0].T @ one[1]).softmax(-1)
            out[b, :, :, head] = (one[2] @ probs.T).unflatten(0, q.shape[1:3])
    return out


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize(
    ("size", "heads", "dim", "scale"), [((5, 3), 2, 4, None), ((1, 7), 1, 6, 0.3), ((4, 4), 3, 1, 1.0)]
)
def test_it_is_the_definition_with_every_gradient(size, heads, dim, scale, impl):
    qkv = torch.randn(2, *size, 3, heads, dim, dtype=torch.float64, requires_grad=True)
    out = channel_attention(*qkv.unbind(3), scale=scale, impl=impl)
    expected = by_loop(*qkv.unbind(3), dim**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), qkv) for y in (out, expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_low_precision_torch(dtype):
    qkv = torch.randn(1, 28, 30, 3, 2, 16)
    exact = channel_attention(*qkv.double().unbind(3), scale=0.03, impl="reference")
    q, k, v = qkv.to(dtype).unbind(3)
    plain = by_loop(q, k, v, 0.03)
    ours = channel_attention(q, k, v, scale=0.03)
    floor = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


def test_a_sum_over_many_tokens_does_not_overflow_half_precision():
    q = torch.full((1, 64, 64, 1, 2), 5.0, dtype=torch.float16)  # q . k is 102400
    assert channel_attention(q, q, q, scale=0.01).isfinite().all()


def test_the_layer_equals_the_official_ones(det, golden, relative_error):
    cases, arrays = golden("module__davit")
    tried = 0
    for name, case in cases.items():
        if not name.startswith("channel_attn"):
            continue
        layer = ChannelAttention(case["dim"], case["heads"], by_tokens="V2" in case["kind"])
        weights = det.det_state_dict(case["state_dict"])
        layer.load_state_dict({key.removeprefix("attn."): value for key, value in weights.items()})
        x = torch.from_numpy(det.det_input(case["x"]["shape"], case["x"]["seed"])).requires_grad_()
        out = layer(x.unflatten(1, (5, 7))).flatten(1, 2)
        (out * torch.from_numpy(det.det_input(out.shape, 15))).sum().backward()
        assert relative_error(out, arrays[f"{name}/out"]) < 1e-5, name
        assert relative_error(x.grad, arrays[f"{name}/dx"]) < 1e-5, name
        for key, parameter in layer.named_parameters():
            assert relative_error(parameter.grad, arrays[f"{name}/d.{key}"]) < 2e-5, (name, key)
        tried += 1
    assert tried == 3


def test_bad_input_is_refused_by_name():
    q = torch.zeros(1, 4, 4, 2, 8)
    with pytest.raises(ValueError, match="channel_attention: k must have the shape of q"):
        channel_attention(q, q[:, :3], q)
    with pytest.raises(ValueError, match="ChannelAttention: heads must divide dim 8, got 3"):
        ChannelAttention(8, 3)
