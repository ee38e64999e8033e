"""Circular attention against a loop over queries and bad callers."""

import pytest
import torch

from foveate.attention_ops import circle_attention


def by_loop(q, k, v, radius, scale):
    """The definition, one query at a time."""
    out = torch.zeros_like(v)
    height, width = q.shape[1:3]
    for y in range(height):
        for x in range(width):
            near = [
                (i, j)
                for i in range(height)
                for j in range(width)
                if (i - y) ** 2 + (j - x) ** 2 < radius**2
            ]  # fmt: skip
            keys, values = (torch.stack([t[:, i, j] for i, j in near]) for t in (k, v))
            probs = ((q[:, y, x] * keys).sum(-1) * scale).softmax(0)
            out[:, y, x] = (probs[..., None] * values).sum(0)
    return out


def packed(height, width, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, height, width, 3, 2, 4, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize(("size", "radius"), [((7, 5), 3), ((11, 19), 4), ((9, 13), 1), ((5, 6), 9), ((17, 8), 2)])
def test_it_is_the_definition_with_every_gradient(size, radius, impl):
    leaf = packed(*size)
    out = circle_attention(*leaf.unbind(3), radius, impl=impl)
    expected = by_loop(*leaf.unbind(3), radius, 0.5)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), leaf) for y in (out, expected)))


def test_a_distance_of_the_radius_itself_is_not_seen():
    x = torch.zeros(1, 1, 4, 1, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).view_as(x)
    torch.testing.assert_close(circle_attention(x, x, v, 2).flatten(), v.new_tensor([1 / 2, 1 / 3, 0, 0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(1, 4, 4, 8)}, r"q must be \(B, H, W, heads, head_dim\), got shape"),
        ({"k": torch.zeros(1, 4, 5, 2, 8)}, "k must have the shape of q"),
        ({"v": torch.zeros(1, 4, 4, 2, 8, dtype=torch.float64)}, "v must have the dtype of q"),
        ({"v": torch.zeros(1, 4, 5, 2, 8)}, r"v must be \(1, 4, 4, 2, 'value_dim'\) as q, got \(1, 4, 5, 2, 8\)"),
        ({"v": torch.zeros(1, 4, 4, 2, 0)}, "H, W, heads and head_dim must be at least 1"),
        ({"radius": 0}, r"radius must be at least 1, got \(0,\)"),
        ({"impl": "quick"}, "impl must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(changes, words):
    zeros = torch.zeros(1, 4, 4, 2, 8)
    with pytest.raises(ValueError, match=f"circle_attention: {words}"):
        circle_attention(**({"q": zeros, "k": zeros, "v": zeros, "radius": 2} | changes))
