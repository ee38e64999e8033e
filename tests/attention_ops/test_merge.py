"""Log-sum-exps and merged results against dense attention to the union of the keys, in float64."""

import pytest
import torch

from foveate.attention_ops import (
    circle_attention,
    circle_attention_lse,
    halo_attention,
    halo_attention_lse,
    merge_attention,
    neighborhood_attention,
    neighborhood_attention_lse,
    window_attention,
    window_attention_lse,
)
from foveate.attention_ops.neighborhood import axis_window

every_body = pytest.mark.parametrize("impl", ["tiled", "reference"])
SIZE, KERNEL, DILATION = (9, 13), (5, 4), (1, 3)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def inputs():
    """q, k, v of a map, and keys and values of 5 text tokens."""
    return [normal(2, *SIZE, 2, 6, seed=s) for s in range(3)] + [normal(2, 5, 2, 6, seed=s) for s in (3, 4)]


def dense(q, k, v):
    """Attention of a map to a list of tokens, (B, tokens, heads, d), and its log-sum-exp."""
    logits = torch.einsum("bhwnd,btnd->bhwnt", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhwnt,btnd->bhwnd", logits.softmax(-1), v), logits.logsumexp(-1)


def seen(causal):
    """(H, W, H * W) bool: the keys of a query in the map."""
    tables = []
    for length, kernel, dilation, hides in zip(SIZE, KERNEL, DILATION, causal, strict=True):
        keys, shown, _ = axis_window(length, kernel, dilation, hides)
        tables.append(torch.zeros(length, length).scatter_(1, keys, shown.float()) > 0)
    rows, cols = tables
    return (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2)


def dense_union(q, k, v, text_k, text_v, causal):
    """Dense attention to the neighborhood and the text at once."""
    keys, values = (torch.cat([x.flatten(1, 2), text], 1) for x, text in ((k, text_k), (v, text_v)))
    logits = torch.einsum("bhwnd,btnd->bhwnt", q, keys) * q.shape[-1] ** -0.5
    mask = torch.cat([seen(causal), torch.ones(*SIZE, text_k.shape[1], dtype=torch.bool)], -1)
    logits = logits.masked_fill(~mask[None, :, :, None], -torch.inf)
    return torch.einsum("bhwnt,btnd->bhwnd", logits.softmax(-1), values), logits.logsumexp(-1)


@every_body
@pytest.mark.parametrize("causal", [(False, False), (True, False)], ids=["two-sided", "causal rows"])
def test_text_tokens_are_added_by_one_dense_attention(impl, causal):
    q, k, v, text_k, text_v = leaves = inputs()
    near = neighborhood_attention_lse(q, k, v, KERNEL, DILATION, is_causal=causal, impl=impl)
    text = dense(q, text_k, text_v)
    found, expected = merge_attention(*zip(near, text, strict=True)), dense_union(*leaves, causal)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype) for x in expected]
    results = []
    for out, lse in (found, expected):
        loss = (out * weights[0]).sum() + (lse * weights[1]).sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


@every_body
def test_the_output_is_that_of_the_op_without_log_sum_exp(impl):
    q, k, v, *_ = inputs()
    near = neighborhood_attention_lse(q, k, v, KERNEL, DILATION, impl=impl)[0]
    torch.testing.assert_close(near, neighborhood_attention(q, k, v, KERNEL, DILATION, impl=impl))
    near = circle_attention_lse(q, k, v, 3, impl=impl)[0]
    torch.testing.assert_close(near, circle_attention(q, k, v, 3, impl=impl))
    tables = {"rel_h": normal(9, 6, seed=5), "rel_w": normal(11, 6, seed=6)}
    near = halo_attention_lse(q, k, v, (3, 4), 1, **tables, impl=impl)[0]
    torch.testing.assert_close(near, halo_attention(q, k, v, (3, 4), 1, **tables, impl=impl))
    q, k, v = (x[:, :, :12] for x in (q, k, v))
    windows = window_attention_lse(q, k, v, (3, 4), impl=impl)[0]
    torch.testing.assert_close(windows, window_attention(q, k, v, (3, 4), impl=impl))


@every_body
def test_a_circle_that_covers_the_map_and_blocks_of_the_whole_map_are_dense_attention(impl):
    q, k, v, *_ = leaves = inputs()
    exact = dense(q, k.flatten(1, 2), v.flatten(1, 2))
    probes = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype) for x in exact]
    results = []
    for found in (
        exact,
        circle_attention_lse(q, k, v, 20, impl=impl),
        halo_attention_lse(q, k, v, SIZE, 0, impl=impl),
        window_attention_lse(q, k, v, SIZE, impl=impl),
    ):
        loss = sum((x * probe).sum() for x, probe in zip(found, probes, strict=True))
        results.append([*found, *torch.autograd.grad(loss, leaves[:3])])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=1e-11)


@every_body
@pytest.mark.parametrize(
    ("dtype", "of_lse"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
    ids=str,
)
def test_log_sum_exps_are_wide_and_have_no_channel(impl, dtype, of_lse):
    q, k, v, *_ = (x.detach().to(dtype) for x in inputs())
    for out, lse in (
        neighborhood_attention_lse(q, k, v, 3, impl=impl),
        window_attention_lse(q, k, v, (9, 13), impl=impl),
        halo_attention_lse(q, k, v, 4, 1, impl=impl),
        circle_attention_lse(q, k, v, 2, impl=impl),
    ):
        assert (out.dtype, lse.dtype, lse.shape) == (dtype, of_lse, q.shape[:-1])


@every_body
def test_one_of_two_outputs_may_be_used_alone(impl):
    """The log-sum-exp of one key is its logit: the gradient of q is k times the scale."""
    q, k, v, *_ = inputs()
    _, lse = neighborhood_attention_lse(q, k, v, 1, scale=0.5, impl=impl)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), [q, k]), (0.5 * k.detach(), 0.5 * q.detach()))
    out, _ = neighborhood_attention_lse(q, k, v, 1, scale=0.5, impl=impl)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), v)[0], torch.ones_like(v))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_the_keys_merge_to_all_keys(parts):
    q, k, v = normal(2, 3, 4, 2, 6), normal(2, 10, 2, 6, seed=1), normal(2, 10, 2, 6, seed=2)
    pieces = [dense(q, a, b) for a, b in zip(k.chunk(parts, 1), v.chunk(parts, 1), strict=True)]
    torch.testing.assert_close(merge_attention(*zip(*pieces, strict=True)), dense(q, k, v))


def test_large_logits_do_not_overflow():
    outs, lses = [torch.full((1, 2), x) for x in (1.0, 3.0)], [torch.full((1,), x) for x in (1e4, 1e4)]
    out, lse = merge_attention(outs, lses)
    assert out.tolist() == [[2.0, 2.0]] and lse.isfinite().all()


def test_a_part_without_keys_changes_nothing_and_has_no_gradient():
    out, lse = normal(3, 2, 4), normal(3, 2, seed=1)
    nothing = torch.full_like(out, torch.nan).requires_grad_()
    empty = torch.full_like(lse, -torch.inf).requires_grad_()
    merged = merge_attention([out, nothing], [lse, empty])
    torch.testing.assert_close(merged, (out, lse))
    grads = torch.autograd.grad(sum(x.sum() for x in merged), [out, lse, nothing, empty])
    torch.testing.assert_close(grads, (torch.ones_like(out), torch.ones_like(lse), *map(torch.zeros_like, (out, lse))))


def test_without_any_keys_the_output_is_zero():
    nothing, empty = normal(3, 2, 4), torch.full((3, 2), -torch.inf, dtype=torch.float64).requires_grad_()
    out, lse = merge_attention([nothing, nothing], [empty, empty])
    assert not out.any() and (lse == -torch.inf).all()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), [nothing, empty]))


def test_16_bit_outputs_are_merged_in_float32():
    outs = [normal(50, 2, 4, seed=s).detach().bfloat16() for s in (0, 1)]
    lses = [normal(50, 2, seed=s).detach().float() for s in (2, 3)]
    out, lse = merge_attention(outs, lses)
    exact = merge_attention([x.double() for x in outs], [x.double() for x in lses])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, exact[0].bfloat16())


def test_merging_has_derivatives_of_both_orders_and_modes():
    tensors = [normal(3, 2, 4, seed=s) for s in (0, 1)] + [normal(3, 2, seed=s) for s in (2, 3)]

    def merge(a, b, x, y):
        return torch.cat([t.flatten() for t in merge_attention([a, b], [x, y])])

    assert torch.autograd.gradcheck(merge, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merge, tensors)
    stacked = [torch.stack([t, 2 * t]) for t in tensors]
    torch.testing.assert_close(torch.vmap(merge)(*stacked)[1], merge(*(t[1] for t in stacked)))


OUT, LSE = torch.zeros(3, 2, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("outs", "lses", "words"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([OUT, OUT], [LSE], "at least one, got 2 and 1"),
        ([OUT, OUT[:1]], [LSE, LSE], r"outs\[1\] must have the shape of outs\[0\] \(3, 2, 4\), got \(1, 2, 4\)"),
        ([OUT, OUT], [LSE, LSE.T], r"lses\[1\] must be \(3, 2\), as outs\[0\], got \(2, 3\)"),
        ([OUT, OUT.double()], [LSE, LSE], r"outs\[1\] must have the dtype of outs\[0\] torch\.float32, got"),
        ([OUT, OUT], [LSE, LSE.long()], r"lses\[1\] must have the dtype of lses\[0\]"),
        ([OUT.long()], [LSE], r"outs\[0\] must be floating point"),
        ([OUT.to("meta")], [LSE], r"lses\[0\] must be on the device of outs\[0\] meta, got cpu"),
        ([OUT[0, 0]], [LSE], r"outs must be \(\.\.\., heads, head_dim\), got shape \(4,\)"),
    ],
)
def test_bad_input_is_refused_by_name(outs, lses, words):
    with pytest.raises(ValueError, match=f"merge_attention: .*{words}"):
        merge_attention(outs, lses)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda q: neighborhood_attention_lse(q, q, q, 0),
            "neighborhood_attention_lse: kernel_size must be at least 1",
        ),
        (lambda q: window_attention_lse(q, q, q, 4), r"window_attention_lse: window_size \(4, 4\) must divide"),
    ],
)
def test_errors_name_the_op_that_was_called(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(1, 6, 5, 1, 2))


def test_the_chunks_of_a_batch_have_their_own_log_sum_exps(monkeypatch):
    monkeypatch.setattr("foveate.attention_ops.tiled_attention.CHUNK_LOGITS", 1)
    q, k, v, *_ = inputs()
    results = []
    for impl in ("tiled", "reference"):
        out, lse = neighborhood_attention_lse(q, k, v, KERNEL, DILATION, impl=impl)
        results.append([out, lse, *torch.autograd.grad((out.sum(-1) * lse).sum(), [q, k, v])])
    torch.testing.assert_close(*results)
