"""Calls of every op with a fused body, and their definitions: layers of published models, odd sizes, strided views."""

import torch
from torch import Tensor

from ... import attention_ops as ops
from . import definitions as exact
from . import token_cases
from .inputs import BF16, FP16, FP32, Case, Made, Pair, normal, qkv


def neighborhood(
    shape: tuple[int, ...],
    kernel: Pair,
    dilation: Pair = (1, 1),
    *,
    rpb: bool = True,
    dtype: torch.dtype = BF16,
    layout: str = "packed",
    causal: tuple[bool, bool] = (False, False),
    stride: Pair = (1, 1),
    lse: bool = False,
    factor: float = 1.0,
) -> Case:
    op = "neighborhood_attention_lse" if lse else "neighborhood_attention"

    def make(device: str) -> Made:
        leaves, view = qkv(layout, shape, device, dtype, factor)
        maps = len(leaves)
        if rpb:
            leaves.append(normal(shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1, device=device))
        return Made(
            leaves,
            lambda t: _joined(
                getattr(ops, op)(
                    *view(t[:maps]),
                    kernel,
                    dilation,
                    stride=stride,
                    rpb=t[maps] if rpb else None,
                    is_causal=causal,
                    impl="fused",
                )
            ),
            lambda t: _joined(
                getattr(exact, op)(*view(t[:maps]), kernel, dilation, t[maps] if rpb else None, causal, stride)
            ),
        )

    words = (" rpb" if rpb else "") + (" causal" if any(causal) else "") + (f" x{factor:g}" if factor != 1 else "")
    words += f" stride {stride}" if stride != (1, 1) else ""
    name = op.removesuffix("_attention")
    return Case(f"{name} {_of(shape)} kernel {kernel} dilation {dilation}{words} {layout}", dtype, make)


def _joined(results: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """An output with its log-sum-exp as one more channel, or an output without one."""
    if isinstance(results, Tensor):
        return results
    out, lse = results
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


def window(
    shape: tuple[int, ...],
    size: Pair,
    *,
    bias: bool = True,
    dtype: torch.dtype = BF16,
    layout: str = "packed",
    lse: bool = False,
) -> Case:
    op = "window_attention_lse" if lse else "window_attention"

    def make(device: str) -> Made:
        leaves, view = qkv(layout, shape, device, dtype)
        maps, tokens = len(leaves), size[0] * size[1]
        if bias:
            leaves.append(normal(shape[3], tokens, tokens, device=device))
        return Made(
            leaves,
            lambda t: _joined(getattr(ops, op)(*view(t[:maps]), size, bias=t[maps] if bias else None, impl="fused")),
            lambda t: _joined(getattr(exact, op)(*view(t[:maps]), size, t[maps] if bias else None)),
        )

    name = op.removesuffix("_attention")
    return Case(f"{name} {_of(shape)} window {size}{' bias' if bias else ''} {layout}", dtype, make)


def circle(shape: tuple[int, ...], radius: int, *, dtype: torch.dtype = BF16, lse: bool = False) -> Case:
    op = "circle_attention_lse" if lse else "circle_attention"

    def make(device: str) -> Made:
        leaves, view = qkv("packed", shape, device, dtype)
        return Made(
            leaves,
            lambda t: _joined(getattr(ops, op)(*view(t), radius, impl="fused")),
            lambda t: _joined(getattr(exact, "circle_lse" if lse else "circle")(*view(t), radius)),
        )

    return Case(f"{op.removesuffix('_attention')} {_of(shape)} radius {radius}", dtype, make)


def halo(
    shape: tuple[int, ...],
    value_dim: int,
    block: Pair,
    reach: Pair,
    stride: int = 1,
    *,
    tables: bool = True,
    dtype: torch.dtype = BF16,
    lse: bool = False,
) -> Case:
    batch, height, width, heads, dim = shape
    op = "halo_attention_lse" if lse else "halo_attention"

    def make(device: str) -> Made:
        queries = (batch, -(-height // stride), -(-width // stride), heads, dim)
        keys = (batch, height, width, heads, dim + value_dim)
        leaves = [normal(*s, device=device, dtype=dtype) for s in (queries, keys)]
        if tables:
            seen = [size + 2 * r for size, r in zip(block, reach, strict=True)]
            leaves += [normal(2 * s - 1, dim, device=device, factor=dim**-0.5) for s in seen]

        def split(t: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
            return [t[0], t[1][..., :dim], t[1][..., dim:]], list(t[2:]) if tables else [None, None]

        def ours(t: list[Tensor]) -> Tensor:
            maps, (rel_h, rel_w) = split(t)
            relative = {"rel_h": rel_h, "rel_w": rel_w}
            return _joined(getattr(ops, op)(*maps, block, reach, stride=stride, **relative, impl="fused"))

        def definition(t: list[Tensor]) -> Tensor:
            maps, relative = split(t)
            return _joined(getattr(exact, "halo_lse" if lse else "halo")(*maps, block, reach, stride, *relative))

        return Made(leaves, ours, definition)

    words = f"block {block} halo {reach} stride {stride}{' tables' if tables else ''}"
    return Case(f"{op.removesuffix('_attention')} {_of(shape)}/{value_dim} {words}", dtype, make)


def routed(
    batch: int,
    grid: Pair,
    region: Pair,
    heads: int,
    dim: int,
    value_dim: int,
    topk: int,
    *,
    key_region: Pair | None = None,
    hub: bool = False,
    dtype: torch.dtype = BF16,
) -> Case:
    """`hub`: all regions are routed to the same ones."""
    sizes = {"region_size": region, "kv_region_size": key_region or region}

    def make(device: str) -> Made:
        count = grid[0] * grid[1]
        drawn = torch.rand(batch, count, count, device=device).topk(topk).indices
        routes = torch.arange(topk, device=device).expand(batch, count, topk) if hub else drawn
        shapes = [(batch, grid[0] * size[0], grid[1] * size[1], heads) for size in sizes.values()]
        leaves = [
            normal(*shapes[0], dim, device=device, dtype=dtype),
            normal(*shapes[1], dim + value_dim, device=device, dtype=dtype),
        ]

        def maps(t: list[Tensor]) -> tuple[Tensor, ...]:
            return t[0], t[1][..., :dim], t[1][..., dim:], routes

        return Made(
            leaves,
            lambda t: ops.routed_attention(*maps(t), **sizes, impl="fused"),
            lambda t: exact.routed(*maps(t), *sizes.values()),
        )

    words = f"B{batch} heads {heads} dim {dim}/{value_dim} regions {region}/{key_region or region}"
    return Case(f"routed {grid[0]}x{grid[1]} {words} topk {topk}{' hub' if hub else ''}", dtype, make)


def channel(
    shape: tuple[int, ...], *, by_tokens: bool = False, dtype: torch.dtype = BF16, layout: str = "packed"
) -> Case:
    def make(device: str) -> Made:
        leaves, view = qkv(layout, shape, device, dtype)
        scale = (shape[1] * shape[2]) ** -0.5 if by_tokens else None
        return Made(
            leaves,
            lambda t: ops.channel_attention(*view(t), scale=scale, impl="fused"),
            lambda t: exact.channel(*view(t), scale),
        )

    return Case(f"channel {_of(shape)} {layout}{' by tokens' if by_tokens else ''}", dtype, make)


def gate(
    op: str,
    shape: tuple[int, int, int, int],
    *,
    layout: str = "nhwc",
    norm_groups: int = 16,
    group_channels: int = 1,
    dtype: torch.dtype = BF16,
) -> Case:
    """One of "channel_gate", "strip_gate" and "large_kernel"; layout: "nhwc", "nchw" or "crop"."""
    batch, channels, height, width = shape

    def cut(x: Tensor) -> Tensor:
        return x[..., 1:-1] if layout == "crop" else x

    def make(device: str) -> Made:
        def draw(*sizes: int, factor: float = 1.0, dtype: torch.dtype = FP32) -> Tensor:
            return normal(*sizes, device=device, factor=factor, dtype=dtype)

        x = draw(batch, channels, height, width + (2 if layout == "crop" else 0), dtype=dtype)
        if layout == "nhwc":
            x = x.contiguous(memory_format=torch.channels_last)
        if op == "channel_gate":
            return Made(
                [x, draw(1, 1, 5)],
                lambda t: ops.channel_gate(cut(t[0]), t[1], impl="fused"),
                lambda t: exact.channel_gate(cut(t[0]), t[1]),
            )
        if op == "strip_gate":
            return Made(
                [x, draw(channels, group_channels, 7), draw(channels), draw(channels)],
                lambda t: ops.strip_gate(cut(t[0]), t[1], t[2], t[3], norm_groups, impl="fused"),
                lambda t: exact.strip_gate(cut(t[0]), t[1], t[2], t[3], norm_groups),
            )
        weights = []
        for sizes, factor in (((1, 5, 5), 0.2), ((1, 7, 7), 0.15), ((channels, 1, 1), channels**-0.5)):
            weights += [draw(channels, *sizes, factor=factor, dtype=dtype), draw(channels, dtype=dtype)]
        return Made(
            [x, *weights],
            lambda t: ops.large_kernel_attention(cut(t[0]), *t[1:], 3, impl="fused"),
            lambda t: exact.large_kernel(cut(t[0]), *t[1:], 3),
        )

    name = f"{op} B{batch} {channels}x{height}x{width} {layout}"
    return Case(name, dtype, make)


def _of(shape: tuple[int, ...]) -> str:
    batch, height, width, heads, dim = shape
    return f"{height}x{width} B{batch} heads {heads} dim {dim}"


def small_cases() -> list[Case]:
    """One small call of every op, for the interpreter."""
    low = {"dtype": FP16}
    return [
        neighborhood((1, 9, 11, 2, 16), (3, 4), (2, 1), dtype=FP16),
        neighborhood((1, 8, 9, 1, 24), (5, 3), dtype=FP32, layout="crop"),
        neighborhood((1, 7, 7, 1, 16), (3, 3), layout="expanded", **low),
        neighborhood((1, 9, 12, 1, 16), (4, 5), (1, 2), causal=(True, False), stride=(3, 4), lse=True, dtype=FP16),
        window((1, 14, 7, 1, 16), (7, 7), **low),
        window((1, 8, 6, 1, 16), (4, 3), lse=True, dtype=FP16),
        circle((1, 7, 9, 1, 16), 3, dtype=FP16),
        circle((1, 6, 5, 1, 16), 2, lse=True, dtype=FP16),
        halo((1, 9, 8, 1, 16), 24, (4, 4), (1, 2), dtype=FP16),
        halo((1, 7, 6, 1, 16), 16, (4, 4), (1, 1), 2, lse=True, dtype=FP16),
        routed(2, (2, 3), (3, 2), 1, 16, 8, 3, key_region=(2, 2), **low),
        channel((1, 6, 5, 2, 16), **low),
        channel((2, 7, 1, 1, 16), layout="crop", **low),
        gate("channel_gate", (2, 12, 5, 4), **low),
        gate("channel_gate", (2, 6, 5, 1), layout="crop", **low),
        gate("strip_gate", (2, 16, 6, 5), norm_groups=4, **low),
        gate("strip_gate", (1, 8, 6, 1), layout="crop", norm_groups=4, **low),
        gate("large_kernel", (1, 16, 7, 6), **low),
        *token_cases.small_cases(),
    ]


def full_cases() -> list[Case]:
    """Layers of published models in 16 bits, wide heads, float32, odd maps, and every memory layout."""
    of_maps = [*_neighborhoods(), *_windows_and_circles(), *_halos(), *_routed(), *_channels_and_gates()]
    return [*of_maps, *token_cases.full_cases()]


def _neighborhoods() -> list[Case]:
    seven = (7, 7)
    map_2 = (2, 30, 32, 2, 32)
    return [
        neighborhood((4, 56, 56, 2, 32), seven),
        neighborhood((4, 28, 28, 4, 32), seven, dtype=FP16),
        neighborhood((8, 14, 14, 8, 32), seven),
        neighborhood((8, 7, 7, 16, 32), seven),
        neighborhood((2, 56, 56, 2, 32), seven, (8, 8)),
        neighborhood((2, 28, 28, 4, 32), seven, (4, 4), dtype=FP16),
        neighborhood((2, 45, 61, 2, 32), (5, 8), (3, 2)),
        neighborhood((1, 33, 40, 3, 64), (13, 6), rpb=False),
        neighborhood((2, 31, 29, 2, 128), seven, rpb=False),
        neighborhood((2, 24, 26, 2, 128), seven),
        neighborhood((2, 30, 30, 5, 24), seven),
        neighborhood((2, 30, 30, 3, 40), seven, rpb=False),
        neighborhood((1, 30, 30, 2, 80), (9, 9)),
        neighborhood((1, 20, 21, 2, 33), (3, 3), dtype=FP32),
        neighborhood((2, 56, 56, 2, 32), seven, dtype=FP32),
        neighborhood((1, 40, 40, 2, 64), seven, dtype=FP32, rpb=False),
        neighborhood((1, 26, 26, 1, 128), seven, dtype=FP32),
        *(neighborhood(map_2, seven, layout=layout) for layout in ("heads first", "nchw", "crop", "expanded")),
        neighborhood(map_2, (6, 5), causal=(True, False), rpb=False),
        neighborhood(map_2, seven, causal=(True, True), lse=True),
        neighborhood(map_2, (8, 6), (2, 1), stride=(4, 6), rpb=False, lse=True, dtype=FP16),
        neighborhood((2, 42, 35, 2, 32), seven, stride=seven),
        neighborhood(map_2, (1, 1)),
        neighborhood((1, 64, 64, 1, 16), (33, 33), rpb=False),
        neighborhood(map_2, seven, factor=30.0, dtype=FP32),
        neighborhood((2, 14, 14, 2, 8), seven),
    ]


def _windows_and_circles() -> list[Case]:
    return [
        window((4, 56, 56, 3, 32), (7, 7), bias=False),
        window((4, 56, 56, 3, 32), (7, 7)),
        window((4, 48, 48, 4, 32), (12, 12), dtype=FP16),
        window((4, 56, 56, 2, 32), (2, 2), bias=False),
        window((2, 32, 32, 2, 64), (16, 16)),
        window((2, 36, 40, 2, 96), (4, 5), layout="crop"),
        window((2, 28, 28, 2, 32), (7, 7), dtype=FP32),
        window((2, 28, 28, 2, 32), (7, 7), lse=True),
        circle((1, 40, 44, 2, 64), 8),
        circle((2, 20, 23, 2, 32), 3, dtype=FP16),
        circle((1, 24, 24, 1, 128), 6),
        circle((2, 20, 23, 2, 32), 5, lse=True),
    ]


def _halos() -> list[Case]:
    eight, three = (8, 8), (3, 3)
    return [
        halo((2, 64, 64, 4, 16), 16, eight, three),
        halo((2, 32, 32, 4, 16), 48, eight, three, 2),
        halo((2, 40, 50, 2, 64), 64, (7, 8), (2, 4), tables=False),
        halo((1, 33, 30, 2, 128), 128, eight, three),
        halo((2, 30, 30, 2, 32), 32, (8, 4), (3, 5), dtype=FP16),
        halo((1, 24, 24, 2, 32), 32, eight, three, dtype=FP32),
        halo((2, 24, 31, 2, 32), 48, eight, three, 2, lse=True, dtype=FP16),
    ]


def _routed() -> list[Case]:
    seven = (7, 7)
    return [
        routed(4, seven, (8, 8), 2, 32, 32, 1),
        routed(4, seven, (4, 4), 4, 32, 32, 4),
        routed(8, seven, (2, 2), 8, 32, 32, 16),
        routed(4, seven, (8, 8), 2, 32, 32, 4, hub=True),
        routed(2, (5, 4), (6, 7), 2, 48, 96, 5, key_region=(3, 2)),
        routed(2, seven, seven, 2, 64, 64, 4, dtype=FP16),
        routed(2, seven, (8, 8), 1, 128, 128, 4),
        routed(2, seven, (8, 8), 2, 32, 32, 4, dtype=FP32),
        routed(2, (20, 20), (1, 1), 2, 32, 32, 9, hub=True),
    ]


def _channels_and_gates() -> list[Case]:
    return [
        channel((4, 56, 56, 3, 32)),
        channel((4, 14, 14, 12, 32), dtype=FP16),
        channel((2, 40, 30, 2, 64), layout="nchw"),
        channel((2, 33, 31, 2, 128), by_tokens=True),
        channel((2, 20, 21, 3, 24), layout="crop", dtype=FP32),
        channel((2, 50, 1, 2, 32), layout="crop"),
        gate("channel_gate", (4, 256, 56, 56)),
        gate("channel_gate", (4, 130, 17, 19), layout="nchw"),
        gate("channel_gate", (2, 64, 40, 1), layout="crop"),
        gate("strip_gate", (4, 256, 56, 56)),
        gate("strip_gate", (2, 96, 31, 33), norm_groups=8, group_channels=8, layout="nchw", dtype=FP16),
        gate("strip_gate", (2, 64, 40, 1), layout="crop"),
        gate("large_kernel", (2, 64, 56, 56)),
        gate("large_kernel", (2, 160, 14, 14), layout="nchw"),
        gate("large_kernel", (1, 48, 30, 31), layout="nchw", dtype=FP32),
        gate("large_kernel", (1, 512, 9, 9)),
    ]
