"""Grouped-query attention against loops, the official layers and the authors' rules of who shares a key head."""

import math
import zlib

import pytest
import torch

from foveate.attention_ops import GroupedQueryAttention, grouped_query_attention
from foveate.attention_ops.grouped_query import (
    DynamicGroups,
    dynamic_sizes,
    group_sizes,
    key_heads_of,
    key_norm_sizes,
    pooled_heads,
)


def by_loop(q, k, v, key_heads):
    """The definition, one head of one image at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(len(q)):
        for h in range(q.shape[2]):
            own = int(key_heads[b % len(key_heads), h])
            logits = q[b, :, h] @ k[b, :, own].T / math.sqrt(q.shape[3])
            out[b, :, h] = logits.softmax(-1) @ v[b, :, own]
    return out


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("key_heads", [[[0, 0, 1, 2]], [[0, 0, 0, 2], [1, 1, 2, 2]]], ids=["alike", "per image"])
def test_it_is_the_definition(key_heads, impl):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, d, dtype=torch.float64) for n, heads, d in ((5, 4, 3), (7, 3, 3), (7, 3, 2)))
    places = torch.tensor(key_heads)
    torch.testing.assert_close(grouped_query_attention(q, k, v, places, impl=impl), by_loop(q, k, v, places))


def authors_sizes(norms, heads):
    """The authors' rule as a loop of Python numbers, for norms that differ."""
    low, high = min(norms), max(norms)
    scaled = [(n - low) / (high - low) for n in norms]
    sizes = [round(n / sum(scaled) * heads) for n in scaled]
    while sum(sizes) > heads:
        sizes[sizes.index(max(sizes))] -= 1
    while sum(sizes) < heads:
        sizes[sizes.index(min(sizes))] += 1
    return sizes


def test_group_sizes_are_the_recorded_ones(golden):
    facts, _ = golden("module__kdgqa")
    for row in facts["kdgqa_allocation_table"]:
        sizes = key_norm_sizes(torch.tensor(row["key_norms"]), row["heads"])
        assert sizes.tolist() == row["sizes"], row
    for row in facts["dgqa_allocation_table"]["rows"]:
        norms, cache = torch.tensor(row["key_norms"]), torch.tensor(row["cache"])
        sizes = dynamic_sizes(norms, cache, row["heads"], row["kind"] == "diff")
        assert sizes.tolist() in row["possible_sizes_over_20_seeds"], row


def test_group_sizes_are_those_of_the_authors_loop():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        groups = int(torch.randint(2, 9, (), generator=generator))
        heads = int(torch.randint(1, 25, (), generator=generator))
        norms = torch.rand(groups, generator=generator, dtype=torch.float64)
        assert key_norm_sizes(norms, heads).tolist() == authors_sizes(norms.tolist(), heads)


@pytest.mark.parametrize("odd", [[2.0, 2.0, 2.0], [math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [0.0, 0.0, 0.0]])
def test_norms_without_an_order_give_equal_groups(odd):
    """Where the authors' loop never ends."""
    assert key_norm_sizes(torch.tensor(odd), 6).tolist() == [2, 2, 2]
    assert key_norm_sizes(torch.tensor([5.0]), 6).tolist() == [6]
    assert dynamic_sizes(torch.ones(4), torch.ones(4), 8, by_difference=True).tolist() == [2, 2, 2, 2]


def test_any_weights_share_out_all_heads():
    generator = torch.Generator().manual_seed(0)
    for heads, groups in ((5, 7), (16, 5), (1, 3), (24, 24)):
        sizes = group_sizes(torch.rand(50, groups, generator=generator).pow(4), heads)
        assert (sizes.sum(-1) == heads).all() and (sizes >= 0).all()
        places = key_heads_of(sizes, heads)
        counts = torch.stack([(places == g).sum(-1) for g in range(groups)], -1)
        assert torch.equal(counts, sizes.long()) and (places.diff(dim=-1) >= 0).all()


SCHEMES = {"GQA": "uniform", "MHSA": "uniform", "KDGQA": "key_norm", "PGQA": "noise"}


def official(det, case):
    ctor = case["ctor"]
    kind = SCHEMES.get(ctor["cls"]) or {"diff": "difference"}.get(ctor["kind"], ctor["kind"])
    per_batch = kind in ("key_norm", "ema", "difference")
    layer = GroupedQueryAttention(
        ctor["dim"], ctor["num_heads"], ctor["num_kv_heads"], allocation=kind, per_batch=per_batch,
        window=ctor.get("window_size", 10),
    )  # fmt: skip
    layer.load_state_dict(det.det_state_dict(case["state_dict"]), strict="cache" not in case.get("computed", ()))
    return layer.train(case["mode"] == "train()")


def recorded_rand(det):
    calls = iter(range(100, 200))

    def rand(*shape, dtype=torch.float32, **_):
        normal = torch.from_numpy(det.det_input(shape, next(calls))).double()
        return (0.5 * (1 + torch.erf(normal / math.sqrt(2)))).to(dtype)

    return rand


def test_the_layer_equals_the_official_ones(det, golden, monkeypatch):
    facts, arrays = golden("module__kdgqa")
    assert len(facts["cases"]) == 10
    for name, case in facts["cases"].items():
        layer = official(det, case)
        if "warm_cache" in name:
            layer.groups.cache.copy_(torch.tensor([0.5, 20, 9, 3]))
        monkeypatch.setattr(torch, "rand", recorded_rand(det))
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
        out = layer(x)
        torch.testing.assert_close(out, torch.from_numpy(arrays[f"{name}__out"]), rtol=1e-4, atol=1e-5, msg=name)
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        parameters = dict(layer.named_parameters())
        largest = max(l2 for l2, _ in case["grads"].values())
        for key, (l2, dot) in case["grads"].items():
            grad = parameters[key].grad
            probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
            off = max(abs(grad.norm() - l2), abs((grad * probe).sum() - dot))
            assert off <= 1e-4 * l2 + 1e-6 * largest, (name, key)
        if f"{name}__cache_after" in arrays:
            torch.testing.assert_close(
                layer.groups.cache, torch.from_numpy(arrays[f"{name}__cache_after"]).float(), msg=name
            )


def test_key_heads_start_as_means_of_groups(det, golden):
    _, arrays = golden("module__kdgqa")
    for kind, shape in (("weight", (144, 48)), ("bias", (144,))):
        q, k, v = torch.from_numpy(det.det_tensor(f"qkv.{kind}", shape)).chunk(3)
        for part, ours in (("q", q), ("k", pooled_heads(k, 6, 3)), ("v", pooled_heads(v, 6, 3))):
            torch.testing.assert_close(ours, torch.from_numpy(arrays[f"convert_{part}_{kind}"]))


def test_the_per_image_rule_does_not_see_other_images():
    torch.manual_seed(0)
    x = torch.randn(3, 9, 24)
    for allocation in ("key_norm", "ema", "difference"):
        layer = GroupedQueryAttention(24, 6, 3, allocation=allocation).eval()
        torch.nn.init.normal_(layer.k.weight)
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))
    together = GroupedQueryAttention(24, 6, 3, allocation="key_norm", per_batch=True).eval()
    together.load_state_dict({k: v for k, v in layer.state_dict().items() if "groups." not in k})
    assert any(not torch.allclose(together(x)[i : i + 1], together(x[i : i + 1]), atol=1e-4) for i in range(3))


def test_eval_mode_changes_the_cache_with_the_authors_rule_only():
    k = torch.randn(2, 5, 4, 3)
    for per_batch in (False, True):
        groups = DynamicGroups(8, 4, by_difference=True, per_batch=per_batch, window=3).eval()
        groups(k)
        assert groups.cache.any() == per_batch


def test_the_cache_follows_every_window_th_step_in_training():
    groups = DynamicGroups(8, 4, by_difference=False, per_batch=True, window=3).train()
    caches, sizes = [], []
    for step in range(5):
        places = groups(torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(step)))
        caches.append(groups.cache.clone())
        sizes.append(places)
    assert torch.equal(caches[0], caches[1]) and torch.equal(caches[1], caches[2])
    assert not torch.equal(caches[2], caches[3]) and torch.equal(caches[3], caches[4])
    assert torch.equal(sizes[0], sizes[2]) and torch.equal(sizes[3], sizes[4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": 5}, "num_heads must divide dim 24, got 5"),
        ({"kv_heads": 7}, "kv_heads must be 1 to num_heads = 6, got 7"),
        ({"kv_heads": 4}, "kv_heads must divide num_heads = 6 with allocation 'uniform', got 4"),
        ({"allocation": "norm"}, "allocation must be one of .*, got 'norm'"),
        ({"per_batch": True}, "per_batch has no effect with allocation 'uniform'"),
        ({"allocation": "ema", "window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=f"GroupedQueryAttention: {words}"):
        GroupedQueryAttention(**{"dim": 24, "heads": 6, "kv_heads": 3, **arguments})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(2, 5, 4)}, r"q must be \(B, N, heads, head_dim\)"),
        ({"k": torch.zeros(2, 5, 2, 4)}, r"k must be \(B, M, kv_heads, head_dim\) as q"),
        ({"v": torch.zeros(2, 6, 2, 3)}, r"v must be \(B, M, kv_heads, value_dim\) as k"),
        ({"key_heads": torch.zeros(1, 4)}, r"key_heads must be \(B or 1, heads = 4\) int64"),
    ],
)
def test_bad_input_is_refused_by_name(changes, words):
    fine = {"q": torch.zeros(2, 5, 4, 3), "k": torch.zeros(2, 5, 2, 3), "v": torch.zeros(2, 5, 2, 3)}
    fine |= {"key_heads": torch.zeros(1, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"grouped_query_attention: {words}"):
        grouped_query_attention(**{**fine, **changes})
