"""Calls of the ops on tokens, (B, N, heads, head_dim), of clipped windows and aggregated attention; see cases.py."""

from typing import Any

import torch
from torch import Tensor

from ... import attention_ops as ops
from . import definitions as exact
from .inputs import BF16, FP16, FP32, Case, Made, Pair, normal

Clip = tuple[float, float]
TABLES = ("embedding", "temperature", "table", "local_bias", "tokens", "token_bias")  # of aggregated attention


def dense(
    queries: int,
    keys: int,
    heads: int,
    dim: int,
    value_dim: int,
    *,
    batch: int = 2,
    clip: Clip | None = None,
    mask: bool = False,
    gate: bool = False,
    dtype: torch.dtype = BF16,
) -> Case:
    def make(device: str) -> Made:
        leaves = _tokens(batch, queries, keys, heads, dim, value_dim, device, dtype)
        leaves += [normal(batch, queries, heads, device=device, dtype=dtype)] if gate else []
        at = (torch.arange(n, device=device) for n in (queries, keys))
        seen = (next(at)[:, None] * 7 + next(at) * 3) % 5 < 3 if mask else None

        def ours(t: list[Tensor]) -> Tensor:
            four = None if seen is None else seen[None, None]
            return ops.dense_attention(*_qkv(t, dim), mask=four, clip=clip, gate=t[2] if gate else None, impl="fused")

        def definition(t: list[Tensor]) -> Tensor:
            out = exact.clipped(*_qkv(t, dim), seen, clip)
            return out * t[2][..., None] if gate else out

        return Made(leaves, ours, definition)

    words = "".join(f" {name}" for name, given in (("clip", clip), ("mask", mask), ("gate", gate)) if given)
    return Case(f"dense {queries}/{keys} tokens B{batch} heads {heads} dim {dim}/{value_dim}{words}", dtype, make)


def sparse(
    queries: int, keys: int, heads: int, dim: int, budget: int, *, batch: int = 2, dtype: torch.dtype = BF16
) -> Case:
    def make(device: str) -> Made:
        at = torch.arange(queries, device=device)[:, None] * 5 + torch.arange(budget, device=device)
        columns = (at % keys).expand(batch, heads, -1, -1)
        seen = torch.zeros(queries, keys, dtype=torch.bool, device=device).scatter(-1, at % keys, True)
        return Made(
            _tokens(batch, queries, keys, heads, dim, dim, device, dtype),
            lambda t: ops.sparse_attention(*_qkv(t, dim), columns, impl="fused"),
            lambda t: exact.clipped(*_qkv(t, dim), seen, None),
        )

    return Case(f"sparse {queries}/{keys} tokens B{batch} heads {heads} dim {dim} budget {budget}", dtype, make)


def reversed_(tokens: int, heads: int, dim: int, *, batch: int = 2, dtype: torch.dtype = BF16) -> Case:
    def make(device: str) -> Made:
        leaves = _tokens(batch, tokens, tokens, heads, dim, dim, device, dtype)
        return Made(
            [*leaves, normal(batch, tokens, heads, device=device, dtype=dtype)],
            lambda t: ops.reversed_attention(*_qkv(t, dim), t[2], impl="fused"),
            lambda t: exact.reversed_attention(*_qkv(t, dim), t[2]),
        )

    return Case(f"reversed {tokens} tokens B{batch} heads {heads} dim {dim}", dtype, make)


def clipped_window(
    shape: tuple[int, ...], size: Pair, shift: Pair, clip: Clip, *, gate: bool = False, dtype: torch.dtype = BF16
) -> Case:
    batch, height, width, heads, dim = shape

    def make(device: str) -> Made:
        leaves = _tokens(batch, height * width, height * width, heads, dim, dim, device, dtype)
        leaves += [normal(batch, height, width, heads, device=device, dtype=dtype)] if gate else []

        def ours(t: list[Tensor]) -> Tensor:
            q, k, v = (x.unflatten(1, (height, width)) for x in _qkv(t, dim))
            return ops.window_attention(
                q, k, v, size, shift=shift, clip=clip, gate=t[2] if gate else None, impl="fused"
            )

        def definition(t: list[Tensor]) -> Tensor:
            seen = exact.same_window((height, width), size, shift, t[0].device)
            out = exact.clipped(*_qkv(t, dim), seen, clip).unflatten(1, (height, width))
            return out * t[2][..., None] if gate else out

        return Made(leaves, ours, definition)

    words = f"window {size} shift {shift} clip {clip}{' gate' if gate else ''}"
    return Case(f"window {height}x{width} B{batch} heads {heads} dim {dim} {words}", dtype, make)


def agent(
    batch: int,
    queries: int,
    keys: int,
    agents: int,
    heads: int,
    dim: int,
    *,
    biases: bool = True,
    dtype: torch.dtype = BF16,
) -> Case:
    def make(device: str) -> Made:
        packed = normal(batch, keys, 2, heads, dim, device=device, dtype=dtype)
        q, few = (normal(batch, n, heads, dim, device=device, dtype=dtype) for n in (queries, agents))
        leaves = [q, packed, few]
        if biases:
            leaves += [normal(heads, *pair, device=device) for pair in ((agents, keys), (queries, agents))]

        def split(t: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
            return [t[0], t[1][:, :, 0], t[1][:, :, 1], t[2]], list(t[3:]) if biases else [None, None]

        def ours(t: list[Tensor]) -> Tensor:
            tokens, (to, of) = split(t)
            return ops.agent_attention(*tokens, bias_to=to, bias_from=of, impl="fused")

        def definition(t: list[Tensor]) -> Tensor:
            tokens, given = split(t)
            return exact.agent(*tokens, *given)

        return Made(leaves, ours, definition)

    words = f"{queries} to {keys} B{batch} heads {heads} dim {dim}"
    return Case(f"agent {agents} {words}{' biases' if biases else ''}", dtype, make)


def aggregated(
    batch: int, size: Pair, pooled: Pair, heads: int, dim: int, *, kernel: Pair = (3, 3), dtype: torch.dtype = BF16
) -> Case:
    """A map with its pooled keys, and the tables of a layer in float32."""
    table = (2 * size[0] - 1, 2 * size[1] - 1)

    def make(device: str) -> Made:
        packed = normal(batch, *size, 3, heads, dim, device=device, dtype=dtype)
        few = normal(batch, pooled[0] * pooled[1], 2, heads, dim, device=device, dtype=dtype)
        near = kernel[0] * kernel[1]
        shapes = ((heads, dim), (heads,), (heads, *table), (heads, *kernel), (heads, dim, near), (heads, near))
        leaves = [packed, few, *(normal(*shape, device=device) for shape in shapes)]
        places = [
            torch.arange(side * few_of_axis, device=device).view(side, few_of_axis) % top
            for side, few_of_axis, top in zip(size, pooled, table, strict=True)
        ]

        def named(t: list[Tensor]) -> dict[str, Tensor]:
            (q, k, v), (pooled_k, pooled_v) = t[0].unbind(3), t[1].unbind(2)
            found = dict(
                zip(("embedding", "temperature", "table", "local_bias", "tokens", "token_bias"), t[2:], strict=True)
            )
            found["temperature"] = found["temperature"].abs() + 0.5
            return found | {"q": q, "local_k": k, "local_v": v, "pooled_k": pooled_k, "pooled_v": pooled_v}

        def ours(t: list[Tensor]) -> Tensor:
            given = named(t)
            given["pooled_bias"] = given.pop("table")
            return ops.aggregated_attention(**given, bias_rows=places[0], bias_cols=places[1], impl="fused")

        def definition(t: list[Tensor]) -> Tensor:
            return exact.aggregated(**named(t), rows=places[0], cols=places[1])

        return Made(leaves, ours, definition)

    return Case(f"aggregated {size} pooled {pooled} B{batch} heads {heads} dim {dim} kernel {kernel}", dtype, make)


def _tokens(batch: int, queries: int, keys: int, heads: int, dim: int, value_dim: int, device, dtype) -> list[Tensor]:
    """Queries, and keys with values: two leaves."""
    sizes = (batch, queries, heads, dim), (batch, keys, heads, dim + value_dim)
    return [normal(*size, device=device, dtype=dtype) for size in sizes]


def _qkv(t: list[Tensor], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return t[0], t[1][..., :dim], t[1][..., dim:]


def small_cases() -> list[Case]:
    """One small call of every op, for the interpreter."""
    low: dict[str, Any] = {"batch": 1, "dtype": FP16}
    return [
        dense(9, 20, 1, 16, 24, clip=(-0.05, 1.0), mask=True, gate=True, **low),
        sparse(9, 40, 1, 16, 5, **low),
        reversed_(21, 1, 16, **low),
        clipped_window((1, 6, 8, 1, 16), (3, 4), (1, 2), (-0.05, 1.0), gate=True, dtype=FP16),
        aggregated(1, (5, 6), (2, 3), 2, 16, dtype=FP16),
        agent(2, 20, 33, 9, 1, 16, dtype=FP16),
        agent(1, 17, 9, 4, 2, 24, biases=False, dtype=FP32),
    ]


def full_cases() -> list[Case]:
    """Layers of the families whose attention is on tokens, wide heads, and float32."""
    return [
        dense(197, 197, 6, 64, 64, clip=(-0.003, 1.0), gate=True),
        dense(197, 197, 6, 64, 64, clip=(-0.003, 1.0), dtype=FP16),
        dense(50, 130, 2, 24, 40, mask=True, dtype=FP32),
        dense(197, 197, 2, 128, 128, gate=True, mask=True),
        sparse(197, 197, 6, 64, 50),
        sparse(1024, 1024, 3, 64, 21, dtype=FP16),
        reversed_(196, 12, 16),
        reversed_(196, 12, 32, dtype=FP32),
        clipped_window((4, 56, 56, 3, 32), (7, 7), (3, 3), (-0.02, 1.0)),
        clipped_window((2, 48, 48, 4, 32), (12, 12), (0, 0), (-0.01, 1.01), gate=True, dtype=FP16),
        aggregated(4, (56, 56), (7, 7), 3, 24),
        aggregated(4, (14, 14), (7, 7), 12, 24, dtype=FP16),
        agent(8, 197, 197, 49, 3, 64),
        agent(8, 197, 197, 81, 12, 64, dtype=FP16),
        agent(4, 3136, 3136, 9, 3, 32),
        agent(128, 3136, 3136, 9, 3, 32),
        agent(4, 3136, 784, 16, 2, 64),
        agent(2, 4000, 4000, 784, 2, 64),
        agent(2, 1000, 1100, 144, 2, 128),
        agent(2, 400, 333, 49, 2, 40, biases=False),
        agent(2, 500, 600, 49, 2, 64, dtype=FP32),
    ]
