"""Agent attention against a loop, the official layers and bad callers."""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.attention_ops import AgentAttention, ReducedAgentAttention, agent_attention
from foveate.attention_ops._graph.resize import pool_by_products, resize_by_products
from foveate.backbones._agent import _resize_line
from foveate.backbones.agent_cswin import StripeAgentAttention, StripeAttention
from foveate.backbones.agent_pvt import PvtAttention


def by_loop(q, k, v, agents, bias_to, bias_from, scale):
    """The definition, one head of one image at a time."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            queries, keys, values, few = (t[b, :, head] for t in (q, k, v, agents))
            to_keys = scale * few @ keys.T + (0 if bias_to is None else bias_to[head])
            to_agents = scale * queries @ few.T + (0 if bias_from is None else bias_from[head])
            out[b, :, head] = to_agents.softmax(-1) @ (to_keys.softmax(-1) @ values)
    return out


def inputs(queries, keys, agents, heads, dim, biases, dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    shapes = [(batch, n, heads, dim) for n in (queries, keys, keys, agents)]
    shapes += [(heads, agents, keys), (heads, queries, agents)] if biases else []
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def named(biases):
    return dict(zip(("bias_to", "bias_from"), biases, strict=False))


SIZES = [(7, 5, 4, 2, 4), (1, 9, 1, 1, 3), (12, 1, 16, 3, 1), (30, 41, 9, 2, 8)]


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_definition_with_every_gradient(size, biases, impl):
    tensors = inputs(*size, biases)
    scale = 0.7 if biases else None
    out = agent_attention(*tensors[:4], **named(tensors[4:]), scale=scale, impl=impl)
    given = tensors[4:] or [None, None]
    expected = by_loop(*tensors[:4], *given, size[4] ** -0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected)
    probe = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((y * probe).sum(), tensors) for y in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_the_backward_pass_in_chunks_of_images_gives_the_same_gradients(monkeypatch):
    tensors, found = inputs(30, 41, 9, 2, 8, True, batch=5), []  # 9 agents of 8 channels: logits are not kept
    for most in (1, 1 << 19):  # one image at a time, all at once
        monkeypatch.setattr("foveate.attention_ops.agent_cpu.CHUNK_LOGITS", most)
        out = agent_attention(*tensors[:4], **named(tensors[4:]), impl="tiled")
        found.append(torch.autograd.grad(out.square().sum(), tensors))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_low_precision_torch(dtype):
    exact = [t.detach() for t in inputs(120, 300, 16, 2, 16, True)]
    rounded = [t.to(dtype) for t in exact]
    truth = by_loop(*(t.double() for t in rounded), 0.25)
    plain = by_loop(*rounded, 0.25)
    ours = agent_attention(*rounded[:4], **named(rounded[4:]), scale=0.25)
    floor = torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


def test_a_bias_may_have_another_dtype_than_the_tokens():
    tensors = [t.detach() for t in inputs(7, 5, 4, 2, 4, True, torch.float32)]
    low = [t.bfloat16() for t in tensors[:4]]
    ours = agent_attention(*low, **named(tensors[4:]))
    truth = by_loop(*(t.double() for t in (*low, *tensors[4:])), 0.5)
    assert ours.dtype == torch.bfloat16 and (ours - truth).abs().max() < 0.03


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (2, 4, 4, 2, 8)}, r"q must be \(B, tokens, heads, head_dim\), got shape \(2, 4, 4, 2, 8\)"),
        (
            {"k": (2, 9, 2, 7)},
            r"k must have the batch, heads and head_dim of q \(2, 7, 2, 8\), got shape .*7\)",
        ),
        ({"agents": (1, 4, 2, 8)}, r"agents must have the batch, heads and head_dim of q .*, got shape \(1, 4, 2, 8\)"),
        ({"v": (2, 8, 2, 8)}, r"v must have the shape of k \(2, 9, 2, 8\), got \(2, 8, 2, 8\)"),
        ({"agents": (2, 0, 2, 8)}, r"tokens, agents, heads .* at least 1, got .*agents \(2, 0, 2, 8\)"),
        ({"bias_to": (2, 9, 4)}, r"bias_to must be \(heads, agents, keys\) = \(2, 4, 9\), got \(2, 9, 4\)"),
        ({"bias_from": (1, 7, 4)}, r"bias_from must be \(heads, queries, agents\) = \(2, 7, 4\), got \(1, 7, 4\)"),
    ],
)
def test_shapes_that_disagree_are_refused_by_name(change, words):
    shapes = {"q": (2, 7, 2, 8), "k": (2, 9, 2, 8), "v": (2, 9, 2, 8), "agents": (2, 4, 2, 8)} | change
    with pytest.raises(ValueError, match=f"agent_attention: {words}"):
        agent_attention(**{name: torch.zeros(shape) for name, shape in shapes.items()})


def test_a_bias_of_integers_is_refused():
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"bias_to must be floating point, got torch\.int64"):
        agent_attention(q, q, q, q, bias_to=torch.zeros(1, 4, 4, dtype=torch.int64))


# The layers


def of_case(name, c):
    """The layer of a recorded case, and how it is called."""
    kind, dim, heads, agents = c["cls"], c["dim"], c["num_heads"], c.get("agent_num", 0)
    if kind == "agent_pvt.AgentAttention":
        size = (c["H"], c["W"])
        layer = ReducedAgentAttention(dim, heads, map_size=size, agents=agents, sr_ratio=c["sr_ratio"])
        return layer, lambda x: layer(x.unflatten(1, size)).flatten(1, 2)
    if kind == "downstream agent_pvt.AgentAttention":
        own, size = (int(c["num_patches"] ** 0.5),) * 2, (c["H"], c["W"])
        shape = tuple(c["downstream_agent_shape"])
        layer = ReducedAgentAttention(dim, heads, map_size=own, agents=agents, agent_shape=shape)
        return layer, lambda x: layer(x.unflatten(1, size)).flatten(1, 2)
    if kind == "agent_pvt.Attention":
        layer = PvtAttention(dim, heads, sr_ratio=c["sr_ratio"], proj_drop=0.0)
        return layer, lambda x: layer(x.unflatten(1, (c["H"], c["W"]))).flatten(1, 2)
    if kind == "agent_swin.AgentAttention":
        size = tuple(c["window_size"])
        layer = AgentAttention(dim, heads, map_size=size, agents=agents)
        return layer, lambda x: layer(x, size)
    if kind == "agent_deit.AgentAttention":
        size = (c["window"],) * 2
        layer = AgentAttention(dim, heads, map_size=size, agents=agents, prefix_tokens=1)
        return layer, lambda x: layer(x, size)
    size = (c["resolution"],) * 2
    stripe = 0 if c["idx"] == -1 else c["split_size"]
    place = (dim, heads, stripe, c["idx"] == 0)
    layer = StripeAttention(*place)
    if kind == "agent_cswin.AgentAttention":
        layer = StripeAgentAttention(*place, map_size=size, agents=agents, agent_shape=None)
    return layer, lambda qkv: layer(*(x.unflatten(1, size) for x in qkv)).flatten(1, 2)


def check_the_official_layers(golden, det, relative_error, names=None):
    cases, arrays = golden("module__agent")
    tried = [name for name in cases["cases"] if names is None or name in names]
    for name in tried:
        case = cases["cases"][name]
        layer, call = of_case(name, case["ctor"])
        layer.load_state_dict(det.det_state_dict(case["state_dict"], case["mul"], case["gain"]))
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])).requires_grad_()
        out = call(x)
        assert relative_error(out, arrays[f"{name}__out"]) < 1e-5, name
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        for key, parameter in layer.named_parameters():
            norm, dot = case["grads"][key]
            probe = torch.from_numpy(det.det_input(parameter.shape, zlib.crc32(f"grad:{key}".encode())))
            found = parameter.grad.norm(), (parameter.grad * probe).sum()
            assert max(abs(found[0] - norm), abs(found[1] - dot)) <= 1e-4 * norm, (name, key)
        samples = np.array(case["grad_in"]["samples"], dtype=np.float32)
        assert relative_error(x.grad, samples, samples.size) < 1e-4, name
    return tried


def test_the_layers_equal_the_official_ones(det, golden, relative_error):
    assert len(check_the_official_layers(golden, det, relative_error)) == 14


def test_biases_of_lines_are_resized_as_the_official_loader_does(det, golden, relative_error):
    cases, arrays = golden("module__agent")
    facts = cases["resize_7_to_10"]
    weights = det.det_state_dict(facts["state_dict"], facts["mul"])
    for key, axis in {"ah_bias": 3, "ha_bias": 2, "aw_bias": 4, "wa_bias": 3}.items():
        ours = _resize_line(weights[key], axis, facts["to"])
        assert relative_error(ours, arrays[f"resize_7_to_10__{key}"].ravel(), 4096) < 1e-6, key


def dense_rule(layer, x, size):
    """The authors' dense layer, spelled out: biases are resized to the map, then over the grid of the agents."""
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads, own = layer.heads, layer.grid
    few = F.adaptive_avg_pool2d(q.mT.unflatten(2, size), layer.agent_shape).flatten(2).mT
    q, k, values, few = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v, few))

    def resized(block, lines):  # (heads, n, 7, 7) and (heads, n, H, W) of the own map -> (heads, agents, tokens)
        both = [F.interpolate(t, size=size, mode="bilinear").flatten(2) for t in (block, lines)]
        over = [F.interpolate(t.mT.unflatten(2, (own, own)), layer.agent_shape, mode="bilinear") for t in both]
        return sum(t.flatten(2).mT for t in over)

    to = resized(layer.an_bias, (layer.ah_bias + layer.aw_bias)[0])
    of = resized(layer.na_bias, (layer.ha_bias + layer.wa_bias)[0].permute(0, 3, 1, 2)).mT
    gathered = (few * layer.scale @ k.mT + to).softmax(-1) @ values
    out = ((q * layer.scale @ few.mT + of).softmax(-1) @ gathered).transpose(1, 2).flatten(2)
    return layer.proj(out + layer.dwc(v.mT.unflatten(2, size)).flatten(2).mT)


@pytest.mark.parametrize("size", [(7, 7), (9, 14), (15, 15), (1, 20), (64, 64), (33, 8)], ids=str)
@pytest.mark.parametrize("shape", [None, (12, 12), (5, 3)], ids=str)
def test_maps_of_other_sizes_follow_the_dense_rule(size, shape):
    torch.manual_seed(0)
    layer = AgentAttention(16, 2, map_size=(14, 14), agents=9, agent_shape=shape).double()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name.endswith("_bias") else 0.3)
    x = torch.randn(2, size[0] * size[1], 16, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x, size), dense_rule(layer, x, size)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_on_its_own_map_nothing_is_resized(monkeypatch):
    layer = AgentAttention(8, 2, map_size=(7, 7), agents=4, prefix_tokens=2)
    x = torch.randn(1, 51, 8)
    expected = layer(x, (7, 7))
    monkeypatch.setattr(F, "interpolate", None)  # a call would fail
    assert torch.equal(layer(x, (7, 7)), expected)


def test_prefix_tokens_are_keys_and_queries_but_no_part_of_an_agent_or_the_convolution():
    torch.manual_seed(0)
    layer = AgentAttention(8, 2, map_size=(4, 3), agents=4, prefix_tokens=2).double()
    x = torch.randn(1, 14, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 0] += 1
    few = [layer.on_map(layer.qkv(t).chunk(3, -1)[0], (4, 3)) for t in (x, other)]
    assert torch.equal(*few)
    changed = (layer(other, (4, 3)) - layer(x, (4, 3))).abs().amax(-1)[0]
    assert (changed > 0).all()  # every token reads from agents that gathered from token 0


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"AgentAttention: agents must be a square number \(9, 16, 49, ...\), got 12"):
        AgentAttention(8, 2, map_size=(7, 7), agents=12)
    with pytest.raises(ValueError, match="AgentAttention: heads must divide dim 8, got 3"):
        AgentAttention(8, 3, map_size=(7, 7))
    with pytest.raises(ValueError, match=r"every side must be at least 1, got map_size \(0, 7\)"):
        AgentAttention(8, 2, map_size=(0, 7))
    with pytest.raises(ValueError, match="ReducedAgentAttention: sr_ratio must be at least 1, got 0"):
        ReducedAgentAttention(8, 2, map_size=(7, 7), sr_ratio=0)
    layer = AgentAttention(8, 2, map_size=(7, 7), agents=4, prefix_tokens=1)
    with pytest.raises(ValueError, match=r"wanted 1 \+ 5 \* 6 tokens for a map of \(5, 6\), got x of shape \(1, 30"):
        layer(torch.zeros(1, 30, 8), (5, 6))


@pytest.mark.parametrize(("size", "wanted"), [((7, 7), (14, 9)), ((14, 5), (3, 5)), ((1, 6), (4, 1)), ((5, 4), (5, 4))])
def test_products_resize_and_pool_as_torch_does(size, wanted):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for cubic, mode in ((False, "bilinear"), (True, "bicubic")):
        expected = F.interpolate(x, size=wanted, mode=mode, align_corners=False)
        torch.testing.assert_close(resize_by_products(x, *wanted, cubic=cubic), expected)
    torch.testing.assert_close(pool_by_products(x, *wanted), F.adaptive_avg_pool2d(x, wanted))
