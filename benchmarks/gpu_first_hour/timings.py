"""Part b: layers of published models and the gates, forward and with backward, beside what else computes them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import attention_ops as ops
from . import definitions as exact
from .cases import gate
from .clock import Call, Clock
from .inputs import FP32, normal
from .session import Session, first_line, say

MOST_SECONDS = 170.0
FLEX_SECONDS = 150.0  # that must be left before FlexAttention is compiled
MAPS_MOVED = {"forward": 4, "both": 12}  # q, k, v, out; and q, k, v, out, grad, dq, dk, dv


@dataclass(frozen=True)
class Layer:
    """One attention layer on a side x side map. `size`: kernel, window, radius, block or topk."""

    op: str
    name: str
    batch: int
    side: int
    heads: int
    dim: int
    size: object = None
    table: bool = False
    dilation: tuple[int, int] = (1, 1)
    flex: bool = False


@dataclass
class Calls:
    """The fused body of a layer, its peers, and the tensors that get gradients."""

    ours: Call
    leaves: list[Tensor]
    peers: dict[str, Call] = field(default_factory=dict)


def layers(batch: int) -> list[Layer]:
    few, half, seven = max(batch // 8, 1), max(batch // 2, 1), (7, 7)
    return [
        Layer("neighborhood", "NAT-T stage 1", batch, 56, 2, 32, seven, True, flex=True),
        Layer("neighborhood", "NAT-T stage 2", batch, 28, 4, 32, seven, True),
        Layer("neighborhood", "NAT-T stage 3", batch, 14, 8, 32, seven, True, flex=True),
        Layer("neighborhood", "NAT-T stage 4", batch, 7, 16, 32, seven, True),
        Layer("neighborhood", "NAT-T stage 1, no bias", batch, 56, 2, 32, seven),
        Layer("neighborhood", "DiNAT-T stage 1, dilation 8", batch, 56, 2, 32, seven, True, (8, 8)),
        Layer("neighborhood", "NAT-T at 512 px, stage 1", few, 128, 2, 32, seven, True),
        Layer("neighborhood", "NAT-T stage 1", 1, 56, 2, 32, seven, True),
        Layer("neighborhood", "NAT-T stage 3", 1, 14, 8, 32, seven, True),
        Layer("neighborhood", "kernel 13, 64x64", few, 64, 4, 64, (13, 13)),
        Layer("window", "DaViT-T stage 1", batch, 56, 3, 32, seven),
        Layer("window", "DaViT-T stage 3", batch, 14, 12, 32, seven),
        Layer("window", "Swin-T stage 1", batch, 56, 3, 32, seven, True, flex=True),
        Layer("window", "LITv2 stage 1, 2x2", batch, 56, 1, 32, (2, 2)),
        Layer("window", "DaViT-T stage 3", 1, 14, 12, 32, seven),
        Layer("circle", "CLEAR, radius 8", few, 64, 4, 64, 8, flex=True),
        Layer("halo", "HaloNet-H1, 8 + 3", half, 64, 4, 16, (8, 8), True),
        Layer("routed", "BiFormer stage 1, topk 1", batch, 56, 2, 32, 1),
        Layer("routed", "BiFormer stage 2, topk 4", batch, 28, 4, 32, 4),
        Layer("routed", "BiFormer stage 3, topk 16", batch, 14, 8, 32, 16),
        Layer("channel", "DaViT-T stage 1", batch, 56, 3, 32),
        Layer("channel", "DaViT-T stage 3", batch, 14, 12, 32),
    ]


def small_layers() -> list[Layer]:
    """One layer of every op, for the interpreter."""
    return [
        Layer("neighborhood", "small", 1, 9, 1, 16, (3, 3), True),
        Layer("window", "small", 1, 14, 1, 16, (7, 7), True),
        Layer("circle", "small", 1, 9, 1, 16, 2),
        Layer("halo", "small", 1, 9, 1, 16, (4, 4), True),
        Layer("routed", "small", 1, 7, 1, 16, 4),
        Layer("channel", "small", 1, 9, 1, 16),
    ]


def timings(session: Session, clock: Clock) -> None:
    bandwidth = clock.bytes_per_second()
    session.results["bandwidth"], session.results["b"] = bandwidth, []
    say(f"\n== b: {session.low}, copies at {bandwidth / 1e12:.2f} TB/s. Times of ours in us; floor: least bytes over")
    say("   copy bandwidth, in % of gpu; peers: their GPU time over ours, above 1 ours is faster")
    say(f"   {'layer':44s} {'pass':8s} {'gpu':>8s} {'eager':>8s} {'floor':>6s}  peers")
    deadline = time.perf_counter() + min(MOST_SECONDS, session.left() * 0.5)
    for layer in layers(session.batch) if session.gpu else small_layers():
        if time.perf_counter() > deadline:
            say("   out of time: the other layers are left out")
            break
        try:
            _time_layer(layer, session, clock, bandwidth, deadline)
        except Exception as error:
            say(f"   {layer.op} {layer.name}: RAISED {first_line(error)}")
    _time_gates(session, clock, bandwidth, deadline)


def _time_layer(layer: Layer, session: Session, clock: Clock, bandwidth: float, deadline: float) -> None:
    torch.manual_seed(0)
    shape = (layer.batch, layer.side, layer.side, 3, layer.heads, layer.dim)
    packed = normal(*shape, device=session.device, dtype=session.low).requires_grad_()
    q, k, v = packed.unbind(3)
    made: Calls = MAKERS[layer.op](layer, q, k, v)
    leaves = [packed, *made.leaves]
    if session.gpu and session.compiles and layer.flex and session.left() > FLEX_SECONDS:
        made.peers["flex"] = _flex(layer, q, k, v, *made.leaves)
    for direction, moved in MAPS_MOVED.items():
        run = _forward if direction == "forward" else partial(_both, leaves=leaves)
        floor = moved * q.numel() * q.element_size() / bandwidth * 1e6
        peers = {n: c for n, c in made.peers.items() if direction == "forward" or n != "routes alone"}
        _report(
            f"{layer.op} {layer.name} B{layer.batch}", direction, made.ours, peers, run, floor, session, clock, deadline
        )


def _report(
    name: str, direction: str, ours: Call, peers: dict[str, Call], run: Callable, floor: float, session, clock, deadline
) -> None:
    gpu, why = clock.gpu_us(run(ours))
    eager = clock.eager_us(run(ours))
    row = {"name": name, "direction": direction, "ours": gpu, "eager": eager, "peers": {}}
    words = []
    for peer, call in peers.items():
        if time.perf_counter() > deadline + 20:
            break
        try:
            us = clock.events_us(run(call)) if peer == "flex" else clock.gpu_us(run(call))[0]
            row["peers"][peer] = us
            words.append(f"{peer} {us / gpu:.2f}")
        except Exception as error:
            words.append(f"{peer}: {type(error).__name__}")
            if session.gpu:
                torch.cuda.empty_cache()
    session.results["b"].append(row)
    captured = f"  not captured: {why}" if why else ""
    words = "; ".join(words)
    say(f"   {name:44s} {direction:8s} {gpu:8.1f} {eager:8.1f} {100 * floor / gpu:5.0f}%  {words}{captured}")


def _forward(call: Call) -> Call:
    def step() -> None:
        with torch.no_grad():
            call()

    return step


def _both(call: Call, leaves: list[Tensor]) -> Call:
    def step() -> None:
        out = call()
        torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)  # a peer may have no bias

    return step


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(exact.by_head(t) for t in (q, k, v)))


def _neighborhood(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    kernel, side = layer.size, layer.side
    cells = (layer.heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    rpb = normal(*cells, device=q.device).requires_grad_() if layer.table else None

    def attend(impl: str) -> Tensor:
        return ops.neighborhood_attention(q, k, v, kernel, layer.dilation, rpb=rpb, impl=impl)

    made = Calls(partial(attend, "fused"), [] if rpb is None else [rpb])
    made.peers = {"tiled": partial(attend, "tiled"), "dense sdpa (no mask)": partial(_dense, q, k, v)}
    if side <= 28:
        seen, cell = exact.neighborhood_masks((side, side), kernel, layer.dilation, (False, False), q.device)

        def masked() -> Tensor:
            zero = torch.zeros((), dtype=q.dtype, device=q.device)
            bias = zero if rpb is None else rpb.to(q.dtype).flatten(1)[:, cell]
            mask = torch.where(seen, bias, -torch.inf)[None if rpb is not None else ...]
            return F.scaled_dot_product_attention(*(exact.by_head(t) for t in (q, k, v)), attn_mask=mask)

        made.peers["sdpa with a mask"] = masked
    try:
        import natten
    except ImportError:
        return made
    for backend in ("hopper-fna", "cutlass-fna"):
        made.peers[f"natten {backend} (no bias)"] = partial(
            natten.na2d, q, k, v, kernel_size=kernel, dilation=layer.dilation, backend=backend
        )
    return made


def _window(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    (rows, cols), batch, side = layer.size, layer.batch, layer.side
    tokens = rows * cols
    bias = normal(layer.heads, tokens, tokens, device=q.device).requires_grad_() if layer.table else None

    def cut(x: Tensor) -> Tensor:  # (B * windows, heads, tokens, d)
        x = x.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(-1, layer.heads, tokens, layer.dim)

    def composed() -> Tensor:
        mask = None if bias is None else bias.to(q.dtype)[None]
        out = F.scaled_dot_product_attention(*(cut(t) for t in (q, k, v)), attn_mask=mask)
        out = out.view(batch, side // rows, side // cols, layer.heads, rows, cols, layer.dim)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(q.shape)

    ours = partial(ops.window_attention, q, k, v, layer.size, bias=bias, impl="fused")
    return Calls(ours, [] if bias is None else [bias], {"sdpa on windows": composed})


def _circle(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    ours = partial(ops.circle_attention, q, k, v, layer.size, impl="fused")
    return Calls(ours, [], {"dense sdpa (no mask)": partial(_dense, q, k, v)})


def _halo(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    reach = 3
    tables = [
        normal(2 * (block + 2 * reach) - 1, layer.dim, device=q.device, factor=0.2).requires_grad_()
        for block in layer.size
    ]

    def attend(impl: str) -> Tensor:
        return ops.halo_attention(q, k, v, layer.size, reach, rel_h=tables[0], rel_w=tables[1], impl=impl)

    return Calls(partial(attend, "fused"), tables, {"tiled": partial(attend, "tiled")})


def _routed(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    region = (max(layer.side // 7, 1),) * 2
    choose = partial(ops.bi_level_routes, q, k, region_size=region, topk=layer.size)
    routes = choose()
    peers = {
        "gathered keys": partial(exact.routed, q, k, v, routes, region, region),
        "dense sdpa (no mask)": partial(_dense, q, k, v),
        "routes alone": choose,
    }
    return Calls(partial(ops.routed_attention, q, k, v, routes, region_size=region, impl="fused"), [], peers)


def _channel(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Calls:
    ours = partial(ops.channel_attention, q, k, v, impl="fused")
    return Calls(ours, [], {"einsum": partial(exact.channel, q, k, v)})


MAKERS = {
    "neighborhood": _neighborhood,
    "window": _window,
    "circle": _circle,
    "halo": _halo,
    "routed": _routed,
    "channel": _channel,
}


def _flex(layer: Layer, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Call:
    """Return a call of compiled FlexAttention with the mask and the bias of the layer."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    side, size = layer.side, layer.size
    if layer.op == "neighborhood":
        seen, cell = exact.neighborhood_masks((side, side), size, layer.dilation, (False, False), q.device)
    else:
        y, x = (t.flatten() for t in torch.meshgrid(*[torch.arange(side, device=q.device)] * 2, indexing="ij"))
        if layer.op == "window":
            window, place = y // size[0] * side + x // size[1], y % size[0] * size[1] + x % size[1]
            seen, cell = window[:, None] == window, place[:, None] * (size[0] * size[1]) + place
        else:
            seen, cell = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < size * size, None
    flat = None if table is None else table.flatten(1)
    score = None if flat is None else (lambda logit, b, h, i, j: logit + flat[h, cell[i, j]])
    blocks = create_block_mask(lambda b, h, i, j: seen[i, j], None, None, side * side, side * side, device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(*(exact.by_head(t) for t in (q, k, v)), score_mod=score, block_mask=blocks)


GATES = (
    ("channel_gate", 256, 56),
    ("channel_gate", 2048, 7),
    ("strip_gate", 256, 56),
    ("strip_gate", 1024, 14),
    ("large_kernel", 64, 56),
    ("large_kernel", 320, 14),
)
SMALL_GATES = (("channel_gate", 16, 6), ("strip_gate", 16, 6), ("large_kernel", 16, 6))


def _time_gates(session: Session, clock: Clock, bandwidth: float, deadline: float) -> None:
    for op, channels, side in GATES if session.gpu else SMALL_GATES:
        if time.perf_counter() > deadline + 25:
            break
        batch = session.batch if session.gpu else 1
        case = gate(op, (batch, channels, side, side), dtype=session.low)
        try:
            made = case.make(session.device)
            leaves = [t.to(session.low) if t.dtype == FP32 else t for t in made.leaves]
            for direction in ("forward", "both"):
                grad = direction == "both"
                few = [t.detach().requires_grad_(grad) for t in leaves]
                run = partial(_both, leaves=few) if grad else _forward
                moved = (2 if op == "large_kernel" else 3) + (4 if grad else 0)
                floor = moved * leaves[0].numel() * leaves[0].element_size() / bandwidth * 1e6
                peers = {"plain torch": partial(made.exact, few)}
                _report(case.name, direction, partial(made.ours, few), peers, run, floor, session, clock, deadline)
        except Exception as error:
            say(f"   {case.name}: RAISED {first_line(error)}")
