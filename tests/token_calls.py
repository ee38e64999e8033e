"""Random calls of the ops on tokens, (B, N, heads, d), and of clipped and gated windows; see random_calls.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import definitions
import torch

from foveate import attention_ops as ops

Parts = tuple[dict[str, torch.Tensor], Callable, Callable, dict[str, Any]]  # tensors, run, define, options
CLIPS = ((-0.03, 1.0), (-0.1, 1.1), (0.0, 1.02), (-0.003, 1.003))


def clipped_and_gated(make, call):
    """Give a call of window_attention a clipped softmax, a gate, both, or neither."""
    clip, plain, define = make.one_of(None, None, *CLIPS), call.run, call.define
    names = list(call.tensors)
    if make.one_of(True, False):
        call.tensors["gate"] = make.tensor(*call.tensors["q"].shape[:-1])
    attend = {} if clip is None else {"attend": partial(definitions.attend_clipped, clip=clip)}

    def run(*given, impl):
        gate = given[len(names)] if len(given) > len(names) else None
        return plain(*given[: len(names)], impl=impl, clip=clip, gate=gate)

    def defined(*given):
        out = define(*given[: len(names)], **attend)
        return out * given[-1][..., None] if len(given) > len(names) else out

    call.run, call.define, call.options = run, defined, {**call.options, "clip": clip}
    return call


def tokens(make, *names: str, queries: int, keys: int):
    """q, k and v, with values of any width."""
    batch, heads, dim = make.of_attention()
    of_names = {"q": queries, "k": keys, "v": keys}
    widths = {"q": dim, "k": dim, "v": make.one_of(dim, dim, make.between(1, 40))}
    return {name: make.tensor(batch, of_names[name], heads, widths[name]) for name in names}


def dense_attention(make) -> Parts:
    queries, keys = make.pair(1, 40)
    tensors = tokens(make, "q", "k", "v", queries=queries, keys=make.one_of(queries, keys))
    (batch, queries, heads, _), keys = tensors["q"].shape, tensors["k"].shape[1]
    clip, scale, mask = make.one_of(None, None, *CLIPS), make.scale(), None
    if make.one_of(True, False):
        shape = make.one_of(1, batch), make.one_of(1, heads), queries, keys
        mask = (torch.rand(shape, generator=make.generator) < 0.6).to(make.device)
    if make.one_of(True, False):
        tensors["gate"] = make.tensor(batch, queries, heads)

    def run(q, k, v, gate=None, *, impl):
        return ops.dense_attention(q, k, v, mask=mask, clip=clip, gate=gate, scale=scale, impl=impl)

    def define(q, k, v, gate=None):
        return definitions.dense_attention(q, k, v, mask, clip, gate, scale)

    return tensors, run, define, {"mask": mask is not None, "clip": clip, "scale": scale}


def reversed_attention(make) -> Parts:
    count, scale = make.between(1, 40), make.scale()
    tensors = tokens(make, "q", "k", "v", queries=count, keys=count)
    tensors["weight"] = make.tensor(*tensors["q"].shape[:-1])

    def run(q, k, v, weight, *, impl):
        return ops.reversed_attention(q, k, v, weight, scale=scale, impl=impl)

    return tensors, run, lambda *given: definitions.reversed_attention(*given, scale), {"scale": scale}


def sparse_attention(make) -> Parts:
    queries, keys = make.pair(1, 40)
    tensors, scale = tokens(make, "q", "k", "v", queries=queries, keys=keys), make.scale()
    batch, _, heads, _ = tensors["q"].shape
    budget = make.between(1, keys)
    order = torch.rand(batch, heads, queries, keys, generator=make.generator).argsort(-1)
    columns = order[..., :budget].to(make.device)

    def run(q, k, v, *, impl):
        return ops.sparse_attention(q, k, v, columns, scale=scale, impl=impl)

    def define(q, k, v):
        return definitions.sparse_attention(q, k, v, columns, scale)

    return tensors, run, define, {"budget": budget, "scale": scale}


MAKERS = (dense_attention, reversed_attention, sparse_attention)
