"""HiLo attention against its two halves, the official code and bad callers."""

import re
import zlib

import numpy as np
import pytest
import torch

from foveate.attention_ops import HiLoAttention, hilo_attention, window_attention

# (map, window, pooled map, high heads, low heads): never square; one branch alone; windows of one token
CASES = [
    ((6, 10), (2, 2), (3, 5), 2, 3),
    ((8, 3), (4, 3), (2, 1), 1, 2),
    ((6, 4), (3, 2), (2, 2), 3, 0),
    ((5, 7), (1, 1), (5, 7), 0, 2),
]
every_case = pytest.mark.parametrize(("size", "window", "pooled", "high", "low"), CASES)


def branches(size, pooled, high, low, head_dim=8, dtype=torch.float64):
    """Strided views as the layer makes them, and the leaves behind them."""
    generator = torch.Generator().manual_seed(0)

    def packed(size, parts, heads):
        return torch.randn(2, *size, parts, heads, head_dim, generator=generator, dtype=dtype).requires_grad_()

    leaves = [packed(size, 3, high), packed(size, 1, low), packed(pooled, 2, low)]
    return leaves, leaves[0].unbind(3), (leaves[1][:, :, :, 0], *leaves[2].unbind(3))


def brute_force(high, low, window):
    """One query at a time, in numpy: nothing shared with the code under test."""
    out = []
    for name, (q, k, v) in (("high", high), ("low", low)):
        q, k, v = (t.detach().numpy() for t in (q, k, v))
        part = np.zeros_like(q)
        batch, height, width, heads, dim = q.shape
        for b, y, x, n in np.ndindex(batch, height, width, heads):
            top, left = y // window[0] * window[0], x // window[1] * window[1]
            near = (slice(top, top + window[0]), slice(left, left + window[1]))
            rows, cols = near if name == "high" else (slice(None), slice(None))
            keys, values = (t[b, rows, cols, n].reshape(-1, dim) for t in (k, v))
            logits = keys @ q[b, y, x, n] * dim**-0.5
            weights = np.exp(logits - logits.max())
            part[b, y, x, n] = weights / weights.sum() @ values
        out.append(part)
    return torch.from_numpy(np.concatenate(out, axis=3))


@every_case
def test_reference_equals_brute_force(size, window, pooled, high, low):
    _, high_qkv, low_qkv = branches(size, pooled, high, low)
    out = hilo_attention(high_qkv, low_qkv, window, impl="reference")
    torch.testing.assert_close(out, brute_force(high_qkv, low_qkv, window), rtol=0, atol=1e-12)


@every_case
def test_tiled_equals_reference_with_every_gradient(size, window, pooled, high, low):
    leaves, high_qkv, low_qkv = branches(size, pooled, high, low)
    leaves = [leaf for leaf in leaves if leaf.numel()]
    results = []
    for impl in ("tiled", "reference"):
        out = hilo_attention(high_qkv, low_qkv, window, impl=impl)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for tiled, reference in zip(*results, strict=True):
        torch.testing.assert_close(tiled, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiled_is_no_worse_than_low_precision_torch(dtype):
    _, high, low = branches((8, 12), (4, 6), 2, 3, head_dim=32, dtype=torch.float32)
    tensors = [t.detach().to(dtype).requires_grad_() for t in (*high, *low)]
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def run(tensors, impl):
        out = hilo_attention(tensors[:3], tensors[3:], 2, impl=impl)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    def plain(tensors):
        """Dense torch at the same dtype, with a mask for the windows: every rounding that plain code makes."""
        place = (torch.arange(8)[:, None] // 2 * 6 + torch.arange(12) // 2).flatten()
        parts = []
        for (q, k, v), seen in ((tensors[:3], place[:, None] == place), (tensors[3:], torch.ones(()).bool())):
            q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
            logits = (q * 32**-0.5 @ k.mT).masked_fill(~seen, -torch.inf)
            parts.append((logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, (8, 12)))
        out = torch.cat(parts, 3)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    for ours, torchs, truth in zip(run(tensors, "tiled"), plain(tensors), run(exact, "reference"), strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (torchs - truth).abs().max() + floor


def test_the_high_branch_is_window_attention():
    _, high, low = branches((6, 4), (2, 2), 3, 0)
    torch.testing.assert_close(hilo_attention(high, low, (3, 2)), window_attention(*high, (3, 2)))


# The layer


@pytest.mark.parametrize(
    ("heads", "window", "alpha", "low"),
    [(12, 2, 0.9, 10), (16, 2, 0.9, 14), (12, 2, 0.7, 8), (12, 2, 0.0, 0), (12, 2, 1.0, 12), (12, 1, 0.3, 12)],
)
def test_alpha_counts_heads_as_the_official_code_and_empty_branches_have_no_parameters(heads, window, alpha, low):
    layer = HiLoAttention(96, heads, window, alpha)
    assert (layer.low_heads, layer.high_heads) == (low, heads - low)
    present = {name[0] for name, _ in layer.named_parameters()}
    assert present == {branch for branch, count in (("l", low), ("h", heads - low)) if count}


def test_the_layer_equals_the_official_one_with_padded_maps_too(det, golden, relative_error):
    cases, arrays = golden("module__litv2")
    cases = {name: case for name, case in cases.items() if case["ctor"]["cls"].startswith("HiLo")}
    assert len(cases) == 24
    for name, case in cases.items():
        c = case["ctor"]
        layer = HiLoAttention(
            c["dim"], c["num_heads"], c["window_size"], c["alpha"], qkv_bias=c["qkv_bias"], scale=c.get("qk_scale")
        )
        layer.load_state_dict(det.det_state_dict(case["state_dict"]))
        size = [int(n) for n in re.search(r"H=(\d+), W=(\d+)", case["layout"]).groups()]
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])).requires_grad_()
        out = layer(x.unflatten(1, size)).flatten(1, 2)
        assert relative_error(out, arrays[f"{name}__out"]) < 1e-5, name
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        gradient = np.array(case["grad_in"]["samples"], dtype=np.float32)
        assert relative_error(x.grad, gradient, gradient.size) < 1e-4, name
        for key, (norm, dot) in case["grads"].items():
            grad = dict(layer.named_parameters())[key].grad
            probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
            assert abs(grad.norm() - norm) <= 1e-4 * norm, (name, key)
            assert abs((grad * probe).sum() - dot) <= 1e-4 * norm, (name, key)


# Bad callers


def call(window=2, impl="auto", **changes):
    named = {f"high_{n}": torch.zeros(1, 6, 4, 2, 8) for n in "qkv"} | {"low_q": torch.zeros(1, 6, 4, 1, 8)}
    named |= {f"low_{n}": torch.zeros(1, 3, 2, 1, 8) for n in "kv"} | changes
    tensors = list(named.values())
    return hilo_attention(tensors[:3], tensors[3:], window, impl=impl)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"high_q": torch.zeros(1, 6, 4, 16)}, r"high must hold q, k, v \(B, H, W, heads, head_dim\), got shapes"),
        ({"high_k": torch.zeros(1, 6, 2, 2, 8)}, "high k must have the shape of high q"),
        ({"low_v": torch.zeros(1, 3, 1, 1, 8)}, "low v must have the shape of low k .* got"),
        ({"low_q": torch.zeros(1, 6, 4, 2, 8)}, "low k must have the batch, heads and head_dim of low q"),
        (
            {f"low_{n}": torch.zeros(1, 3, 2, 1, 4) for n in "qkv"},
            "high q and low q must have one batch, map and head_dim",
        ),
        ({"window": 3}, r"window_size \(3, 3\) must divide the map \(6, 4\)"),
        ({"window": 0}, r"window_size must be at least 1, got \(0, 0\)"),
        ({"impl": "quick"}, "impl must be one of .* got 'quick'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=f"hilo_attention: .*{words}"):
        call(**changes)


def test_two_empty_branches_are_refused():
    empty = [torch.zeros(1, 6, 4, 0, 8)] * 3
    with pytest.raises(ValueError, match="hilo_attention: one of high and low must have heads, got none"):
        hilo_attention(empty, empty, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 3), "heads must divide dim 10, got 3"),
        ((8, 2, 0), r"window_size must be at least 1, got \(0,\)"),
        ((8, 2, 2, 1.5), "alpha must be 0 to 1, got 1.5"),
    ],
)
def test_the_layer_refuses_sizes_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=f"HiLoAttention: {words}"):
        HiLoAttention(*arguments)
