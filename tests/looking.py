"""What the tests of pictures and pages share: the weights of a model's layers by definition, and what a page holds."""

import base64
import json
import math
import re
from functools import partial

import definitions as define
import numpy as np
import torch

from foveate.analysis.capture import SDPA, SOFTMAX, watching

PROJECT_TOLERANCE = 1e-5


def calls_of(model, image) -> list:
    """Every call of attention of a model, with its result."""
    found = []

    def see(call, out):
        found.append((call, out))
        return out

    with torch.no_grad(), watching(model, see):
        model(image)
    return found


def weights_by_definition(call, out) -> dict[str, torch.Tensor]:
    """By branch: (B, heads, queries, keys) in float64, from the queries and keys of the call, by tests/definitions.py.

    The values are one-hot vectors of the keys, so that the output of a definition is the row of weights.
    """
    a = {name: _double(value) for name, value in call.arguments.items()}
    if call.op == SDPA:
        return {"": _of_sdpa(a, call.frames[-1].module)}
    if call.op == SOFTMAX:
        return {"": out.double()}
    return {branch: _by_head(rows) for branch, rows in OPS[call.op](a).items()}


def _double(value):
    if isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value):
        return [_double(v) for v in value]
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _by_head(rows):  # (B, ..., heads, keys) -> (B, heads, queries, keys)
    return rows.flatten(1, -3).transpose(1, 2)


def _eye(k):
    """One-hot values of keys (B, ..., heads, d)."""
    count = math.prod(k.shape[1:-2])
    of_key = torch.eye(count, dtype=torch.float64).view(*k.shape[1:-2], 1, count)
    return of_key.expand(*k.shape[:-1], count)


def _of_sdpa(a, layer):
    q, k, mask = a["query"], a["key"], a.get("attn_mask")
    if q.dim() == 3:  # timm's SAM: (B * heads, N, d)
        q, k, mask = (x.unflatten(0, (-1, layer.num_heads)) for x in (q, k, mask))
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = q.shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
    logits = torch.einsum("...qd,...kd->...qk", q, k) * scale
    logits = logits if mask is None else logits + mask
    return logits.softmax(-1).flatten(0, -4)


def _neighborhood(a):
    return {
        "": define.neighborhood(
            a["q"], a["k"], _eye(a["k"]), a["kernel_size"], a["dilation"], a["stride"], a["rpb"], a["is_causal"],
            a["scale"],
        )
    }  # fmt: skip


def _window(a):
    attend = partial(define.attend_clipped, clip=a["clip"])
    size = tuple(a["window_size"])
    return {
        "": define.window(
            a["q"], a["k"], _eye(a["k"]), size, a["bias"], a["mask"], a["scale"], attend, shift=tuple(a["shift"])
        )
    }


def _halo(a):
    settings = (a["block_size"], a["halo"], a["stride"], a["rel_h"], a["rel_w"], a["scale"])
    return {"": define.halo(a["q"], a["k"], _eye(a["k"]), *settings)}


def _circle(a):
    text_v = None if a["text_k"] is None else a["text_v"].new_zeros(*a["text_v"].shape[:-1], _count(a["k"]))
    return {
        "": define.circle_with_more(
            a["q"], a["k"], _eye(a["k"]), a["cell_weight"], a["text_k"], text_v, a["radius"], a["scale"]
        )
    }


def _count(k):
    return math.prod(k.shape[1:-2])


def _routed(a):
    sizes = a["region_size"], a["kv_region_size"] or a["region_size"]
    return {"": define.routed(a["q"], a["k"], _eye(a["k"]), a["routes"], *sizes, a["scale"])}


def _hilo(a):
    found, (high, low) = {}, (a["high"], a["low"])
    if high[0].shape[3]:
        found["high"] = define.window(high[0], high[1], _eye(high[1]), tuple(a["window_size"]), None, None, a["scale"])
    if low[0].shape[3]:
        q, k, v = (x.flatten(1, 2) for x in (low[0], low[1], _eye(low[1])))
        found["low"] = define.attend(q, k, v, torch.ones(q.shape[1], k.shape[1], dtype=torch.bool), a["scale"])
    return found


def _channel(a):
    scale = a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    weights = (torch.einsum("byxhc,byxhd->bhcd", a["q"], a["k"]) * scale).softmax(-1)
    return {"": weights.transpose(1, 2)}


def _agent(a):
    everyone = partial(torch.ones, dtype=torch.bool)
    q, k, agents, scale = a["q"], a["k"], a["agents"], a["scale"]
    biases = [None if a[name] is None else a[name][None] for name in ("bias_to", "bias_from")]
    seen = [everyone(agents.shape[1], k.shape[1]), everyone(q.shape[1], agents.shape[1])]
    return {
        "": define.agent(q, k, _eye(k), agents, a["bias_to"], a["bias_from"], scale),
        "gather": define.attend(agents, k, _eye(k), seen[0], scale, biases[0]),
        "read": define.attend(q, agents, _eye(agents), seen[1], scale, biases[1]),
    }


def _aggregated(a):
    def rows(pooled_v, local_v):
        given = (a["embedding"], a["temperature"], a["pooled_bias"], a["bias_rows"], a["bias_cols"], a["local_bias"])
        linear = (None, None) if local_v is None else (torch.zeros_like(a["tokens"]), torch.zeros_like(a["token_bias"]))
        return define.aggregated(a["q"], a["pooled_k"], pooled_v, a["local_k"], local_v, *given, *linear, None)

    pooled = _eye(a["pooled_k"])
    if a["local_k"] is None:
        return {"": rows(pooled, None)}
    local = _eye(a["local_k"])
    return {
        "local": rows(pooled.new_zeros(*pooled.shape[:-1], local.shape[-1]), local),
        "pooled": rows(pooled, local.new_zeros(*local.shape[:-1], pooled.shape[-1])),
    }


def _flow(a):
    return {"": define.flow(a["q"], a["k"], _eye(a["k"]), a["form"])}


def _kernelized(a):
    settings = (a["omega"], a["rel"], a["size"], a["prefix_tokens"], a["normalize"])
    return {"": define.kernelized(a["q"], a["k"], _eye(a["k"]), *settings)}


def _clusters(a):
    memory_v = a["memory_v"]
    memory_v = None if memory_v is None else memory_v.new_zeros(*memory_v.shape[:-1], a["k"].shape[1])
    scale = a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    return {
        "": define.clusters(
            a["q"], a["k"], _eye(a["k"]), a["q_members"], a["k_members"], a["memory_k"], memory_v, a["key_mask"],
            a["is_causal"], a["self_logit"], a["count_eps"], scale,
        )
    }  # fmt: skip


def _dense(a):
    return {"": define.dense_attention(a["q"], a["k"], _eye(a["k"]), a["mask"], a["clip"], None, a["scale"])}


def _sparse(a):
    return {"": define.sparse_attention(a["q"], a["k"], _eye(a["k"]), a["columns"], a["scale"])}


def _reversed(a):
    return {"": define.reversed_attention(a["q"], a["k"], _eye(a["k"]), a["weight"], a["scale"])}


def _grouped(a):
    value = torch.eye(a["k"].shape[1], dtype=torch.float64)[None, :, None]
    value = value.expand(len(a["k"]), -1, a["k"].shape[2], -1)
    return {"": define.grouped_query(a["q"], a["k"], value, a["key_heads"], a["scale"])}


OPS = {
    "neighborhood_attention": _neighborhood,
    "window_attention": _window,
    "halo_attention": _halo,
    "circle_attention": _circle,
    "routed_attention": _routed,
    "hilo_attention": _hilo,
    "channel_attention": _channel,
    "agent_attention": _agent,
    "aggregated_attention": _aggregated,
    "flow_attention": _flow,
    "kernelized_attention": _kernelized,
    "cluster_attention": _clusters,
    "dense_attention": _dense,
    "sparse_attention": _sparse,
    "reversed_attention": _reversed,
    "grouped_query_attention": _grouped,
}


def on_whole_layer(weights: torch.Tensor) -> torch.Tensor:
    """(windows, heads, T, K) of one image -> (heads, windows * T, windows * K): no window sees another."""
    return torch.stack([torch.block_diag(*of_head) for of_head in weights.transpose(0, 1)])


class Page:
    """The data of a page, decoded as its script does."""

    def __init__(self, path) -> None:
        self.text = path.read_text()
        found = re.search(r"^const data = (\{.*\});$", self.text, re.MULTILINE)
        assert found is not None
        self.data = json.loads(found[1])
        self.views = self.data["views"]

    def weights(self, view: int) -> tuple[list[int], np.ndarray]:
        """Numbers of the stored queries, and their weights (heads, queries, keys)."""
        one = self.views[view]
        keys, starts = len(unpacked(one["keys"]["rows"], "<i4")), unpacked(one["starts"], "<u4")
        seen = None if one["seen"] is None else unpacked(one["seen"], "<u4" if one["wide"] else "<u2")
        scales = unpacked(one["scales"], "<f4").reshape(one["heads"], one["count"])
        out = np.zeros((one["heads"], one["count"], keys))
        for head, packed in enumerate(one["weights"]):
            units = unpacked(packed, "<u2")
            for query in range(one["count"]):
                part = slice(starts[query], starts[query + 1])
                places = np.arange(keys) if seen is None else seen[part]
                out[head, query, places] = units[part] * (scales[head, query] / 65535)
        return unpacked(one["queries"]["numbers"], "<u4").tolist(), out


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
