"""Routing attention against the authors' code and against the widely used PyTorch code, centroids included."""

import copy
import pickle

import numpy as np
import pytest
import recorded
import torch

from foveate.attention_ops import ClusterRouting, RoutingAttention, cluster_members, commitment_loss


def google(case: dict, det, **changes) -> ClusterRouting:
    ctor = case["ctor"]
    heads, dim, clusters = ctor["q_shape"][1], ctor["q_shape"][-1], ctor["sparsity_cluster_size"]
    net = ClusterRouting(
        heads, dim, clusters=clusters, window=ctor["attention_window"], share_qk=ctor["share_qk"],
        is_causal=ctor["masked"], strided=ctor["strided_attention"], decay=ctor["decay"], **changes,
    )  # fmt: skip
    before = case["ema_count_before"]
    means = torch.from_numpy(det.det_tensor("means", (heads, clusters, dim)))
    net.means.copy_(means)
    net.ema_means.copy_(means * max(before, 1.0 if before == 0 else before))
    net.ema_count.fill_(before)
    return net.train(ctor["mode"] == "train")


def google_input(case: dict, det) -> torch.Tensor:
    x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
    zeroed = case["ctor"]["zeroed_v_rows"]
    x[2].flatten(2, -2)[:, :, :zeroed] = 0
    return x.requires_grad_()


def run(net: ClusterRouting, x: torch.Tensor) -> torch.Tensor:
    """(3, B, heads, ..., d) -> (B, heads, tokens, d)."""
    q, k, v = (t.flatten(2, -2).transpose(1, 2) for t in x)
    return net(q, k, v).transpose(1, 2)


def test_clusters_equal_the_authors_with_gradients_and_losses(det, golden):
    cases, arrays = golden("module__routing_google")
    for name, case in cases.items():
        net, x = google(case, det, counts_per_head=False), google_input(case, det)
        out = run(net, x)
        assert recorded.off(out, arrays[f"{name}__out"]) < 2e-5, name
        recorded.backward(out, det)
        theirs = torch.from_numpy(arrays[f"{name}__grad_in"]).flatten()
        grad = x.grad.flatten()[np.linspace(0, x.grad.numel() - 1, len(theirs)).astype(int)]
        assert (grad - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name
        if net.training:
            for ours, key in ((net.means, "means"), (net.ema_count, "ema_count"), (net.ema_means, "ema_means")):
                wanted = torch.from_numpy(arrays[f"{name}__{key}_after"])
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5, msg=name)
            net = google(case, det)
        q, k = (torch.nn.functional.layer_norm(t.flatten(2, -2).transpose(1, 2), x.shape[-1:], eps=1e-6) for t in x[:2])
        loss = net.commitment_loss(q, k)
        assert abs(loss.item() / case["clustering_loss"] - 1) < 1e-4, name


def test_tokens_are_counted_per_head_unless_asked_to_count_as_the_authors(det, golden):
    cases, _ = golden("module__routing_google")
    case = next(c for c in cases.values() if c["ctor"]["mode"] == "train")
    nets = [google(case, det, counts_per_head=per_head) for per_head in (True, False)]
    for net in nets:
        run(net, google_input(case, det))
    tokens = case["ctor"]["q_shape"][0] * case["ctor"]["q_shape"][2]
    counts = (nets[0].ema_count - 0.999 * case["ema_count_before"]) / 0.001
    torch.testing.assert_close(counts.sum(-1), torch.full((2,), float(tokens)), rtol=1e-3, atol=0.1)
    assert (nets[0].ema_count - nets[1].ema_count).abs().max() > 1e-4
    torch.testing.assert_close(nets[0].ema_means, nets[1].ema_means)


def lucidrains(ctor: dict) -> ClusterRouting:
    return ClusterRouting(
        ctor["num_heads"], ctor["head_dim"], clusters=ctor["num_clusters"], window=ctor["window_size"],
        key_window=ctor["context_window_size"] if ctor["receives_context"] else None, variant="lucidrains",
        share_qk=ctor["shared_qk"], is_causal=ctor["causal"], memory=ctor["num_mem_kv"],
    )  # fmt: skip


def test_the_lucidrains_variant_equals_that_code(det, golden):
    cases, arrays = golden("module__routing_lucidrains")
    tried = 0
    for name, case in cases.items():
        if case["ctor"]["cls"] != "KmeansAttention":
            continue
        net, ctor = lucidrains(case["ctor"]), case["ctor"]
        weights = det.det_state_dict([e for e in case["state_dict"] if e[1] and 0 not in e[1]])
        net.means.copy_(weights["kmeans.means"])
        for ours, theirs in (("memory_k", "mem_key"), ("memory_v", "mem_value")):
            if theirs in weights:
                getattr(net, ours).data.copy_(weights[theirs])
        x = recorded.given(case, det).requires_grad_()
        split = int(name[1:].partition("_")[0]), (24 if "kv24" in name else None)
        q, k = x[:, :, : split[0]], x[:, :, split[0] : split[0] + (split[1] or split[0])]
        v = x[:, :, split[0] + k.shape[2] :]
        out = net.train()(*(t.transpose(1, 2) for t in (q, q if ctor["shared_qk"] else k, v))).transpose(1, 2)
        assert recorded.off(out, arrays[f"{name}__out"]) < 2e-5, name
        aux = case["aux"]["aux_loss"]["value"]
        assert abs(commitment_loss(net).item() / aux - 1) < 1e-4, name
        wanted = torch.from_numpy(arrays[f"{name}__means_after"])
        torch.testing.assert_close(net.means, wanted, rtol=1e-4, atol=1e-5, msg=name)
        tried += 1
    assert tried >= 5


def test_the_layer_around_the_lucidrains_variant_equals_that_code(det, golden):
    cases, arrays = golden("module__routing_lucidrains")
    name, case = next((n, c) for n, c in cases.items() if c["ctor"]["cls"] == "SelfAttention")
    ctor = case["ctor"]
    net = RoutingAttention(
        ctor["dim"], ctor["heads"], map_size=(7, 8), qkv_bias=False, clusters=ctor["num_clusters"],
        window=ctor["window_size"], variant="lucidrains", share_qk=True,
    )  # fmt: skip
    weights = det.det_state_dict([e for e in case["state_dict"] if e[1] and 0 not in e[1]])
    with torch.no_grad():
        net.qkv.weight.copy_(torch.cat([weights["to_q.weight"], weights["to_q.weight"], weights["to_v.weight"]]))
        net.proj.weight.copy_(weights["to_out.weight"])
        net.proj.bias.zero_()
        net.routing.means.copy_(weights["global_attn.kmeans.means"])
    assert recorded.off(net.eval()(recorded.given(case, det), (7, 8)), arrays[f"{name}__out"]) < 2e-5


def test_a_layer_that_left_a_loss_behind_can_be_copied_and_saved():
    net = RoutingAttention(8, 2, map_size=(3, 4), clusters=2).train()
    net(torch.randn(2, 12, 8), (3, 4)).sum()
    loss = commitment_loss(net)
    assert loss.requires_grad and loss > 0
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert commitment_loss(again) is None
    net.eval()(torch.randn(2, 12, 8), (3, 4))
    assert commitment_loss(net) is None


def test_clusters_are_balanced_and_sorted_and_windows_are_checked():
    x, means = torch.randn(2, 11, 3, 4), torch.randn(3, 5, 4)
    members = cluster_members(x, means, 4)
    assert members.shape == (2, 3, 5, 4) and (members.diff(dim=-1) > 0).all()
    likeness = torch.einsum("bnhd,hkd->bhkn", x, means)
    least = likeness.gather(3, members).amin(-1, keepdim=True)
    assert ((likeness >= least).sum(-1) == 4).all()
    with pytest.raises(ValueError, match="window must be 1 to 11 tokens, got 12"):
        cluster_members(x, means, 12)
    with pytest.raises(ValueError, match=r"means \(heads, clusters, d\), got"):
        cluster_members(x, means[:, :, :3], 2)
