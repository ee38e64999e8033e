"""Window attention against one window at a time, and bad callers."""

import numpy as np
import pytest
import torch

from foveate.attention_ops import WindowAttention2d, window_attention

# (map, window): never square at once; one window, windows on one axis, on both, and of one token
CASES = [((6, 10), (3, 5)), ((4, 9), (4, 9)), ((12, 5), (2, 5)), ((7, 14), (7, 2)), ((3, 4), (1, 1))]


def qkv(size, heads=2, head_dim=8, batch=2, dtype=torch.float64, seed=0):
    """Strided views of a packed qkv, as a model hands them over, and the leaf behind them."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, *size, 3, heads, head_dim, generator=generator, dtype=dtype).requires_grad_()
    return packed, packed.unbind(3)


def extras(size, window, biased, masked, heads=2, dtype=torch.float64):
    """A bias that learns and a mask without empty rows, or None for either."""
    generator = torch.Generator().manual_seed(1)
    tokens, windows = window[0] * window[1], size[0] * size[1] // (window[0] * window[1])
    bias = torch.randn(heads, tokens, tokens, generator=generator, dtype=dtype).requires_grad_() if biased else None
    mask = torch.rand(windows, tokens, tokens, generator=generator) > 0.5
    return bias, (mask | torch.eye(tokens, dtype=torch.bool)) if masked else None


def brute_force(q, k, v, window, bias, mask):
    """One query at a time, in numpy: nothing shared with the code under test."""
    q, k, v = (t.detach().numpy() for t in (q, k, v))
    out = np.zeros_like(q)
    batch, height, width, heads, dim = q.shape
    for b, y, x, n in np.ndindex(batch, height, width, heads):
        top, left = y // window[0] * window[0], x // window[1] * window[1]
        keys = [(r, c) for r in range(top, top + window[0]) for c in range(left, left + window[1])]
        own, place = keys.index((y, x)), (top // window[0]) * (width // window[1]) + left // window[1]
        logits = np.array([q[b, y, x, n] @ k[b, r, c, n] for r, c in keys]) * dim**-0.5
        if bias is not None:
            logits += bias[n, own].detach().numpy()
        if mask is not None:
            logits[~mask[place, own].numpy()] = -np.inf
        weights = np.exp(logits - logits.max())
        out[b, y, x, n] = sum(w * v[b, r, c, n] for w, (r, c) in zip(weights / weights.sum(), keys, strict=True))
    return torch.from_numpy(out)


every_extra = pytest.mark.parametrize(
    ("biased", "masked"), [(False, False), (True, False), (False, True), (True, True)]
)


@every_extra
@pytest.mark.parametrize(("size", "window"), CASES[:3])
def test_reference_equals_brute_force(size, window, biased, masked):
    _, (q, k, v) = qkv(size, head_dim=4)
    bias, mask = extras(size, window, biased, masked)
    out = window_attention(q, k, v, window, bias=bias, mask=mask, impl="reference")
    torch.testing.assert_close(out, brute_force(q, k, v, window, bias, mask), rtol=0, atol=1e-12)


@every_extra
@pytest.mark.parametrize(("size", "window"), CASES)
def test_tiled_equals_reference_with_every_gradient(size, window, biased, masked):
    packed, (q, k, v) = qkv(size)
    bias, mask = extras(size, window, biased, masked)
    leaves = [packed, bias] if biased else [packed]
    results = []
    for impl in ("tiled", "reference"):
        out = window_attention(q, k, v, window, bias=bias, mask=mask, impl=impl)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for tiled, reference in zip(*results, strict=True):
        torch.testing.assert_close(tiled, reference, rtol=0, atol=1e-11)


@every_extra
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiled_is_no_worse_than_low_precision_torch(dtype, biased, masked):
    size, window = (12, 10), (6, 5)
    _, inputs = qkv(size, head_dim=32, dtype=torch.float32)
    bias, mask = extras(size, window, biased, masked, dtype=torch.float32)
    low = [t.detach().to(dtype).requires_grad_() for t in (*inputs, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in low]

    def run(tensors, impl):
        out = window_attention(*tensors[:3], window, bias=tensors[3] if biased else None, mask=mask, impl=impl)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    def plain(tensors):
        """Dense torch at the same dtype, one window after the other: every rounding that plain code makes."""
        rows = []
        for top in range(0, size[0], window[0]):
            row = []
            for left in range(0, size[1], window[1]):
                tiles = (t[:, top : top + window[0], left : left + window[1]] for t in tensors[:3])
                q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in tiles)
                logits = q * 32**-0.5 @ k.mT
                if biased:
                    logits = logits + tensors[3]
                if masked:
                    logits = logits.masked_fill(~mask[top // window[0] * 2 + left // window[1]], -torch.inf)
                row.append((logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, window))
            rows.append(torch.cat(row, 2))
        out = torch.cat(rows, 1)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    for ours, torchs, truth in zip(run(low, "tiled"), plain(low), run(exact, "reference"), strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (torchs - truth).abs().max() + floor


@pytest.mark.parametrize("size", [(6, 10), (5, 7), (2, 3)])
def test_the_layer_pads_with_zeros_before_the_projection_and_crops(size):
    torch.manual_seed(0)
    layer = WindowAttention2d(16, 2, (3, 5))
    torch.nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, *size, 16)
    whole = torch.zeros(2, -(-size[0] // 3) * 3, -(-size[1] // 5) * 5, 16)
    whole[:, : size[0], : size[1]] = x
    q, k, v = layer.qkv(whole).unflatten(-1, (3, 2, 8)).unbind(3)
    expected = layer.proj(window_attention(q, k, v, (3, 5), impl="reference").flatten(3))[:, : size[0], : size[1]]
    torch.testing.assert_close(layer(x), expected)


# Bad callers


def call(**changes):
    arguments = {name: torch.zeros(1, 6, 10, 2, 4) for name in "qkv"} | {"window_size": (3, 5)} | changes
    return window_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(1, 6, 10, 8)}, r"q must be \(B, H, W, heads, head_dim\), got shape \(1, 6, 10, 8\)"),
        ({"k": torch.zeros(1, 6, 5, 2, 4)}, r"k must have the shape of q .* got \(1, 6, 5, 2, 4\)"),
        ({"window_size": (4, 5)}, r"window_size \(4, 5\) must divide the map \(6, 10\)"),
        ({"window_size": 0}, r"window_size must be at least 1, got \(0, 0\)"),
        ({"window_size": (2, 2, 2)}, "window_size must be an int or a pair"),
        ({"bias": torch.zeros(2, 15, 14)}, r"bias must be .* = \(2, 15, 15\), got \(2, 15, 14\)"),
        ({"bias": torch.zeros(2, 15, 15, device="meta")}, "bias must be on the device of q cpu, got meta"),
        ({"mask": torch.ones(3, 15, 15, dtype=torch.bool)}, r"mask must be .* = \(4, 15, 15\), got \(3, 15, 15\)"),
        ({"mask": torch.ones(4, 15, 15)}, "mask must be bool, got torch.float32"),
        ({"impl": "quick"}, "impl must be one of .* got 'quick'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=f"window_attention: .*{words}"):
        call(**changes)


def test_the_layer_refuses_heads_that_do_not_divide_dim():
    with pytest.raises(ValueError, match="heads must divide dim 10, got 3"):
        WindowAttention2d(10, 3)
