"""Neighborhood attention against its definition, the official code and bad callers."""

import numpy as np
import pytest
import torch

from foveate.attention_ops import NeighborhoodAttention2d, neighborhood_attention, window_attention
from foveate.attention_ops.neighborhood import axis_window
from foveate.attention_ops.neighborhood_cpu import Neighborhood
from foveate.attention_ops.tile_plan import tile_mask, tile_plan

# (map, kernel, dilation): never square, so that a swapped axis shows. Maps of one tile, maps that cross tiles on one
# axis or both, even kernels, dilations that do not divide the map.
CASES = [
    ((7, 9), (7, 7), (1, 1)),
    ((11, 19), (5, 3), (1, 2)),
    ((30, 8), (7, 5), (1, 1)),
    ((33, 41), (7, 7), (1, 1)),
    ((29, 37), (3, 5), (3, 2)),
    ((25, 31), (4, 6), (1, 1)),
    ((20, 47), (2, 9), (4, 1)),
    ((40, 36), (13, 3), (2, 5)),
    ((9, 50), (1, 1), (2, 3)),
]
STRIDED = [  # and the stride
    ((12, 15), (4, 5), (1, 1), (4, 5)),  # windows that divide the map
    ((11, 26), (5, 4), (2, 1), (5, 3)),
    ((7, 34), (7, 9), (1, 3), (2, 4)),
    ((25, 31), (6, 7), (1, 1), (1, 6)),
]


def qkv(size, heads=2, head_dim=8, batch=2, dtype=torch.float64, seed=0):
    """Strided views of a packed qkv, as a model hands them over, and the leaf behind them."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, *size, 3, heads, head_dim, generator=generator, dtype=dtype).requires_grad_()
    return packed, packed.unbind(3)


def bias(heads, kernel, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def brute_force(q, k, v, kernel, dilation, rpb, causal, stride=(1, 1)):
    """One query at a time, in numpy: nothing shared with the code under test."""
    q, k, v, rpb = (t.detach().numpy() for t in (q, k, v, rpb))
    batch, height, width, heads, dim = q.shape
    out = np.zeros_like(q)

    def seen(position, length, kernel, step, causal, stride):
        line = list(range(position % step, length, step))
        rank = line.index(position)
        leader = min(rank - rank % stride + (stride - 1 if causal else stride // 2), len(line) - 1)
        start = min(max(leader - kernel // 2, 0), len(line) - kernel)
        ranks = range(max(leader - kernel + 1, 0), rank + 1) if causal else range(start, start + kernel)
        return [(line[r], r - rank + kernel - 1) for r in ranks]

    for y in range(height):
        rows = seen(y, height, kernel[0], dilation[0], causal[0], stride[0])
        for x in range(width):
            cols = seen(x, width, kernel[1], dilation[1], causal[1], stride[1])
            keys = [(r, c) for r, _ in rows for c, _ in cols]
            cells = [(r, c) for _, r in rows for _, c in cols]
            for b in range(batch):
                for n in range(heads):
                    logits = np.array([q[b, y, x, n] @ k[b, r, c, n] for r, c in keys]) * dim**-0.5
                    logits += np.array([rpb[n, r, c] for r, c in cells])
                    weights = np.exp(logits - logits.max())
                    weights /= weights.sum()
                    out[b, y, x, n] = sum(w * v[b, r, c, n] for w, (r, c) in zip(weights, keys, strict=True))
    return torch.from_numpy(out)


@pytest.mark.parametrize("causal", [(False, False), (True, False), (True, True)], ids=["two-sided", "rows", "both"])
@pytest.mark.parametrize(("size", "kernel", "dilation"), [*CASES[:2], CASES[4]])
def test_reference_equals_brute_force(size, kernel, dilation, causal):
    _, (q, k, v) = qkv(size, batch=1, head_dim=4)
    rpb = bias(2, kernel)
    out = neighborhood_attention(q, k, v, kernel, dilation, rpb=rpb, is_causal=causal, impl="reference")
    torch.testing.assert_close(out, brute_force(q, k, v, kernel, dilation, rpb, causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [(False, False), (False, True), (True, True)], ids=["two-sided", "columns", "both"])
@pytest.mark.parametrize("biased", [True, False], ids=["rpb", "plain"])
@pytest.mark.parametrize(("size", "kernel", "dilation"), CASES)
def test_tiled_equals_reference_with_every_gradient(size, kernel, dilation, biased, causal):
    packed, (q, k, v) = qkv(size)
    rpb = bias(2, kernel) if biased else None
    results = []
    for impl in ("tiled", "reference"):
        out = neighborhood_attention(q, k, v, kernel, dilation, rpb=rpb, is_causal=causal, impl=impl)
        leaves = [packed, rpb] if biased else [packed]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for tiled, reference in zip(*results, strict=True):
        torch.testing.assert_close(tiled, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [(False, False), (True, False), (True, True)], ids=["two-sided", "rows", "both"])
@pytest.mark.parametrize(("size", "kernel", "dilation", "stride"), STRIDED)
def test_strided_bodies_equal_brute_force_with_every_gradient(size, kernel, dilation, stride, causal):
    packed, (q, k, v) = qkv(size, batch=1, head_dim=4)
    rpb, results = bias(2, kernel), []
    for impl in ("reference", "tiled"):
        arguments = {"stride": stride, "rpb": rpb, "is_causal": causal, "impl": impl}
        out = neighborhood_attention(q, k, v, kernel, dilation, **arguments)
        results.append([out, *torch.autograd.grad(out.pow(3).sum(), [packed, rpb])])
    expected = brute_force(q, k, v, kernel, dilation, rpb, causal, stride)
    torch.testing.assert_close(results[0][0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_a_stride_of_the_whole_kernel_gives_windows(impl):
    _, (q, k, v) = qkv((12, 15))
    strided = neighborhood_attention(q, k, v, (4, 5), stride=(4, 5), impl=impl)
    torch.testing.assert_close(strided, window_attention(q, k, v, (4, 5)))


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_on_a_map_of_the_size_of_the_kernel_every_query_sees_all_keys(impl):
    _, (q, k, v) = qkv((6, 9))
    strided = neighborhood_attention(q, k, v, (6, 9), stride=(4, 9), impl=impl)
    torch.testing.assert_close(strided, window_attention(q, k, v, (6, 9)))


def test_the_layer_takes_a_stride():
    torch.manual_seed(0)
    layer, x = NeighborhoodAttention2d(8, 2, 5, stride=(5, 1)), torch.randn(1, 10, 12, 8)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).unbind(3)
    out = neighborhood_attention(q, k, v, 5, stride=(5, 1), rpb=layer.rpb, impl="reference")
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(3)))


def test_a_batch_of_several_chunks_equals_its_images_one_by_one(monkeypatch):
    monkeypatch.setattr("foveate.attention_ops.tiled_attention.CHUNK_LOGITS", 1)
    packed, (q, k, v) = qkv((33, 20), batch=5)
    rpb = bias(2, (7, 7))
    out = neighborhood_attention(q, k, v, 7, rpb=rpb)
    grads = torch.autograd.grad(out.square().sum(), [packed, rpb])
    monkeypatch.undo()
    whole = neighborhood_attention(q, k, v, 7, rpb=rpb, impl="reference")
    expected = torch.autograd.grad(whole.square().sum(), [packed, rpb])
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiled_is_no_worse_than_low_precision_torch(dtype):
    _, (q, k, v) = qkv((33, 20), head_dim=32, dtype=torch.float32)
    rpb = bias(2, (7, 7), torch.float32)
    low = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, rpb)]
    exact = [t.detach().double().requires_grad_() for t in low]

    def run(tensors, impl):
        out = neighborhood_attention(*tensors[:3], 7, rpb=tensors[3], impl=impl)
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    def plain(tensors):
        """Dense torch at the same dtype: every rounding that plain code makes."""
        q, k, v, rpb = tensors
        (row, _, row_bias), (col, _, col_bias) = axis_window(33, 7, 1, False), axis_window(20, 7, 1, False)
        near = (row[:, None, :, None], col[None, :, None, :])
        logits = torch.einsum("bhwnd,bhwijnd->bnhwij", q * 32**-0.5, k[:, near[0], near[1]])
        logits = logits + rpb[:, row_bias[:, None, :, None], col_bias[None, :, None, :]]
        probs = logits.flatten(-2).softmax(-1).view_as(logits)
        out = torch.einsum("bnhwij,bhwijnd->bhwnd", probs, v[:, near[0], near[1]])
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    for ours, torchs, truth in zip(run(low, "tiled"), plain(low), run(exact, "reference"), strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (torchs - truth).abs().max() + floor


def test_every_query_of_the_map_sees_one_key_at_least_and_those_past_the_end_none():
    for size, kernel, dilation, stride in [*((*case, (1, 1)) for case in CASES), *STRIDED]:
        pattern = Neighborhood(kernel, dilation, (True, True), stride)
        mask = tile_mask(pattern, size, tile_plan(pattern, size), torch.device("cpu"))
        assert mask.seen.any(-1).sum() == size[0] * size[1]


def test_a_mask_made_in_inference_mode_serves_training():
    packed, (q, k, v) = qkv((12, 17), dtype=torch.float32)
    with torch.inference_mode():
        neighborhood_attention(q, k, v, 3)
    neighborhood_attention(q, k, v, 3).sum().backward()
    assert packed.grad.abs().sum() > 0


# The official code


def test_axis_tables_equal_the_official_ones(golden):
    tables, _ = golden("module__na_axis_tables")
    for name, table in tables.items():
        length, kernel, dilation = (int(part[1:]) for part in name.split("_"))
        keys, seen, cells = axis_window(length, kernel, dilation, False)
        assert keys.tolist() == table["key_index"], name
        assert cells.tolist() == table["bias_index"], name
        assert seen.all()


def seen_by_queries(size, impl, **arguments):
    """(H * W, H * W) bool: the keys that a query sees. Attention is uniform, and every value is a unit vector."""
    tokens = size[0] * size[1]
    unit = torch.eye(tokens, -(-tokens // 128) * 128).view(1, *size, -1, 128)
    weights = neighborhood_attention(torch.zeros_like(unit), torch.zeros_like(unit), unit, impl=impl, **arguments)
    return weights.flatten(3).flatten(1, 2)[0, :, :tokens] > 0


def check_the_official_masks(golden, impl):
    made, arrays = golden("module__natten_masks")
    assert len(made["cases"]) == len(arrays)
    for case in made["cases"]:
        size, name = case.pop("hw"), case.pop("name")
        tokens, _ = size[0] * size[1], case.pop("keys_per_query")
        mask = torch.from_numpy(np.unpackbits(arrays[name], axis=1)[:, :tokens]).bool()
        assert torch.equal(seen_by_queries(size, impl, **case), mask), (name, case)


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_a_query_sees_the_keys_that_it_sees_in_natten(golden, impl):
    check_the_official_masks(golden, impl)


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_the_op_equals_the_official_one(det, golden, relative_error, impl):
    cases, arrays = golden("module__na2d")
    for case in cases:
        shape = (case["B"], case["heads"], case["H"], case["W"], case["dim"])
        leaves = [torch.from_numpy(det.det_input(shape, seed)).requires_grad_() for seed in (11, 12, 13)]
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in leaves)
        table = (case["heads"], 2 * case["kernel"] - 1, 2 * case["kernel"] - 1)
        rpb = torch.from_numpy(det.det_input(table, 14)).requires_grad_() if case["rpb"] else None
        out = neighborhood_attention(q, k, v, case["kernel"], case["dilation"], rpb=rpb, impl=impl)
        out = out.permute(0, 3, 1, 2, 4)
        out.backward(torch.from_numpy(det.det_input(out.shape, 15)))
        results = dict(zip(("out", "dq", "dk", "dv"), (out, *(t.grad for t in leaves)), strict=True))
        if rpb is not None:
            results["drpb"] = rpb.grad
        for name, ours in results.items():
            assert relative_error(ours, arrays[f"{case['name']}/{name}"]) < 1e-5, (case["name"], name)


def test_the_layer_equals_the_official_one_with_padded_maps_too(det, golden, relative_error):
    cases, arrays = golden("module__na_layer")
    assert any(case["padded"] for case in cases)
    for case in cases:
        layer = NeighborhoodAttention2d(
            case["dim"], case["heads"], case["kernel"], case["dilation"], rel_pos_bias=case["rpb"]
        )
        prefix = case["weights_key_prefix"]
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in det.det_state_dict(case["state_dict"]).items()})
        x = torch.from_numpy(det.det_input(case["x"]["shape"], case["x"]["seed"])).requires_grad_()
        out = layer(x)
        out.backward(torch.from_numpy(det.det_input(out.shape, 15)))
        results = {"out": out, "dx": x.grad, **{f"d.{n}": p.grad for n, p in layer.named_parameters()}}
        for name, ours in results.items():
            assert relative_error(ours, arrays[f"{case['name']}/{name}"]) < 1e-5, (case["name"], name)


# Bad callers


def call(**changes):
    arguments = {name: torch.zeros(1, 9, 8, 2, 4) for name in "qkv"} | {"kernel_size": 3} | changes
    return neighborhood_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(1, 9, 8, 4)}, r"q must be \(B, H, W, heads, head_dim\), got shape \(1, 9, 8, 4\)"),
        ({"k": torch.zeros(1, 9, 7, 2, 4)}, r"k must have the shape of q .* got \(1, 9, 7, 2, 4\)"),
        ({"v": torch.zeros(1, 9, 8, 2, 4, dtype=torch.float64)}, "v must have the dtype of q torch.float32, got"),
        ({"v": torch.zeros(1, 9, 8, 2, 4, device="meta")}, "v must be on the device of q cpu, got meta"),
        ({"kernel_size": 0}, r"kernel_size must be at least 1, got \(0, 0\)"),
        ({"kernel_size": (3, -1)}, r"kernel_size must be at least 1, got \(3, -1\)"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be an int or a pair .* got \(3, 3, 3\)"),
        ({"kernel_size": 2.5}, "kernel_size must be an int or a pair .* got 2.5"),
        ({"dilation": 0}, r"dilation must be at least 1, got \(0, 0\)"),
        ({"stride": 0}, r"stride must be at least 1, got \(0, 0\)"),
        ({"stride": (1, 4)}, r"stride must be at most kernel_size \(3, 3\), got \(1, 4\)"),
        ({"stride": "2"}, "stride must be an int or a pair .* got '2'"),
        ({"dilation": (3, 3)}, r"at least kernel_size \* dilation = \(9, 9\) tokens, got \(9, 8\)"),
        ({"rpb": torch.zeros(2, 5, 4)}, r"rpb must be .* \(2, 5, 5\), got \(2, 5, 4\)"),
        ({"impl": "quick"}, "impl must be one of .* got 'quick'"),
        ({"is_causal": (True, True, True)}, "is_causal must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=f"neighborhood_attention: .*{words}"):
        call(**changes)


def test_integers_and_empty_heads_are_refused():
    ints = torch.zeros(1, 9, 8, 2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        call(q=ints, k=ints, v=ints)
    flat = torch.zeros(1, 9, 8, 2, 0)
    with pytest.raises(ValueError, match="head_dim must be at least 1"):
        call(q=flat, k=flat, v=flat)


def test_the_layer_refuses_heads_that_do_not_divide_dim():
    with pytest.raises(ValueError, match="heads must divide dim 10, got 3"):
        NeighborhoodAttention2d(10, 3)


def test_the_layer_refuses_a_stride_above_the_kernel_size():
    with pytest.raises(ValueError, match=r"Attention2d: stride must be at most kernel_size \(3, 5\), got \(4, 4"):
        NeighborhoodAttention2d(8, 2, (3, 5), stride=4)
