"""Aggregated attention and mixtures of heads: the authors' layers, and the heads that are left out."""

import copy

import pytest
import recorded
import torch

from foveate.attention_ops import (
    MohAggregatedAttention,
    MohAttention,
    aggregated_attention,
    aggregated_cpu,
    load_balance_loss,
)
from foveate.attention_ops._graph.aggregated import pair_bias
from foveate.backbones.moh_transnext import ConvGlu


def layer(ctor: dict):
    if ctor["cls"].endswith("ConvolutionalGLU"):
        return ConvGlu(ctor["in_features"], ctor["hidden_features"], 0.0), (ctor["H"], ctor["W"])
    options = {"shared": ctor["shared_head"], "routed": ctor["routed_head"], "coordinate_size": ctor["pretrain_size"]}
    if ctor["cls"].endswith("AggregatedAttention"):
        pool = {"sr_ratio": ctor["sr_ratio"], "fixed_pool_size": ctor["fixed_pool_size"]}
        net = MohAggregatedAttention(ctor["dim"], ctor["num_heads"], **pool, **options)
    else:
        net = MohAttention(ctor["dim"], ctor["num_heads"], **options)
    return net, tuple(ctor["input_resolution"])


def our_names(weights: dict) -> dict:
    return {key.replace("dwconv.dwconv", "dwconv"): value for key, value in weights.items()}


def their_name(key: str) -> str:
    return key.replace("dwconv.", "dwconv.dwconv.")


def test_layers_equal_the_authors_with_gradients_and_balance(det, golden):
    cases, arrays = golden("module__moh")
    for name, case in cases.items():
        net, size = layer(case["ctor"])
        recorded.load(net, case, det, our_names)
        x = recorded.given(case, det).unflatten(1, size)
        out = net.train()(x).flatten(1, 2)
        assert recorded.off(out, arrays[f"{name}__out"]) < 2e-5, name
        if "l_aux" in case.get("aux", {}):
            assert abs(float(load_balance_loss(net)) - case["aux"]["l_aux"]["value"]) < 1e-5, name
        recorded.backward(out, det)
        found = {their_name(n): p.grad for n, p in net.named_parameters()}
        assert recorded.wrong_gradients(found, case, det) == [], name


def test_coordinates_are_the_authors(golden):
    _, arrays = golden("module__moh")
    for name, size, pooled, unit in (
        ("q14_k7", (14, 14), (7, 7), None),
        ("q7_k7", (7, 7), (7, 7), None),
        ("q9x13_k4", (9, 13), (4, 4), (14, 14)),
    ):
        net = MohAttention(12, 2, shared=2, routed=0, coordinate_size=unit)
        net.cpb_fc1, net.cpb_act, net.cpb_fc2 = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
        net.cpb_fc1.weight = torch.zeros(1)
        table, rows, cols = net.bias(torch.zeros(1, *size, 12), pooled)
        ours = pair_bias(table, rows, cols).flatten(1).T
        index = torch.from_numpy(arrays[f"cpb_{name}__index"]).long()
        theirs = torch.from_numpy(arrays[f"cpb_{name}__table"])[index]
        torch.testing.assert_close(ours, theirs)


def inputs(heads=6, size=(9, 11), dim=8, pooled=(3, 4), batch=3, dtype=torch.float64, kept=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    few = pooled[0] * pooled[1]
    gates = randn(batch, *size, heads) * (torch.rand(batch, *size, heads, generator=generator) < kept)
    maps = {"q": randn(batch, *size, heads, dim)}
    maps |= {name: randn(batch, few, heads, dim) for name in ("pooled_k", "pooled_v")}
    maps |= {name: randn(batch, *size, heads, dim) for name in ("local_k", "local_v")}
    tables = {"embedding": randn(heads, dim), "temperature": randn(heads).abs() + 1, "pooled_bias": randn(heads, 7, 8)}
    tables |= {"local_bias": randn(heads, 3, 3), "tokens": randn(heads, dim, 9), "token_bias": randn(heads, 9)}
    cells = {"bias_rows": torch.randint(0, 7, (size[0], pooled[0]), generator=generator)}
    cells["bias_cols"] = torch.randint(0, 8, (size[1], pooled[1]), generator=generator)
    return maps | tables | cells | {"gates": gates.to(dtype)}


def results(given: dict, impl: str) -> list[torch.Tensor]:
    leaves = {k: v.detach().requires_grad_() for k, v in given.items() if v.is_floating_point()}
    out = aggregated_attention(**given | leaves, impl=impl)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), probe)]


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("most", [1 << 19, 200], ids=["whole maps", "single rows"])
@pytest.mark.parametrize("most_kept", [0.0, 0.9], ids=["all pairs", "kept pairs"])
def test_leaving_out_heads_equals_the_dense_form_with_every_gradient(kept, most, most_kept, monkeypatch):
    monkeypatch.setattr(aggregated_cpu, "CHUNK_LOGITS", most)
    monkeypatch.setattr(aggregated_cpu, "MOST_KEPT", most_kept)
    given = inputs(kept=kept)
    given["gates"][:, :, :, 0] += 3.0  # a head that all tokens keep
    for ours, dense in zip(results(given, "tiled"), results(given, "reference"), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-8, atol=1e-8)


def test_a_head_that_few_tokens_keep_computes_few_rows(monkeypatch):
    seen = []
    heads = aggregated_cpu._Chunk._heads

    def note(self, queries, groups, tokens):
        seen.append(queries.shape[:2].numel())
        return heads(self, queries, groups, tokens)

    monkeypatch.setattr(aggregated_cpu._Chunk, "_heads", note)
    for kept in (1.0, 0.5, 0.1):
        monkeypatch.setattr(aggregated_cpu, "MOST_KEPT", 0.3 if kept < 0.3 else 0.85)
        seen.clear()
        given = inputs(kept=kept)
        aggregated_attention(**given, impl="tiled")
        pairs = given["gates"].numel()
        left = int((given["gates"] != 0).sum())
        assert left <= sum(seen) <= (pairs if kept == 1.0 else 1.35 * left)


@pytest.mark.parametrize("kept", [0.1, 0.4])
def test_a_gate_of_zero_hides_numbers_that_are_not_finite(kept):
    given = inputs(kept=kept)
    given["q"][given["gates"] == 0] = torch.nan
    assert aggregated_attention(**given).isfinite().all()


def test_the_gates_of_a_layer_are_those_of_the_paper():
    torch.manual_seed(0)
    net = MohAttention(24, 6, shared=2, routed=3)
    gates = net.gates(torch.randn(2, 5, 7, 24))
    assert ((gates[..., 2:] != 0).sum(-1) == 3).all() and (gates[..., :2] > 0).all()
    assert net.active == 5 / 6
    with pytest.raises(ValueError, match="wanted shared heads, and 1 to 4 routed of the others, got 2 of 6 shared, 5"):
        MohAttention(24, 6, shared=2, routed=5)


def test_the_balance_loss_is_that_of_the_last_training_step_and_is_not_copied():
    net = MohAttention(24, 6, shared=2, routed=3)
    x = torch.randn(2, 5, 7, 24)
    assert load_balance_loss(net) is None
    net.train()(x)
    loss = load_balance_loss(net)
    loss.backward()
    assert net.wg.weight.grad.any() and net.qkv.weight.grad is None
    assert load_balance_loss(copy.deepcopy(net)) is None
    net.eval()(x)
    assert load_balance_loss(net) is None


def test_half_precision_is_computed_in_float32():
    given = inputs(dtype=torch.bfloat16)
    exact = aggregated_attention(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    assert (aggregated_attention(**given).double() - exact).abs().max() <= 2 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(3, 9, 11, 48)}, r"q must be \(B, H, W, heads, head_dim\)"),
        ({"pooled_k": torch.zeros(3, 12, 6, 7)}, r"pooled_k must be \(3, 'P', 6, 8\) as q"),
        ({"pooled_v": torch.zeros(3, 11, 6, 8)}, r"pooled_v must be \(3, 12, 6, 'value_dim'\) as pooled_k"),
        (
            {"bias_rows": torch.zeros(8, 3, dtype=torch.long)},
            r"bias_rows and bias_cols must be \(9, Ph\) and \(11, Pw\)",
        ),
        ({"bias_cols": torch.zeros(11, 5, dtype=torch.long)}, r"Ph \* Pw must be the 12 pooled tokens, got 3 \* 5"),
        ({"pooled_bias": torch.zeros(5, 7, 8)}, r"pooled_bias must be \(6, rows, columns\), got \(5, 7, 8\)"),
        ({"embedding": torch.zeros(6, 9)}, r"embedding must be \(6, 8\), got \(6, 9\)"),
        ({"local_k": None}, "local keys want .* no local_k given"),
        ({"local_bias": torch.zeros(6, 3, 2)}, r"local_bias must be \(6, rows, columns\) of odd sizes"),
        ({"tokens": torch.zeros(6, 8, 4)}, r"tokens must be \(6, 8, 9\), got \(6, 8, 4\)"),
        ({"gates": torch.zeros(3, 9, 11, 5)}, r"gates must be \(3, 9, 11, 6\), got \(3, 9, 11, 5\)"),
    ],
)
def test_bad_input_is_refused_by_name(changes, words):
    given = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=f"aggregated_attention: {words}"):
        aggregated_attention(**given | changes)
