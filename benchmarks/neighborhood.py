"""Neighborhood attention on a CPU: the tiled body beside plain gather, dense attention and NATTEN, in one process.

    python -m foveate.benchmarks.neighborhood --batch 8 --threads 2

Shapes     The stages of NAT-Mini and DiNAT-Mini at 224 px (56x56 with 2 heads ... 7x7 with 16), 32 channels a head.
Gather     The reference body: every query copies its own keys and values, as plain PyTorch code does.
Dense      scaled_dot_product_attention of all tokens to all tokens, without bias or mask: another function, and the
           fastest that a user without neighborhood attention would call.
NATTEN     Its own choice of backend, without bias (it has none), where the package can be imported; else a dash.
Ratios     Time of the peer over time of the tiled body: above 1 the tiled body is faster.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from ..attention_ops import neighborhood_attention
from ._timing import describe_machine, interleaved_seconds, write_report

KERNEL = 7
HEAD_DIM = 32
SHAPES = [(56, 2, 1), (56, 2, 8), (28, 4, 1), (28, 4, 4), (14, 8, 1), (14, 8, 2), (7, 16, 1)]  # side, heads, dilation
PEERS = ("gather", "dense", "natten")


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def bodies(packed: Tensor, rpb: Tensor, dilation: int) -> dict[str, Callable[[], Tensor]]:
    """The calls to compare, on strided views of one packed qkv (B, H, W, 3, heads, head_dim)."""
    q, k, v = packed.unbind(3)
    calls = {
        "tiled": lambda: neighborhood_attention(q, k, v, KERNEL, dilation, rpb=rpb, impl="tiled"),
        "gather": lambda: neighborhood_attention(q, k, v, KERNEL, dilation, rpb=rpb, impl="reference"),
        "dense": lambda: dense(q, k, v),
    }
    if find_spec("natten") is not None:
        from natten import na2d

        calls["natten"] = lambda: na2d(q, k, v, kernel_size=KERNEL, dilation=dilation)
    return calls


def both_ways(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Forward and backward; gradients are thrown away."""

    def step() -> None:
        out = call()
        torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)  # dense attention has no bias

    return step


def check(calls: dict[str, Callable[[], Tensor]]) -> None:
    """Refuse to time a wrong result."""
    torch.testing.assert_close(calls["tiled"](), calls["gather"](), rtol=1e-4, atol=1e-5)


def measure(batch: int, rounds: int) -> Table:
    title = f"{KERNEL}x{KERNEL} with bias, batch {batch}, float32, median ms of {rounds} interleaved rounds"
    table = Table(title=title)
    for name in ("map, heads x dim, dilation", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("tiled", *PEERS, *(f"{peer}/tiled" for peer in PEERS)):
        table.add_column(name, justify="right", no_wrap=True)
    for side, heads, dilation in SHAPES:
        torch.manual_seed(0)
        packed = torch.randn(batch, side, side, 3, heads, HEAD_DIM)
        rpb = torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1)
        label = f"{side}x{side}, {heads} x {HEAD_DIM}, {dilation}"
        forward = bodies(packed, rpb, dilation)
        check(forward)
        table.add_row(label, "forward", *cells(interleaved_seconds(forward, rounds=rounds)))
        leaves = [packed.requires_grad_(), rpb.requires_grad_()]
        steps = {name: both_ways(call, leaves) for name, call in bodies(packed, rpb, dilation).items()}
        table.add_row("", "both", *cells(interleaved_seconds(steps, rounds=rounds)))
    return table


def cells(seconds: dict[str, float]) -> list[str]:
    ours = seconds["tiled"]
    peers = [seconds.get(peer) for peer in PEERS]
    times = ["-" if s is None else f"{1e3 * s:.1f}" for s in (ours, *peers)]
    return times + ["-" if s is None else f"{s / ours:.1f}" for s in peers]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m foveate.benchmarks.neighborhood", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's own)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table with command and machine here too")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    table = measure(options.batch, options.rounds)
    write_report(table, module="foveate.benchmarks.neighborhood", machine=describe_machine(), out=options.out)


if __name__ == "__main__":
    main()
