"""A NaN or an infinity in a key reaches the queries that see the key, and no others; the same in the backward pass."""

import pytest
import torch
from ops import CASES

from foveate.attention_ops import circle_attention, neighborhood_attention

LOCAL = [name for name, case in CASES.items() if case.local]
every_local = pytest.mark.parametrize("name", LOCAL)
every_body = pytest.mark.parametrize("impl", ["reference", "tiled"])
every_number = pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])


def sees(case, place, dtype=torch.float64):
    """Which outputs depend on the key or value of image 0 at a place (row, column): (B, H, W) bool, by brute force."""
    tensors = case.tensors(dtype, grad=False)
    before = case.call(*tensors, impl="reference")
    moved = [t.clone() for t in tensors]
    for t in moved[1:3]:
        t[(0, *place)] += 1.0
    return (case.call(*moved, impl="reference") != before).flatten(3).any(-1)


@every_local
@every_body
@every_number
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_others_are_as_without_it(name, impl, number, which):
    case = CASES[name]
    tensors, place = case.tensors(grad=False), (case.shapes[1][1] - 1, 1)
    expected, seen = case.call(*tensors, impl="reference"), sees(case, place)
    tensors[which][(0, *place)] = number
    out = case.call(*tensors, impl=impl)
    assert seen.any() and not seen.all()
    torch.testing.assert_close(out[~seen], expected[~seen])
    torch.testing.assert_close(out, case.call(*tensors, impl="reference"), equal_nan=True)
    if number != number:
        assert out[seen].isnan().flatten(1).any(-1).all()


@every_local
@every_body
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["query", "key", "value", "gradient"])
def test_gradients_of_others_are_as_without_it(name, impl, which):
    """Tokens that no affected query sees have the gradients of a loss without the affected queries."""
    case, place = CASES[name], (0, 1)
    tensors = case.tensors()
    weight = torch.linspace(0.5, 1.5, case.call(*tensors).numel(), dtype=torch.float64).view_as(case.call(*tensors))
    affected = sees(case, place) if which in (1, 2) else torch.zeros(weight.shape[:3], dtype=torch.bool)
    affected[(0, *place)] |= which in (0, 3)
    affected = affected[..., None, None]
    expected = gradients(case, tensors, weight.masked_fill(affected, 0))
    seen_by_affected = [g.flatten(3).any(-1) for g in gradients(case, tensors, weight.masked_fill(~affected, 0))]
    if which < 3:
        with torch.no_grad():
            tensors[which][(0, *place)] = torch.nan
    else:
        weight[(0, *place)] = torch.nan
    got = gradients(case, tensors, weight, impl)
    assert not all(g.isfinite().all() for g in got)
    for ours, wanted, seen in zip(got, expected, seen_by_affected, strict=True):
        assert seen.any() and not seen.all()
        torch.testing.assert_close(ours[~seen], wanted[~seen])


def gradients(case, tensors, weight, impl="reference"):
    """Of q, k and v."""
    return torch.autograd.grad(case.call(*tensors, impl=impl), tensors[:3], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOCAL)
def test_low_precision_keeps_a_nan_where_it_is_seen(name, dtype):
    case, place = CASES[name], (0, 1)
    tensors, seen = case.tensors(dtype, grad=False), sees(case, place)
    tensors[1][(0, *place)] = torch.nan
    finite = case.call(*tensors, impl="tiled").isfinite().flatten(3).all(-1)
    assert torch.equal(finite, ~seen)


def test_a_large_map_of_several_tiles_keeps_a_nan_within_its_neighborhood():
    x = torch.randn(1, 30, 33, 2, 8)
    bad = x.clone()
    bad[0, 14, 14] = torch.nan
    for call in (lambda k: neighborhood_attention(x, k, k, 7), lambda k: circle_attention(x, k, k, 4)):
        out, wanted = call(bad), call(x)
        touched = ~out.isfinite().flatten(3).all(-1)
        assert 0 < touched.sum() <= 49
        torch.testing.assert_close(out[~touched], wanted[~touched])
