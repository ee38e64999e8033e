"""DCAL's rollout, local queries and pairs against loops and the recorded layers."""

import zlib

import pytest
import torch
import torch.nn.functional as F

from foveate.attention_ops.local_queries import (
    GlobalLocalCrossAttention,
    local_queries,
    pairwise_keys,
    rollout_row,
)


def layers(det, count, heads, tokens, batch):
    """First to last, as recorded: softmax of twice a drawn tensor."""
    shape = (batch, heads, tokens, tokens)
    return [torch.from_numpy(2 * det.det_input(shape, 20 + i)).softmax(-1) for i in range(count)]


def product_row(probabilities, row):
    """A row of the product of all matrices, last layer first."""
    total = torch.eye(probabilities[0].shape[-1], dtype=torch.float64)
    for layer in probabilities:
        total = (0.5 * layer.double().mean(1) + 0.5 * torch.eye(layer.shape[-1])) @ total
    return total[:, row]


@pytest.mark.parametrize("row", [0, 2])
def test_the_row_is_that_of_the_product(det, row):
    probabilities = layers(det, 4, 3, 7, 2)
    found = rollout_row(reversed(probabilities), row)
    torch.testing.assert_close(found.double(), product_row(probabilities, row), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="rollout_row: wanted the probabilities of at least one layer"):
        rollout_row([])


def test_rollout_equals_the_recorded_one(det, golden):
    facts, arrays = golden("module__dcal")
    for name in ("rollout_L1", "rollout_L3"):
        ctor = facts["cases"][name]["ctor"]
        batch = facts["cases"][name]["output_shape"][0]
        found = rollout_row(reversed(layers(det, ctor["layers"], ctor["heads"], ctor["tokens"], batch)))
        torch.testing.assert_close(found[:, 1:], torch.from_numpy(arrays[f"{name}__out"]), rtol=1e-5, atol=1e-7)
        picked = local_queries(found, 0.3)[:, 1:]
        assert sorted(picked[0].tolist()) == sorted(arrays[f"{name}__top_30pct"][0].tolist())


@pytest.mark.parametrize("name", ["glca_r10", "glca_one_query"])
def test_attention_of_local_queries_equals_the_recorded_one(name, det, golden):
    facts, arrays = golden("module__dcal")
    case = facts["cases"][name]
    ctor, (batch, tokens, _) = case["ctor"], case["input_shape"]
    layer = GlobalLocalCrossAttention(ctor["embed_dim"], ctor["num_heads"], ctor["top_k_ratio"])
    layer.load_state_dict(det.det_state_dict(case["state_dict"]))
    indices = torch.from_numpy(arrays[f"{name}__indices"])
    importance = torch.zeros(batch, tokens)
    places = torch.arange(indices.shape[1], 0, -1).float().expand(batch, -1)
    importance.scatter_(1, indices, places)  # the recorded choice, whatever made it
    x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
    out = layer(x, importance)
    torch.testing.assert_close(out, torch.from_numpy(arrays[f"{name}__out"]), rtol=1e-4, atol=1e-6)
    silent = torch.ones(batch, tokens, dtype=torch.bool).scatter(1, indices, False)
    assert not out[silent].any()
    check_gradients(layer, out, case, det)


def check_gradients(layer, out, case, det, prefix=""):
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    parameters, largest = dict(layer.named_parameters()), max(l2 for l2, _ in case["grads"].values())
    for key, (l2, dot) in case["grads"].items():
        grad = parameters[key.removeprefix(prefix)].grad
        probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
        off = max(abs(grad.norm() - l2), abs((grad * probe).sum() - dot))
        assert off <= 1e-4 * l2 + 1e-6 * largest, key


def test_which_queries_are_local_follows_the_recorded_attention(det, golden):
    """The depth of the recorded rollout is not stored: one of a few must give the recorded choice."""
    facts, arrays = golden("module__dcal")
    case, heads = facts["cases"]["glca_r10"], 3
    batch, tokens, _ = case["input_shape"]
    wanted = [sorted(row) for row in arrays["glca_r10__indices"].tolist()]
    found = []
    for depth in range(1, 13):
        picked = local_queries(rollout_row(reversed(layers(det, depth, heads, tokens, batch))), 0.1)
        found.append([sorted(row) for row in picked.tolist()])
    assert wanted in found


def test_pairs_see_the_keys_of_both_images(det, golden):
    facts, arrays = golden("module__dcal")
    case = facts["cases"]["pwca_48"]
    weights = {k.removeprefix("sa_attention."): w for k, w in det.det_state_dict(case["state_dict"]).items()}
    (shape, seed), (_, other_seed) = case["inputs"]
    x = torch.cat([torch.from_numpy(det.det_input(shape, s)) for s in (seed, other_seed)])
    qkv = F.linear(x, weights["qkv.weight"], weights["qkv.bias"]).unflatten(-1, (3, case["ctor"]["num_heads"], -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    partner = torch.tensor([2, 3, 0, 1])
    keys, values = pairwise_keys(k, partner), pairwise_keys(v, partner)
    probabilities = (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(probabilities[:2], torch.from_numpy(arrays["pwca_48__weights"]), rtol=1e-4, atol=1e-6)
    out = F.linear((probabilities @ values).transpose(1, 2).flatten(2), weights["proj.weight"], weights["proj.bias"])
    torch.testing.assert_close(out[:2], torch.from_numpy(arrays["pwca_48__out"]), rtol=1e-4, atol=1e-6)


def test_local_queries_count_patches_only():
    importance = torch.tensor([[9.0, 8.0, 1.0, 3.0, 2.0]])
    assert local_queries(importance, 0.5, prefix=2).tolist() == [[0, 3]]
    assert local_queries(importance, 1.0, prefix=1).tolist() == [[0, 1, 3, 4, 2]]


@pytest.mark.parametrize("share", [0, 1.5])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match="share must be above 0 and up to 1"):
        GlobalLocalCrossAttention(8, 2, share)
