"""Time of neighborhood, window, halo and circle attention, compared with other implementations, on a GPU or a CPU.

    python -m foveate.benchmarks.local_attention --device cuda --batch 1 32 128
    python -m foveate.benchmarks.local_attention --device cpu --batch 8 --threads 2 --only 224

Shapes     Attention layers of published models, kernel 7; --only selects rows whose name contains a word.
Ours       The fused kernels on a GPU, the tiled body on a CPU.
Floor      Copy time of q, k, v and out (and of what a backward pass reads and writes), in % of our time.
Memory     Memory of one call, without its inputs.
Gather     The definition: every query copies its own keys (windows and circles: all logits in memory). Not run on a
           GPU, or if it needs more than 2 GiB.
Composed   Split into tiles, scaled_dot_product_attention, merge: what PyTorch users write for windows. On a CPU this is
           our own body.
Dense      scaled_dot_product_attention of all tokens to all tokens, without bias or mask: another function.
Flex       Compiled FlexAttention with the same mask and bias, on a GPU (it has no backward on a CPU).
NATTEN     With its default backend, neighborhoods only, without bias (it has none), if installed.
Peers      Their time divided by ours: above 1 ours is faster. "-" means not available.
Layer      Model, image side in px, rows x columns x heads of the map, then dilation, window, block + halo or radius.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from ..attention_ops import circle_attention, halo_attention, neighborhood_attention, window_attention
from ..attention_ops.neighborhood import axis_window
from ._timing import (
    common_parser,
    copy_bytes_per_second,
    describe_machine,
    interleaved_seconds,
    parse_and_set_threads,
    peak_bytes,
    write_report,
)

MODULE = "foveate.benchmarks.local_attention"

OPS = {
    "neighborhood": neighborhood_attention,
    "window": window_attention,
    "halo": halo_attention,
    "circle": circle_attention,
}
PEERS = ("gather", "composed", "dense", "flex", "natten")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_COPIES = 2**31  # limit of the bytes that gather copies
PASSES = {"forward": 4, "both": 12}  # maps read or written: q, k, v, out; then q, k, v, out, grad, dq, dk, dv


@dataclass(frozen=True)
class Shape:
    """One layer: an op on a side x side map with `heads` heads. `table`: with a bias or relative logits."""

    name: str
    op: str
    side: int
    heads: int
    arguments: dict = field(hash=False)
    table: bool = False
    head_dim: int = 32

    def copied_bytes(self, batch: int, itemsize: int) -> int:
        """Return the memory of the definition without its inputs: a copied key and value per logit, or the logit."""
        a = self.arguments
        side = {
            "neighborhood": a.get("kernel_size"),
            "window": a.get("window_size"),
            "halo": a.get("block_size", 0) + 2 * a.get("halo", 0),
            "circle": self.side,
        }[self.op]
        each = 2 * self.head_dim if self.op in ("neighborhood", "halo") else 3
        return batch * self.heads * self.side**2 * side**2 * each * itemsize

    def tables(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        a, like = self.arguments, {"device": device, "dtype": dtype}
        if not self.table:
            return {}
        if self.op == "neighborhood":
            cells = 2 * a["kernel_size"] - 1
            return {"rpb": torch.randn(self.heads, cells, cells, **like)}
        if self.op == "window":
            return {"bias": torch.randn(self.heads, a["window_size"] ** 2, a["window_size"] ** 2, **like)}
        cells = 2 * (a["block_size"] + 2 * a["halo"]) - 1
        return {name: torch.randn(cells, self.head_dim, **like) * 0.1 for name in ("rel_h", "rel_w")}


def nat(model: str, side: int, heads: int, dilation: int = 1, table: bool = True) -> Shape:
    name = f"{model} {side}x{side} x{heads}" + (f" dil {dilation}" if dilation > 1 else "")
    return Shape(name, "neighborhood", side, heads, {"kernel_size": 7, "dilation": dilation}, table)


SHAPES = (
    *(nat("NAT-T 224", 56 >> s, 2 << s) for s in range(4)),
    *(nat("DiNAT-T 224", 56 >> s, 2 << s, 8 >> s) for s in range(3)),
    *(nat("NAT-B 224", 56 >> s, 4 << s) for s in range(3)),
    *(nat("NAT-T 512", 128 >> s, 2 << s) for s in range(3)),
    nat("NAT-T 512, no bias", 128, 2, table=False),
    Shape("Swin-T 224 56x56 x3 7x7", "window", 56, 3, {"window_size": 7}, True),
    Shape("Swin-T 224 14x14 x12 7x7", "window", 14, 12, {"window_size": 7}, True),
    Shape("DaViT-T 224 56x56 x3 7x7", "window", 56, 3, {"window_size": 7}),
    Shape("DaViT-T 224 28x28 x6 7x7", "window", 28, 6, {"window_size": 7}),
    Shape("Halo-H1 256 64x64 x4 8+3", "halo", 64, 4, {"block_size": 8, "halo": 3}, True, 16),
    Shape("Halo-50ts 256 32x32 x8 8+3", "halo", 32, 8, {"block_size": 8, "halo": 3}, True, 16),
    Shape("CLEAR 64x64 x4 r 8", "circle", 64, 4, {"radius": 8}, head_dim=64),
)


def bodies(shape: Shape, packed: Tensor, tables: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Return the calls to compare, on strided views of one packed qkv (B, side, side, 3, heads, head_dim)."""
    q, k, v = packed.unbind(3)
    gpu = packed.is_cuda

    def ours(impl: str) -> Callable[[], Tensor]:
        return lambda: OPS[shape.op](q, k, v, **shape.arguments, **tables, impl=impl)

    calls = {"ours": ours("fused" if gpu else "tiled"), "dense": lambda: dense(q, k, v)}
    if gpu:
        calls |= {"composed": ours("tiled"), "flex": flex(shape, tables, q, k, v)}
    elif shape.copied_bytes(packed.shape[0], packed.element_size()) <= MOST_COPIES:
        calls["gather"] = ours("reference")
    if shape.op == "neighborhood" and find_spec("natten") is not None:
        from natten import na2d

        calls["natten"] = lambda: na2d(q, k, v, **shape.arguments)
    return calls


def by_head(x: Tensor) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, H * W, d)."""
    return x.flatten(1, 2).transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v))


def axis_tables(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Return (side, side) of query and key on one axis: whether the key is seen, and its index in a relative table."""
    places = torch.arange(shape.side, device=device)
    query, key = places[:, None], places[None, :]
    if shape.op == "circle":
        return (key - query).abs() < shape.arguments["radius"], (key - query).square()
    if shape.op == "window":
        size = shape.arguments["window_size"]
        return query // size == key // size, query % size * size + key % size
    keys, _, cells = axis_window(shape.side, shape.arguments["kernel_size"], shape.arguments["dilation"], False)
    seen = torch.zeros(shape.side, shape.side, dtype=torch.bool).scatter(1, keys, True)
    return seen.to(device), torch.zeros(shape.side, shape.side, dtype=torch.long).scatter(1, keys, cells).to(device)


def flex(
    shape: Shape, tables: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, *, compiled: bool = True
) -> Callable[[], Tensor] | None:
    """Return FlexAttention of the same function; None for halos, whose zero keys outside the map it cannot express."""
    if shape.op == "halo":
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    side, (seen, cells) = shape.side, axis_tables(shape, q.device.type)

    def mask(_batch, _head, i, j):
        inside = seen[i // side, j // side] & seen[i % side, j % side]
        if shape.op == "circle":
            return cells[i // side, j // side] + cells[i % side, j % side] < shape.arguments["radius"] ** 2
        return inside

    def score(logit, _batch, head, i, j):
        y, x = cells[i // side, j // side], cells[i % side, j % side]
        if shape.op == "neighborhood":
            return logit + tables["rpb"][head, y, x]
        size = shape.arguments["window_size"]
        return logit + tables["bias"][head, y // size * size + x // size, y % size * size + x % size]

    blocks = create_block_mask(mask, None, None, side * side, side * side, device=q.device.type)
    attend = torch.compile(flex_attention) if compiled else flex_attention
    return lambda: attend(
        by_head(q), by_head(k), by_head(v), score_mod=score if tables else None, block_mask=blocks
    )  # fmt: skip


def both_ways(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Return a call of forward and backward."""

    def step() -> None:
        out = call()
        grads = torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)  # dense: no bias
        assert grads[0] is not None

    return step


def check(shape: Shape, dtype: torch.dtype, device: str) -> None:
    """Compare ours on one image with the definition in float32, and refuse to time a wrong result."""
    torch.manual_seed(0)
    packed = torch.randn(1, shape.side, shape.side, 3, shape.heads, shape.head_dim, device=device, dtype=dtype)
    tables = shape.tables(device, dtype)
    exact = {name: table.float() for name, table in tables.items()}
    expected = OPS[shape.op](*packed.float().unbind(3), **shape.arguments, **exact, impl="reference")
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    found = bodies(shape, packed, tables)["ours"]().float()
    if float((found - expected).abs().max()) > tolerance * float(expected.abs().max()):
        raise RuntimeError(f"{shape.name}: the result is wrong, so it is not timed")


def seconds_of(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Return median seconds of each call that does not run out of memory; on a GPU, of its CUDA graph."""
    fit = {}
    for name, call in calls.items():
        try:
            call()
            fit[name] = call
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return interleaved_seconds(fit, rounds=rounds, device=device, replay=True)


def rows_of(
    shape: Shape, batch: int, dtype: torch.dtype, device: str, rounds: int, bandwidth: float
) -> list[list[str]]:
    """Return the rows of one layer at one batch size: forward, then forward and backward."""
    torch.manual_seed(0)
    packed = torch.randn(batch, shape.side, shape.side, 3, shape.heads, shape.head_dim, device=device, dtype=dtype)
    tables, rows = shape.tables(device, dtype), []
    for name, maps in PASSES.items():
        leaves = [t.requires_grad_(name == "both") for t in (packed, *tables.values())]
        calls = {peer: call for peer, call in bodies(shape, packed, tables).items() if call is not None}
        if name == "both":
            calls = {peer: both_ways(call, leaves) for peer, call in calls.items()}
        seconds = seconds_of(calls, device, rounds)
        floor = maps * packed.numel() / 3 * packed.element_size() / bandwidth
        peak = peak_bytes(calls["ours"], device)
        rows.append(
            [
                shape.name if name == "forward" else "",
                str(batch) if name == "forward" else "",
                name,
                f"{1e6 * seconds['ours']:.0f}",
                f"{100 * floor / seconds['ours']:.0f}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
                *(f"{seconds[peer] / seconds['ours']:.1f}" if peer in seconds else "-" for peer in PEERS),
            ]
        )
    return rows


def measure(device: str, batches: list[int], dtype: torch.dtype, rounds: int, only: list[str]) -> Table:
    shapes = [shape for shape in SHAPES if any(word in shape.name for word in only)]
    if not shapes:
        raise ValueError(f"no layer has a name with one of {only}")
    bandwidth = copy_bytes_per_second(device)
    table = Table(title=f"{dtype}, median of {rounds} rounds, copies at {bandwidth / 1e9:.0f} GB/s")
    for name in ("layer", "batch", "pass", "us", "floor", "MB", *PEERS):
        table.add_column(name, justify="left" if name in ("layer", "pass") else "right", no_wrap=True)
    for shape in shapes:
        check(shape, dtype, device)
        for batch in batches:
            for row in rows_of(shape, batch, dtype, device, rounds, bandwidth):
                table.add_row(*row)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="images (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="layers whose name contains a WORD (default: all)"
    )
    options = parse_and_set_threads(parser, arguments)
    dtype = DTYPES[options.dtype or ("bfloat16" if options.device == "cuda" else "float32")]
    table = measure(options.device, options.batch, dtype, options.rounds, options.only)
    machine = describe_machine(options.device)
    write_report(table, module=MODULE, machine=machine, out=options.out)


if __name__ == "__main__":
    main()
