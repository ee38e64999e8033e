"""Local attention's kernels in the interpreter: every pattern and gradient against the definition in float64."""

import random

import pytest
import torch
from local_cases import OPS, Case, errors, halos, na, results, windows
from torch.utils.checkpoint import checkpoint

from foveate.attention_ops import (
    HaloAttention2d,
    NeighborhoodAttention2d,
    WindowAttention2d,
    circle,
    halo,
    neighborhood,
    neighborhood_attention,
    neighborhood_attention_lse,
    window,
    window_attention,
)
from foveate.kernels.local import launch as local
from foveate.kernels.local import launch_plan

# Rectangles that cross tiles of 8; kernels odd, even, and as large as the map; dilations that do not divide the map.
CASES = [
    na((7, 7), (7, 7), heads=2),
    na((14, 9), (3, 5), table=True, heads=2),
    na((30, 8), (5, 2), (3, 2), table=True),
    na((11, 19), (7, 7), table=True),
    na((11, 19), (4, 6), (2, 3), (True, False), table=True),
    na((9, 10), (3, 4), (1, 1), (False, True)),
    na((13, 14), (13, 9), table=True),
    na((9, 8), (3, 3), dim=20),
    na((9, 17), (6, 4), (1, 3), stride=(4, 3), table=True),
    na((11, 13), (3, 5), (2, 1), (True, False), stride=(2, 4), table=True),
    Case("window", (14, 21), {"window_size": (7, 7)}, table=True),
    Case("window", (12, 20), {"window_size": (4, 4)}, table=True, heads=2),
    Case("window", (6, 10), {"window_size": (2, 2)}),
    Case("window", (9, 10), {"window_size": (3, 5)}, table=True),
    Case("window", (24, 12), {"window_size": (12, 12)}, table=True),
    Case("circle", (11, 19), {"radius": 4}, heads=2),
    Case("circle", (7, 7), {"radius": 9}),
    Case("circle", (14, 9), {"radius": 1}),
    halos((16, 24), (8, 8), (3, 3), table=True),
    halos((16, 24), (8, 8), (3, 3), 2, table=True, value_dim=24),
    halos((14, 21), (7, 7), (2, 3)),
    halos((10, 13), (4, 6), (1, 2), 2, table=True, heads=2),
    halos((7, 13), (4, 4), (5, 0), table=True),
    halos((2, 3), (4, 5), (1, 1), table=True),
    windows((14, 21), (7, 7), (3, 4), table=True, heads=2),
    windows((12, 20), (4, 10), (1, 0), table=True),
    windows((20, 12), (10, 12), (7, 5), table=True, value_dim=24),
    windows((6, 10), (2, 5), (1, 4)),
    na((11, 9), (4, 3), (2, 1), table=True, value_dim=40),
    na((7, 12), (5, 3), dim=24, value_dim=8),
    na((7, 12), (5, 3), dim=24, table=True),
]
SOME = [CASES[i] for i in (3, 4, 10, 15, 19)]  # one of each pattern, with what it can have
every_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize("case", SOME, ids=str)


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    """The kinds of pattern that reached the kernels."""
    calls, plain = [], local.launch_forward
    monkeypatch.setattr(local, "launch_forward", lambda one, *a: (calls.append(one.pattern.kind), plain(one, *a))[1])
    return calls


@every_case
def test_it_is_the_definition_with_every_gradient(case):
    inputs = case.inputs()
    exact = results(case, [x.double() for x in inputs], "reference")
    assert max(errors(results(case, inputs, "fused"), exact)) < 1e-5


@pytest.mark.parametrize("case", [na((9, 17), (3, 4), (2, 1), table=True), CASES[13]], ids=str)
def test_one_program_sums_the_gradient_of_a_bias_over_tiles_groups_and_images(case, monkeypatch):
    monkeypatch.setattr(launch_plan, "PROGRAMS", 1)
    launch_plan.plan_shares.cache_clear()
    inputs = case.inputs(batch=2)
    exact = results(case, [x.double() for x in inputs], "reference")
    assert max(errors(results(case, inputs, "fused"), exact)) < 1e-5
    launch_plan.plan_shares.cache_clear()


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    op, table, dim = draw.choice(list(OPS)), draw.random() < 0.6, draw.choice((8, 16, 24, 32))
    if op == "neighborhood":
        kernel, dilation = [draw.randint(1, 9) for _ in "yx"], [draw.randint(1, 3) for _ in "yx"]
        size = tuple(k * d + draw.randint(0, 9) for k, d in zip(kernel, dilation, strict=True))
        causal = tuple(draw.random() < 0.3 for _ in "yx")
        strides = tuple(draw.choice((1, draw.randint(1, k))) for k in kernel)
        return na(size, tuple(kernel), tuple(dilation), causal, strides, table=table, dim=dim)
    if op == "circle":
        size = (draw.randint(1, 20), draw.randint(1, 20))
        return Case("circle", size, {"radius": draw.randint(1, 12)}, dim=dim)
    block = tuple(draw.choice((1, 2, 3, 4, 5, 7, 8, 9, 12)) for _ in "yx")
    if op == "window":
        shift = tuple(draw.choice((0, draw.randint(0, b - 1))) for b in block)
        return windows(tuple(b * draw.randint(1, 3) for b in block), block, shift, table=table, dim=dim)
    stride = draw.choice([s for s in (1, 2, 4) if block[0] % s == block[1] % s == 0])
    size, reach = [tuple(draw.randint(low, high) for _ in "yx") for low, high in ((1, 20), (0, 5))]
    return halos(size, block, reach, stride, table=table, dim=dim, value_dim=draw.choice((dim, 16, 40)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_shapes_are_the_definition_with_every_gradient(seed):
    case = random_case(seed)
    inputs = case.inputs(batch=seed % 2 + 1)
    exact = results(case, [x.double() for x in inputs], "reference")
    for found, truth in zip(results(case, inputs, "fused"), exact, strict=True):
        assert (found.double() - truth).abs().max() <= 1e-5 * max(float(truth.abs().max()), 1.0), case


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("case", [*SOME, CASES[-1]], ids=str)
def test_low_precision_is_as_good_as_plain_torch(case, dtype, tolerance, monkeypatch):
    inputs = case.inputs(dtype)
    exact = results(case, [x.double() for x in inputs], "reference")
    fused = errors(results(case, inputs, "fused"), exact)
    for module in (neighborhood, window, circle, halo):  # the definition with every step in `dtype`: plain torch
        monkeypatch.setattr(module, "accumulator", lambda dtype: dtype)
    plain = errors(results(case, inputs, "reference"), exact)
    assert fused[0] < tolerance
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e-5, 1e-20])
@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [CASES[3], CASES[10], CASES[11]], ids=str)
def test_a_bias_is_neither_rounded_nor_overflows(case, table_dtype, scale):
    """Logits are their bias where the scale is small: what autocast gives, q in 16 bits and the table in float32."""
    packed, table = case.inputs()
    bias = {"rpb" if case.op == "neighborhood" else "bias": (table * 2).to(table_dtype)}
    qkv, op = packed.half().unbind(3), OPS[case.op]
    fused = op(*qkv, **case.arguments, **bias, scale=scale, impl="fused")
    qkv, bias = [t.double() for t in qkv], {name: t.double() for name, t in bias.items()}
    exact = op(*qkv, **case.arguments, **bias, scale=scale, impl="reference")
    assert (fused.double() - exact).abs().max() <= 2e-3


def test_relative_logits_do_not_overflow_where_the_scale_is_small():
    case = CASES[18]
    q, kv, rel_h, rel_w = case.inputs()
    q, k, v = (t.half() for t in (q, kv[..., :16], kv[..., 16:]))
    tables = {"rel_h": rel_h * 30, "rel_w": rel_w * 30}
    fused = OPS["halo"](q, k, v, **case.arguments, **tables, scale=1e-5, impl="fused")
    qkv, tables = [t.double() for t in (q, k, v)], {name: t.half().double() for name, t in tables.items()}
    exact = OPS["halo"](*qkv, **case.arguments, **tables, scale=1e-5, impl="reference")
    assert (fused.double() - exact).abs().max() <= 0.1  # relative logits of about 30 are rounded to float16


@some_cases
def test_nothing_is_read_or_written_outside_the_tensors(case, fenced, fenced_allocations):
    """NaN around the inputs would reach the results; what the kernels write lies between fences of NaN."""
    inputs = case.inputs(batch=2)
    expected = results(case, inputs, "tiled")
    found = results(case, [fenced(x) for x in inputs], "fused")
    assert len(fenced_allocations) >= 4  # out, lse, delta, the gradients of q, k and v, and what the case's tables need
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", [False, True], ids=["plain", "table"])
@pytest.mark.parametrize("kind", ["neighborhood", "block"])
def test_opcheck(kind, table):
    q, k, v = torch.randn(1, 4, 6, 3, 1, 16, requires_grad=True).unbind(3)
    halo = kind == "block"
    bias = torch.randn(1, 3, 3, requires_grad=True) if table and not halo else None
    rel_h, rel_w = torch.randn(2, 7, 16, requires_grad=True) if table and halo else (None, None)
    pattern = (kind, (2, 2), (1, 1) if halo else (0, 0), (1, 1), (1, 1), (False, False), (0, 0))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(
        local._forward, (q, k, v, bias, rel_h, rel_w, *pattern, 0.25), test_utils=checks, rtol=1e-4, atol=1e-4
    )
    assert found == dict.fromkeys(checks, "SUCCESS")


def test_compile_in_one_graph_with_gradients(fused_calls):
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(32, 2, 3, 2)
    x = torch.randn(1, 7, 9, 32)
    expected = layer(x)
    grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    torch._dynamo.reset()
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), list(layer.parameters())), grads)
    assert fused_calls == ["neighborhood"] * 2


def test_autocast_runs_the_kernel_in_its_dtype(fused_calls):
    layer = NeighborhoodAttention2d(32, 2, 3)
    x = torch.randn(1, 5, 6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        out.float().square().sum().backward()
    assert fused_calls == ["neighborhood"] and out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.01)


def test_activation_checkpointing_changes_nothing():
    layer = NeighborhoodAttention2d(32, 2, 3)
    x = torch.randn(1, 5, 6, 32)
    plain = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_two_runs_give_the_same_bits():
    case = CASES[3]
    for first, second in zip(*(results(case, case.inputs(batch=2), "fused") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_only_the_bias_may_ask_for_a_gradient():
    packed, table = CASES[3].inputs()
    grads = []
    for impl in ("fused", "tiled"):
        leaf = table.clone().requires_grad_()
        CASES[3].call([packed, leaf], impl).square().sum().backward()
        grads.append(leaf.grad)
    assert packed.grad is None
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_one_expanded_number_is_taken():
    packed = CASES[0].inputs()[0].requires_grad_()
    fused, tiled = (torch.autograd.grad(CASES[0].call([packed], i).sum(), packed)[0] for i in ("fused", "tiled"))
    torch.testing.assert_close(fused, tiled, rtol=1e-4, atol=1e-5)


def test_a_head_dim_apart_in_memory_is_copied():
    q, k, v = torch.randn(3, 1, 2, 16, 9, 8).permute(0, 1, 4, 5, 2, 3).unbind(0)
    assert q.stride(-1) != 1
    torch.testing.assert_close(neighborhood_attention(q, k, v, 3, impl="fused"), neighborhood_attention(q, k, v, 3))
    x = q.detach().requires_grad_()
    fused, tiled = (
        torch.autograd.grad(neighborhood_attention(x, k, v, 3, impl=impl).square().sum(), x)[0]
        for impl in ("fused", "tiled")
    )
    torch.testing.assert_close(fused, tiled, rtol=1e-4, atol=1e-5)


@some_cases
def test_an_empty_batch_gives_empty_results_and_no_gradient(case):
    out, *grads = results(case, case.inputs(batch=0), "fused")
    assert out.numel() == 0 and all(not g.any() for g in grads)


@pytest.mark.parametrize("used", ["lse", "both"])
def test_log_sum_exps_have_gradients(used):
    """Dilation, stride and a bias at once; an output that is not used has no gradient at all."""
    packed, table = na((7, 9), (3, 4), (2, 1), stride=(3, 2), table=True, heads=2).inputs()
    found = []
    for impl, dtype in (("fused", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (packed, table)]
        results = neighborhood_attention_lse(
            *leaves[0].unbind(3), (3, 4), (2, 1), stride=(3, 2), rpb=leaves[1], is_causal=(True, False), impl=impl
        )
        values = [x.detach() for x in results]
        picked = {"lse": results[1:], "both": results}[used]
        loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape)).sum() for x in picked)
        found.append([*values, *torch.autograd.grad(loss, leaves)])
    assert found[0][1].dtype == torch.float32
    assert max(errors(*found)) < 1e-5


def test_there_is_no_double_backward():
    x = torch.randn(1, 7, 7, 1, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(neighborhood_attention(x, x, x, 3, impl="fused").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "the kernels take float32, float16, bfloat16, got torch.float64"),
        ({"dim": 130}, "a head_dim of at most 128, got 130"),
        ({"scale": -1.0}, r"a scale of at least 1e-20, got -1\.0"),
        ({"scale": 1e-30}, "a scale of at least 1e-20, got 1e-30"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(changes, words):
    q = torch.zeros(1, 7, 7, 1, changes.pop("dim", 16), dtype=changes.pop("dtype", torch.float32))
    with pytest.raises(NotImplementedError, match=f"neighborhood_attention: impl='fused' cannot run here: .*{words}"):
        neighborhood_attention(q, q, q, 3, impl="fused", **changes)


def test_a_mask_of_windows_is_refused_with_the_reason_and_auto_takes_tiles():
    q = torch.randn(1, 4, 6, 1, 16)
    mask = torch.ones(4, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match="takes no mask"):
        window_attention(q, q, q, (2, 3), mask=mask, impl="fused")
    tiled = window_attention(q, q, q, (2, 3), mask=mask, impl="tiled")
    assert torch.equal(window_attention(q, q, q, (2, 3), mask=mask), tiled)


def test_the_official_operator_is_met(det, golden, relative_error):
    cases, arrays = golden("module__na2d")
    names = ("h7w7_k3_d2_rpb", "h7w7_k7_d1_norpb", "h14w14_k7_d2_rpb", "h11w19_k5_d2_norpb")
    tried = [case for case in cases if case["name"] in names]
    assert len(tried) == len(names)
    for case in tried:
        shape = (case["B"], case["heads"], case["H"], case["W"], case["dim"])
        leaves = [torch.from_numpy(det.det_input(shape, seed)).requires_grad_() for seed in (11, 12, 13)]
        table = (case["heads"], 2 * case["kernel"] - 1, 2 * case["kernel"] - 1)
        rpb = torch.from_numpy(det.det_input(table, 14)).requires_grad_() if case["rpb"] else None
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in leaves)
        out = neighborhood_attention(q, k, v, case["kernel"], case["dilation"], rpb=rpb, impl="fused")
        out = out.permute(0, 3, 1, 2, 4)
        out.backward(torch.from_numpy(det.det_input(out.shape, 15)))
        found = dict(zip(("out", "dq", "dk", "dv"), (out, *(t.grad for t in leaves)), strict=True))
        if rpb is not None:
            found["drpb"] = rpb.grad
        for name, ours in found.items():
            assert relative_error(ours, arrays[f"{case['name']}/{name}"]) < 1e-5, (case["name"], name)


def check_layer(layer, x, out, arrays, name, det, relative_error) -> None:
    (out * torch.from_numpy(det.det_input(out.shape, 15))).sum().backward()
    found = {"out": out, "dx": x.grad, **{f"d.{n}": p.grad for n, p in layer.named_parameters()}}
    for key, ours in found.items():
        assert relative_error(ours, arrays[f"{name}/{key}"]) < 2e-5, (name, key)


@pytest.mark.parametrize(
    "name", ["h7w7_k7_d1_rpb", "h6w9_k7_d1_rpb", pytest.param("h3w4_k3_d4_rpb", marks=pytest.mark.slow)]
)
def test_the_official_neighborhood_layer_is_met(name, det, golden, relative_error, fused_calls):
    cases, arrays = golden("module__na_layer")
    (case,) = (c for c in cases if c["name"] == name)
    layer = NeighborhoodAttention2d(case["dim"], case["heads"], case["kernel"], case["dilation"])
    prefix = case["weights_key_prefix"]
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in det.det_state_dict(case["state_dict"]).items()})
    x = torch.from_numpy(det.det_input(case["x"]["shape"], case["x"]["seed"])).requires_grad_()
    check_layer(layer, x, layer(x), arrays, name, det, relative_error)
    assert fused_calls == ["neighborhood"]


@pytest.mark.parametrize(
    "name",
    ["b8h2_dimhead16", *(pytest.param(n, marks=pytest.mark.slow) for n in ("b4h1_qkratio_bias", "b7h2_s2_21x14"))],
)
def test_timms_halo_layer_is_met(name, det, golden, relative_error, fused_calls):
    cases, arrays = golden("module__halo")
    case = cases[name]
    renames = {"num_heads": "heads", "halo_size": "halo", "dim_head": "head_dim", "scale_pos_embed": "scale_rel"}
    layer = HaloAttention2d(case["dim"], **{renames.get(key, key): value for key, value in case["args"].items()})
    weights = det.det_state_dict(case["state_dict"])
    layer.load_state_dict({key.removeprefix("self_attn."): value for key, value in weights.items()})
    x = torch.from_numpy(det.det_input(case["x"]["shape"], case["x"]["seed"])).requires_grad_()
    check_layer(layer, x, layer(x), arrays, name, det, relative_error)
    assert fused_calls == ["block"]


def test_the_official_window_layer_is_met(det, golden, relative_error, fused_calls):
    cases, arrays = golden("module__davit")
    case = cases["window_attn"]
    layer = WindowAttention2d(case["dim"], case["heads"], 7)
    weights = det.det_state_dict(case["state_dict"])
    layer.load_state_dict({key.removeprefix("attn."): value for key, value in weights.items()})
    x = torch.from_numpy(det.det_input(case["x"]["shape"], case["x"]["seed"])).requires_grad_()
    out = layer(x.view(-1, 7, 7, case["dim"])).view(x.shape)
    check_layer(layer, x, out, arrays, "window_attn", det, relative_error)
    assert fused_calls == ["block"]
