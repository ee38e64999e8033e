"""The layers around routed attention against the official code, in all its forms, and bad callers."""

import zlib

import numpy as np
import pytest
import torch

from foveate.attention_ops import BiLevelRoutingAttention, BiLevelRoutingAttentionNchw, RegionPool, bi_level_routes

LAYERS = {
    "BiLevelRoutingAttention (ops/bra_legacy.py)": BiLevelRoutingAttention,
    "nchwBRA (ops/bra_nchw.py)": BiLevelRoutingAttentionNchw,
}
OURS = {"qkv.qkv": "qkv", "qkv_linear": "qkv", "wo": "proj", "output_linear": "proj"}


def our_key(key):
    name, _, kind = key.rpartition(".")
    return f"{OURS.get(name, name)}.{kind}"


def our_routing(constructor):
    """The authors' three switches as one word."""
    switches = [constructor.get(f"{name}_routing", False) for name in ("soft", "diff", "param")]
    return ("hard", "soft", "differentiable", "learned")[sum(switches)]


def our_pool(constructor):
    kind, _, word = constructor.get("kv_downsample_mode", "identity").rpartition("_")
    if word == "identity":
        return None
    size = constructor["kv_per_win"] if kind == "ada" else None
    return RegionPool(word.removesuffix("pool"), size=size, stride=constructor.get("kv_downsample_ratio"))


def official_layer(case, det):
    constructor = case["ctor"]
    options = {"lepe_kernel": constructor["side_dwconv"], "scale": constructor.get("qk_scale")}
    kind = LAYERS[constructor["cls"]]
    if kind is BiLevelRoutingAttention:
        options |= {"qk_dim": constructor.get("qk_dim"), "out_proj": constructor.get("param_attention") != "qkv"}
        options |= {"kv_pool": our_pool(constructor), "routing": our_routing(constructor)}
    names = ("dim", "num_heads", "n_win", "topk")
    layer = kind(*(constructor[name] for name in names), **options)
    weights = det.det_state_dict(case["state_dict"])
    layer.load_state_dict({our_key(k): v for k, v in weights.items()})
    return layer


def test_the_layers_equal_the_official_ones_in_all_their_forms(det, golden, relative_error):
    cases, arrays = golden("module__biformer")
    cases = {name: case for name, case in cases.items() if case["ctor"]["cls"] in LAYERS}
    assert len(cases) == 35
    for name, case in cases.items():
        layer = official_layer(case, det)
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])).requires_grad_()
        out = layer(x)
        assert relative_error(out, arrays[f"{name}__out"]) < 1e-5, name
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        gradient = np.array(case["grad_in"]["samples"], dtype=np.float32)
        assert relative_error(x.grad.contiguous(), gradient, gradient.size) < 1e-4, name
        for key, (norm, dot) in case["grads"].items():
            grad = dict(layer.named_parameters())[our_key(key)].grad
            probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
            assert abs(grad.norm() - norm) <= 1e-4 * norm, (name, key)
            assert abs((grad * probe).sum() - dot) <= 1e-4 * norm, (name, key)


def test_routes_equal_the_official_ones(det, golden):
    cases, arrays = golden("module__biformer")
    for name, size, regions, topk in [("bra_14", 14, 7, 4), ("bra_14_top1", 14, 7, 1), ("bra_7", 7, 7, 8)]:
        layer = official_layer(cases[name], det)
        x = torch.from_numpy(det.det_input(cases[name]["input_shape"], cases[name]["input_seed"]))
        q, k, _ = layer.qkv(x).chunk(3, -1)
        routes = bi_level_routes(q, k, region_size=size // regions, topk=topk)
        assert routes.flatten().tolist() == arrays[f"{name}__route_index"].tolist()


@pytest.mark.parametrize("pool", [None, RegionPool("avg", stride=2), RegionPool("max", size=3)], ids=str)
@pytest.mark.parametrize("routing", ["hard", "soft", "differentiable", "learned"])
def test_every_form_learns_and_scripts_on_padded_maps(routing, pool):
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(16, 2, 3, 2, qk_dim=8, kv_pool=pool, routing=routing)
    x = torch.randn(2, 13, 22, 16)
    out = layer(x)
    torch.testing.assert_close(torch.jit.script(layer)(x), out)
    out.square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_hard_and_soft_routing_take_the_same_regions():
    torch.manual_seed(0)
    hard, soft = (BiLevelRoutingAttention(16, 2, 3, 1, routing=routing) for routing in ("hard", "soft"))
    soft.load_state_dict(hard.state_dict())
    x = torch.randn(2, 6, 9, 16)
    torch.testing.assert_close(soft(x), hard(x))  # of one region the weight is 1


# Bad callers


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, BiLevelRoutingAttentionNchw])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 3), "heads must divide dim 10, got 3"),
        ((8, 2, 0), r"regions must be at least 1, got \(0,\)"),
        ((8, 2, 3, 10), "topk must be 1 to 9, all regions, got 10"),
    ],
)
def test_the_layers_refuse_sizes_that_cannot_be(kind, arguments, words):
    with pytest.raises(ValueError, match=words):
        kind(*arguments)
    with pytest.raises(ValueError, match="kernel_size must be odd, or 0 for none, got 4"):
        kind(8, 2, lepe_kernel=4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BiLevelRoutingAttention(8, 2, qk_dim=5), "heads must divide dim 5, got 2"),
        (lambda: BiLevelRoutingAttention(8, 2, routing="param"), "routing must be one of .* got 'param'"),
        (lambda: RegionPool("mean", size=1), "kind must be 'avg' or 'max', got 'mean'"),
        (lambda: RegionPool("avg"), "give one of size and stride, got size None and stride None"),
        (lambda: RegionPool("avg", size=1, stride=2), "give one of size and stride, got size 1 and stride 2"),
        (lambda: RegionPool("max", stride=0), r"stride must be at least 1, got \(0,\)"),
        (lambda: RegionPool("max", stride=3)(torch.zeros(1, 4, 6, 2), [2, 3]), "regions of .2, 3. tokens are smaller"),
    ],
)
def test_options_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
