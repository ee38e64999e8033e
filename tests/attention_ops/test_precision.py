"""Sums over all tokens are made in float32, and autocast casts before anything is checked."""

import pytest
import torch
from ops import CASES

from foveate.attention_ops import channel_attention, channel_gate, strip_gate
from foveate.attention_ops.routed import region_means

CAST = [name for name in CASES if "gate" not in name and name != "large kernel"]  # which keep the dtype of their map
every_body = pytest.mark.parametrize("impl", ["reference", "tiled", "auto"])


@every_body
@pytest.mark.parametrize("name", CAST)
def test_autocast_takes_mixed_dtypes_as_sdpa_does(name, impl):
    """q and k in float32, v in bfloat16: what a normalization of q and k leaves under autocast."""
    tensors = CASES[name].tensors(torch.float32, grad=False)
    for mixed in (2, 0):
        given = [t.bfloat16() if i == mixed else t for i, t in enumerate(tensors)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = CASES[name].call(*given, impl=impl)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(
            out, CASES[name].call(*(t.bfloat16() for t in tensors), impl=impl), rtol=0.02, atol=0.02
        )


@every_body
@pytest.mark.parametrize("name", CASES)
def test_autocast_leaves_float64_alone(name, impl):
    tensors = CASES[name].tensors(grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = CASES[name].call(*tensors, impl=impl)
    torch.testing.assert_close(out, CASES[name].call(*tensors, impl="reference"))


@every_body
@pytest.mark.parametrize("name", [*CAST, "large kernel"])
def test_without_autocast_mixed_dtypes_are_refused(name, impl):
    first, second, *rest = CASES[name].tensors(torch.float32, grad=False)
    with pytest.raises(ValueError, match=r"must have the dtype of .*float"):
        CASES[name].call(first, second.bfloat16(), *rest, impl=impl)


def test_channel_attention_in_half_precision_stays_finite_over_many_tokens():
    q = torch.full((1, 208, 208, 1, 4), 3.0, dtype=torch.float16)
    assert channel_attention(q, q, q).isfinite().all()


def error(call, tensors, dtype, impl):
    """Largest difference from float64, in standard deviations of the output."""
    exact = call(*(t.to(dtype).double() for t in tensors), impl="reference")
    return ((call(*(t.to(dtype) for t in tensors), impl=impl).double() - exact).abs().max() / exact.std()).item()


OVER_TOKENS = {
    "channel attention": (lambda q, k, v, impl: channel_attention(q, k, v, impl=impl), ((1, 56, 56, 2, 16),) * 3),
    "channel gate": (lambda x, w, impl: channel_gate(x, w, impl=impl), ((1, 8, 56, 56), (1, 1, 3))),
    "strip gate": (
        lambda x, w, a, b, impl: strip_gate(x, w, a, b, 4, impl=impl),
        ((1, 8, 56, 56), (8, 1, 5), (8,), (8,)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OVER_TOKENS)
def test_a_sum_over_tokens_is_as_precise_as_the_references(name, dtype):
    """Both round their 16-bit result once; a sum in 16 bits would add much more."""
    call, shapes = OVER_TOKENS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) + 0.5 for shape in shapes]
    tiled, reference = (error(call, tensors, dtype, impl) for impl in ("tiled", "reference"))
    assert tiled <= 2 * reference + 2 * torch.finfo(dtype).eps


def test_region_means_of_half_precision_are_made_in_float32():
    x = torch.full((1, 64, 64, 4), 100.0, dtype=torch.float16)
    assert torch.equal(region_means(x, (64, 64)), torch.full((1, 1, 4), 100.0))
