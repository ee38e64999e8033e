"""Small calls of every op: what the tests that concern all ops run over.

A case holds differentiable tensors and a function of them and of `impl`; an op has a case for each kind of argument.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from foveate.attention_ops import (
    agent_attention,
    aggregated_attention,
    channel_attention,
    channel_gate,
    circle_attention,
    circle_attention_lse,
    cluster_attention,
    dense,
    dense_attention,
    flow_attention,
    grouped_query_attention,
    halo_attention,
    halo_attention_lse,
    hilo_attention,
    kernelized_attention,
    large_kernel_attention,
    neighborhood_attention,
    neighborhood_attention_lse,
    reversed_attention,
    routed_attention,
    sparse_attention,
    strip_gate,
    subspace_gate,
    window_attention,
    window_attention_lse,
)


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Args:
        op: the public function.
        shapes: of the tensors that have gradients, in the order of the call; the first has the batch first.
        call: takes those tensors and `impl=`; returns one tensor, several outputs joined.
        batched: which of them have a batch dimension.
        local: whether a key outside what a query sees exists, so that it must not change the query's result.
    """

    op: Callable[..., Tensor | tuple[Tensor, Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Tensor]
    batched: tuple[bool, ...] = (True, True, True)
    local: bool = False
    names: tuple[str, ...] = field(default=("q", "k", "v"))

    @property
    def name(self) -> str:
        return self.op.__name__

    def op_call(self) -> tuple[OpOverload, tuple, dict]:
        """The torch.library op, and the arguments that the public function gives it for new tensors."""
        with _Catch() as caught:
            self.call(*self.tensors())
        return caught.call

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = True) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes)
        return [t.to(dtype).requires_grad_(grad) for t in made]


class _Catch(TorchFunctionMode):
    """Keep the first call of one of our ops."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("foveate.") and not hasattr(self, "call"):
            self.call = func.default, args, dict(kwargs or {})
        return func(*args, **(kwargs or {}))


def _maps(*shape: int, count: int = 3) -> tuple[tuple[int, ...], ...]:
    return (shape,) * count


def routes(batch: int) -> Tensor:
    """(batch, 4, 2): each of four regions sees itself and the next one."""
    return torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], device="cpu").expand(batch, -1, -1)


def key_heads(batch: int) -> Tensor:
    """(batch, 4): four query heads share two key heads, one of which serves three of them."""
    return torch.tensor([[0, 1, 1, 1]], device="cpu").expand(batch, -1)


def shifted(tokens: int, windows: int) -> Tensor:
    """(windows, tokens, tokens) bool: the two halves of every window but the first do not see each other."""
    half = torch.arange(tokens, device="cpu") < tokens // 2
    mask = (half[:, None] == half).expand(windows, -1, -1).clone()
    mask[0] = True
    return mask


def some_pairs(queries: int, keys: int) -> Tensor:
    """(1, 1, queries, keys) bool: two of three pairs; the last query sees nothing."""
    at = torch.arange(queries, device="cpu")[:, None] + torch.arange(keys, device="cpu")
    mask = (at % 3 > 0)[None, None]
    mask[:, :, -1] = False
    return mask


def columns(batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """(batch, heads, queries, 3): a query sees the key of its number and the two that follow."""
    at = torch.arange(queries, device="cpu")[:, None] + torch.arange(3, device="cpu")
    return (at % keys).expand(batch, heads, -1, -1)


def _hilo(hq, hk, hv, lq, lk, lv, impl="auto"):
    return hilo_attention((hq, hk, hv), (lq, lk, lv), (2, 3), impl=impl)


def _regions(region, kv_region=None):
    def call(q, k, v, impl="auto"):
        return routed_attention(
            q, k, v, routes(q.shape[0]), region_size=region, kv_region_size=kv_region, scale=0.7, impl=impl
        )

    return call


def _with_lse(results: tuple[Tensor, Tensor]) -> Tensor:
    """The log-sum-exp as one more channel of the output."""
    out, lse = results
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


def members(batch: int, keys: bool = False) -> Tensor:
    """(batch, 2, 2, 3): for each of two heads, the tokens of two clusters of 5; one token is in both, one in none."""
    found = (
        [[[0, 2, 3], [1, 3, 4]], [[0, 1, 2], [0, 2, 3]]] if keys else [[[0, 1, 3], [1, 2, 3]], [[0, 2, 4], [1, 2, 4]]]
    )
    return torch.tensor(found, device="cpu").expand(batch, -1, -1, -1)


def _clusters(q, k, v, memory_k=None, memory_v=None, impl="auto", **options):
    of_q, of_k = members(q.shape[0]), members(q.shape[0], keys=True)
    return cluster_attention(q, k, v, of_q, of_k, memory_k=memory_k, memory_v=memory_v, impl=impl, **options)


NAMES_OF_AGGREGATED = ("q", "pooled_k", "pooled_v", "local_k", "local_v", "embedding", "temperature", "pooled_bias")
NAMES_OF_AGGREGATED += ("local_bias", "tokens", "token_bias", "gates")


def _aggregated(kept: float):
    """Local and pooled keys; about so many of the gates are not 0."""

    def call(
        q,
        pooled_k,
        pooled_v,
        local_k,
        local_v,
        embedding,
        temperature,
        table,
        bias,
        tokens,
        token_bias,
        gates,
        impl="auto",
    ):
        rows, cols = torch.tensor([[0], [2], [1], [3]], device="cpu"), torch.tensor([[0, 1]] * 3, device="cpu")
        places = torch.arange(gates.shape[1:].numel(), device="cpu").view(gates.shape[1:])
        gates = gates * (places * 0.37 % 1 < kept)
        return aggregated_attention(
            q, pooled_k, pooled_v, local_k, local_v, embedding=embedding, temperature=temperature.square() + 0.5,
            pooled_bias=table, bias_rows=rows, bias_cols=cols, local_bias=bias, tokens=tokens, token_bias=token_bias,
            gates=gates, impl=impl,
        )  # fmt: skip

    return call


def _all_to_all(q, pooled_k, pooled_v, embedding, temperature, table, impl="auto"):
    cells = torch.tensor([[0, 1], [1, 0]], device="cpu")
    return aggregated_attention(
        q, pooled_k, pooled_v, embedding=embedding, temperature=temperature.square() + 0.5, pooled_bias=table,
        bias_rows=cells, bias_cols=torch.tensor([[1, 0], [0, 2], [2, 1]], device="cpu"), impl=impl,
    )  # fmt: skip


AGGREGATED_SHAPES = ((2, 4, 3, 2, 3), (2, 2, 2, 3), (2, 2, 2, 5), (2, 4, 3, 2, 3), (2, 4, 3, 2, 5))
AGGREGATED_SHAPES += ((2, 3), (2,), (2, 4, 2), (2, 3, 3), (2, 3, 9), (2, 9), (2, 4, 3, 2))
OF_MAPS = (True,) * 5 + (False,) * 6 + (True,)
LKA_SHAPES = ((2, 3, 5, 6), (3, 1, 3, 3), (3,), (3, 1, 3, 3), (3,), (3, 3, 1, 1), (3,))
QKV_RPB = ("q", "k", "v", "rpb")
OF_AGENTS = ((2, 7, 2, 3), (2, 5, 2, 3), (2, 5, 2, 3), (2, 4, 2, 3))  # q, k, v, agents

CASES = {
    "agent": Case(
        agent_attention,
        OF_AGENTS,
        lambda q, k, v, agents, impl="auto": agent_attention(q, k, v, agents, impl=impl),
        batched=(True,) * 4,
        names=("q", "k", "v", "agents"),
    ),
    "agent, biases": Case(
        agent_attention,
        (*OF_AGENTS, (2, 4, 5), (2, 7, 4)),
        lambda q, k, v, agents, to, of, impl="auto": agent_attention(
            q, k, v, agents, bias_to=to, bias_from=of, scale=0.5, impl=impl
        ),
        batched=(True, True, True, True, False, False),
        names=("q", "k", "v", "agents", "bias_to", "bias_from"),
    ),
    "neighborhood": Case(
        neighborhood_attention,
        _maps(2, 6, 7, 2, 3),
        lambda q, k, v, impl="auto": neighborhood_attention(q, k, v, 3, impl=impl),
        local=True,
    ),
    "neighborhood, bias, dilation": Case(
        neighborhood_attention,
        (*_maps(2, 6, 9, 2, 3), (2, 5, 3)),
        lambda q, k, v, rpb, impl="auto": neighborhood_attention(
            q, k, v, (3, 2), (2, 3), rpb=rpb, scale=0.5, impl=impl
        ),
        batched=(True, True, True, False),
        local=True,
        names=QKV_RPB,
    ),
    "neighborhood, causal": Case(
        neighborhood_attention,
        (*_maps(2, 6, 5, 2, 3), (2, 5, 5)),
        lambda q, k, v, rpb, impl="auto": neighborhood_attention(
            q, k, v, 3, rpb=rpb, is_causal=(True, False), impl=impl
        ),
        batched=(True, True, True, False),
        local=True,
        names=QKV_RPB,
    ),
    "neighborhood, causal, stride": Case(
        neighborhood_attention,
        (*_maps(2, 7, 10, 2, 3), (2, 5, 7)),
        lambda q, k, v, rpb, impl="auto": neighborhood_attention(
            q, k, v, (3, 4), (1, 2), stride=(2, 3), rpb=rpb, is_causal=(True, False), impl=impl
        ),
        batched=(True, True, True, False),
        local=True,
        names=QKV_RPB,
    ),
    "neighborhood, log-sum-exp": Case(
        neighborhood_attention_lse,
        (*_maps(2, 6, 5, 2, 3), (2, 5, 3)),
        lambda q, k, v, rpb, impl="auto": _with_lse(
            neighborhood_attention_lse(q, k, v, (3, 2), (1, 2), rpb=rpb, is_causal=(True, False), impl=impl)
        ),
        batched=(True, True, True, False),
        local=True,
        names=QKV_RPB,
    ),
    "neighborhood, wide values, bias": Case(
        neighborhood_attention,
        (*_maps(2, 6, 7, 2, 3, count=2), (2, 6, 7, 2, 5), (2, 5, 5)),
        lambda q, k, v, rpb, impl="auto": neighborhood_attention(q, k, v, 3, rpb=rpb, impl=impl),
        batched=(True, True, True, False),
        local=True,
        names=QKV_RPB,
    ),
    "neighborhood, log-sum-exp, no bias": Case(
        neighborhood_attention_lse,
        (*_maps(2, 6, 7, 2, 3, count=2), (2, 6, 7, 2, 1)),
        lambda q, k, v, impl="auto": _with_lse(neighborhood_attention_lse(q, k, v, 3, stride=2, impl=impl)),
        local=True,
    ),
    "dense": Case(
        dense,
        ((2, 5, 6), (4, 6), (4,), (2, 5, 4)),
        lambda x, weight, bias, residual, impl="auto": dense(
            x, weight, bias, activation="gelu", residual=residual, impl=impl
        ),
        batched=(True, False, False, True),
        names=("x", "weight", "bias", "residual"),
    ),
    "circle": Case(
        circle_attention,
        _maps(2, 5, 7, 2, 3),
        lambda q, k, v, impl="auto": circle_attention(q, k, v, 2, impl=impl),
        local=True,
    ),
    "circle, wide values, log-sum-exp": Case(
        circle_attention_lse,
        (*_maps(2, 5, 7, 2, 3, count=2), (2, 5, 7, 2, 4)),
        lambda q, k, v, impl="auto": _with_lse(circle_attention_lse(q, k, v, 2, impl=impl)),
        local=True,
    ),
    "window": Case(
        window_attention,
        _maps(2, 4, 6, 2, 3),
        lambda q, k, v, impl="auto": window_attention(q, k, v, (2, 3), impl=impl),
        local=True,
    ),
    "window, shift": Case(
        window_attention,
        (*_maps(2, 4, 6, 2, 3, count=2), (2, 4, 6, 2, 5)),
        lambda q, k, v, impl="auto": window_attention(q, k, v, (2, 3), shift=(1, 2), impl=impl),
        local=True,
    ),
    "window, shift, bias": Case(
        window_attention,
        (*_maps(2, 4, 6, 2, 3), (2, 6, 6)),
        lambda q, k, v, bias, impl="auto": window_attention(q, k, v, (2, 3), shift=(0, 1), bias=bias, impl=impl),
        batched=(True, True, True, False),
        local=True,
        names=("q", "k", "v", "bias"),
    ),
    "window, shift, log-sum-exp": Case(
        window_attention_lse,
        (*_maps(2, 4, 6, 2, 3, count=2), (2, 4, 6, 2, 1)),
        lambda q, k, v, impl="auto": _with_lse(window_attention_lse(q, k, v, (2, 3), shift=1, impl=impl)),
        local=True,
    ),
    "window, bias, mask": Case(
        window_attention,
        (*_maps(2, 4, 6, 2, 3), (2, 6, 6)),
        lambda q, k, v, bias, impl="auto": window_attention(
            q, k, v, (2, 3), bias=bias, mask=shifted(6, 4), scale=0.5, impl=impl
        ),
        batched=(True, True, True, False),
        local=True,
        names=("q", "k", "v", "bias"),
    ),
    "window, log-sum-exp": Case(
        window_attention_lse,
        _maps(2, 4, 6, 2, 3),
        lambda q, k, v, impl="auto": _with_lse(window_attention_lse(q, k, v, (2, 3), impl=impl)),
        local=True,
    ),
    "window, bias, mask, log-sum-exp": Case(
        window_attention_lse,
        (*_maps(2, 4, 6, 2, 3), (2, 6, 6)),
        lambda q, k, v, bias, impl="auto": _with_lse(
            window_attention_lse(q, k, v, (2, 3), bias=bias, mask=shifted(6, 4), scale=0.5, impl=impl)
        ),
        batched=(True, True, True, False),
        local=True,
        names=("q", "k", "v", "bias"),
    ),
    "window, shift, clipped": Case(
        window_attention,
        _maps(2, 4, 6, 2, 3),
        lambda q, k, v, impl="auto": window_attention(q, k, v, (2, 3), shift=(1, 2), clip=(-1e-4, 1.02), impl=impl),
        local=True,
    ),
    "window, all options": Case(
        window_attention,
        (*_maps(2, 4, 6, 2, 3), (2, 6, 6), (2, 4, 6, 2)),
        lambda q, k, v, bias, gate, impl="auto": window_attention(
            q, k, v, (2, 3), shift=1, bias=bias, mask=shifted(6, 4), clip=(-0.1, 1.1), gate=gate, scale=0.5, impl=impl
        ),
        batched=(True, True, True, False, True),
        names=("q", "k", "v", "bias", "gate"),
    ),
    "dense attention": Case(
        dense_attention,
        ((2, 5, 2, 3), (2, 7, 2, 3), (2, 7, 2, 4)),
        lambda q, k, v, impl="auto": dense_attention(q, k, v, impl=impl),
    ),
    "dense attention, mask": Case(
        dense_attention,
        ((2, 5, 2, 3), (2, 7, 2, 3), (2, 7, 2, 4)),
        lambda q, k, v, impl="auto": dense_attention(q, k, v, mask=some_pairs(5, 7), scale=0.5, impl=impl),
    ),
    "dense attention, all options": Case(
        dense_attention,
        (*_maps(2, 6, 2, 3), (2, 6, 2)),
        lambda q, k, v, gate, impl="auto": dense_attention(
            q, k, v, mask=some_pairs(6, 6), clip=(-0.1, 1.1), gate=gate, impl=impl
        ),
        batched=(True,) * 4,
        names=("q", "k", "v", "gate"),
    ),
    "reversed": Case(
        reversed_attention,
        (*_maps(2, 6, 2, 3, count=2), (2, 6, 2, 4), (2, 6, 2)),
        lambda q, k, v, weight, impl="auto": reversed_attention(q, k, v, weight, impl=impl),
        batched=(True,) * 4,
        names=("q", "k", "v", "weight"),
    ),
    "sparse": Case(
        sparse_attention,
        ((2, 5, 2, 3), (2, 7, 2, 3), (2, 7, 2, 4)),
        lambda q, k, v, impl="auto": sparse_attention(q, k, v, columns(q.shape[0], 2, 5, 7), impl=impl),
    ),
    "halo": Case(
        halo_attention,
        _maps(2, 4, 5, 2, 3),
        lambda q, k, v, impl="auto": halo_attention(q, k, v, 2, 1, impl=impl),
        local=True,
    ),
    "halo, tables, stride": Case(
        halo_attention,
        ((2, 3, 2, 2, 3), (2, 5, 4, 2, 3), (2, 5, 4, 2, 4), (7, 3), (7, 3)),
        lambda q, k, v, rel_h, rel_w, impl="auto": halo_attention(
            q, k, v, 2, 1, stride=2, rel_h=rel_h, rel_w=rel_w, scale=0.5, impl=impl
        ),
        batched=(True, True, True, False, False),
        local=True,
        names=("q", "k", "v", "rel_h", "rel_w"),
    ),
    "halo, tables, stride, log-sum-exp": Case(
        halo_attention_lse,
        ((2, 3, 2, 2, 3), (2, 5, 4, 2, 3), (2, 5, 4, 2, 4), (7, 3), (7, 3)),
        lambda q, k, v, rel_h, rel_w, impl="auto": _with_lse(
            halo_attention_lse(q, k, v, 2, 1, stride=2, rel_h=rel_h, rel_w=rel_w, scale=0.5, impl=impl)
        ),
        batched=(True, True, True, False, False),
        local=True,
        names=("q", "k", "v", "rel_h", "rel_w"),
    ),
    "routed, copied keys": Case(routed_attention, _maps(2, 12, 10, 2, 3), _regions((6, 5)), local=True),
    "routed, masked keys": Case(
        routed_attention,
        ((2, 2, 4, 2, 3), (2, 4, 4, 2, 3), (2, 4, 4, 2, 5)),
        _regions((1, 2), (2, 2)),
        local=True,
    ),
    "hilo": Case(
        hilo_attention,
        (*_maps(2, 4, 6, 2, 3), (2, 4, 6, 1, 3), (2, 2, 2, 1, 3), (2, 2, 2, 1, 3)),
        _hilo,
        batched=(True,) * 6,
        names=("high q", "high k", "high v", "low q", "low k", "low v"),
    ),
    "channel": Case(
        channel_attention,
        _maps(2, 4, 5, 2, 3),
        lambda q, k, v, impl="auto": channel_attention(q, k, v, impl=impl),
    ),
    "channel gate": Case(
        channel_gate,
        ((2, 5, 3, 4), (1, 1, 3)),
        lambda x, weight, impl="auto": channel_gate(x, weight, impl=impl),
        batched=(True, False),
        names=("x", "weight"),
    ),
    "strip gate": Case(
        strip_gate,
        ((2, 6, 3, 4), (6, 2, 3), (6,), (6,)),
        lambda x, weight, scale, shift, impl="auto": strip_gate(x, weight, scale, shift, 3, impl=impl),
        batched=(True, False, False, False),
        names=("x", "weight", "norm_weight", "norm_bias"),
    ),
    "subspace gate": Case(
        subspace_gate,
        ((2, 6, 3, 4), (6,), (6,), (2, 3), (2,)),
        lambda x, scale, shift, weight, bias, impl="auto": subspace_gate(x, scale, shift, weight, bias, impl=impl),
        batched=(True, False, False, False, False),
        names=("x", "channel_scale", "channel_shift", "weight", "bias"),
    ),
    "grouped query": Case(
        grouped_query_attention,
        ((2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 4)),
        lambda q, k, v, impl="auto": grouped_query_attention(q, k, v, key_heads(q.shape[0]), scale=0.7, impl=impl),
    ),
    "large kernel": Case(
        large_kernel_attention,
        LKA_SHAPES,
        lambda *tensors, impl="auto": large_kernel_attention(*tensors, 2, impl=impl),
        batched=(True,) + (False,) * 6,
        names=("x", "local_weight", "local_bias", "dilated_weight", "dilated_bias", "point_weight", "point_bias"),
    ),
    "circle, cells, text": Case(
        circle_attention,
        (*_maps(2, 4, 6, 2, 3), (2, 3), (2, 2, 2, 3), (2, 2, 2, 3)),
        lambda q, k, v, weight, text_k, text_v, impl="auto": circle_attention(
            q, k, v, 2, cell_weight=weight, text_k=text_k, text_v=text_v, impl=impl
        ),
        batched=(True, True, True, False, True, True),
        names=("q", "k", "v", "cell_weight", "text_k", "text_v"),
    ),
    "circle, cells, log-sum-exp": Case(
        circle_attention_lse,
        (*_maps(2, 4, 6, 2, 3, count=2), (2, 4, 6, 2, 4), (2, 2)),
        lambda q, k, v, weight, impl="auto": _with_lse(
            circle_attention_lse(q, k, v, 2, cell_weight=weight, scale=0.7, impl=impl)
        ),
        batched=(True, True, True, False),
        names=("q", "k", "v", "cell_weight"),
    ),
    "aggregated": Case(
        aggregated_attention, AGGREGATED_SHAPES, _aggregated(1.0), batched=OF_MAPS, names=NAMES_OF_AGGREGATED
    ),
    "aggregated, few heads": Case(
        aggregated_attention, AGGREGATED_SHAPES, _aggregated(0.5), batched=OF_MAPS, names=NAMES_OF_AGGREGATED
    ),
    "aggregated, no local keys": Case(
        aggregated_attention,
        ((2, 2, 3, 2, 3), (2, 4, 2, 3), (2, 4, 2, 4), (2, 3), (2,), (2, 2, 3)),
        _all_to_all,
        batched=(True, True, True, False, False, False),
        names=("q", "pooled_k", "pooled_v", "embedding", "temperature", "pooled_bias"),
    ),
    "flow": Case(
        flow_attention,
        ((2, 5, 2, 3), (2, 7, 2, 3), (2, 7, 2, 4)),
        lambda q, k, v, impl="auto": flow_attention(q, k, v, impl=impl),
    ),
    "flow, core": Case(
        flow_attention,
        _maps(2, 6, 2, 3),
        lambda q, k, v, impl="auto": flow_attention(q, k, v, form="core", impl=impl),
    ),
    "flow, causal": Case(
        flow_attention,
        ((2, 70, 1, 2), (2, 70, 1, 2), (2, 70, 1, 3)),
        lambda q, k, v, impl="auto": flow_attention(q, k, v, form="causal", impl=impl),
    ),
    "kernelized": Case(
        kernelized_attention,
        (*_maps(2, 6, 2, 3), (4, 3), (2, 3, 5)),
        lambda q, k, v, omega, rel, impl="auto": kernelized_attention(q, k, v, omega, (2, 3), rel=rel, impl=impl),
        batched=(True, True, True, False, False),
        names=("q", "k", "v", "omega", "rel"),
    ),
    "kernelized, fft, prefix": Case(
        kernelized_attention,
        ((2, 8, 2, 3), (2, 8, 2, 3), (2, 8, 2, 4), (4, 3), (2, 3, 5)),
        lambda q, k, v, omega, rel, impl="auto": kernelized_attention(
            q, k, v, omega, (2, 3), rel=rel, prefix_tokens=2, normalize=False, form="fft", impl=impl
        ),
        batched=(True, True, True, False, False),
        names=("q", "k", "v", "omega", "rel"),
    ),
    "kernelized, no positions": Case(
        kernelized_attention,
        (*_maps(2, 5, 2, 3), (4, 3)),
        lambda q, k, v, omega, impl="auto": kernelized_attention(q, k, v, omega, (1, 5), impl=impl),
        batched=(True, True, True, False),
        names=("q", "k", "v", "omega"),
    ),
    "clusters": Case(
        cluster_attention,
        ((2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 4)),
        lambda q, k, v, impl="auto": _clusters(q, k, v, impl=impl),
    ),
    "clusters, causal, memory": Case(
        cluster_attention,
        (*_maps(2, 5, 2, 3), (2, 2, 1, 3), (2, 2, 1, 3)),
        lambda q, k, v, memory_k, memory_v, impl="auto": _clusters(
            q, k, v, memory_k, memory_v, is_causal=True, self_logit=-0.5, scale=0.7, impl=impl
        ),
        batched=(True, True, True, False, False),
        names=("q", "k", "v", "memory_k", "memory_v"),
    ),
}


class OnTokens(nn.Module):
    """A layer of tokens, (B, N, C) -> (B, N, C), on maps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return self.layer(x.flatten(1, 2)).view(x.shape)


class OnMap(OnTokens):
    """A layer that wants the size of the map too."""

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return self.layer(x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)
