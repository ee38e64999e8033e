"""Time of Flow-Attention, aggregated attention and MoH, compared with the authors' forms, on a CPU.

    python -m foveate.benchmarks.mixtures --batch 8 --threads 2
    python -m foveate.benchmarks.mixtures --batch 8 --threads 2 --models moh_transnext_small_75 moh_transnext_base_50

Authors    The mathematics of the authors' code as they compute it: Flow-Attention by sums and products of elements;
           aggregated attention with 9 copies of keys and values (unfold); all heads, also those whose gate is 0; SDPA
           for plain attention. Each is compared with our result before it is timed.
All heads  Our own body without gates: what leaving heads out saves.
Work       Pairs of a token and a head that are left, (S + R) / h, in %.
Memory     Memory of one call, without its inputs, at the row's map and at 4 times its tokens: linear is 4.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..attention_ops import aggregated_attention, flow_attention
from ..attention_ops._graph.aggregated import gated, log_keys_seen, pair_bias
from ..attention_ops.moh import MohAttention, MohBase, axis_cells
from ._timing import (
    common_parser,
    describe_machine,
    interleaved_seconds,
    parse_and_set_threads,
    peak_tensor_bytes,
    write_report,
)

MODULE = "foveate.benchmarks.mixtures"

FLOW = (
    ("Flowformer stage 1", 3136, 12, 8),
    ("stage 2", 784, 12, 16),
    ("stage 3", 196, 12, 32),
    ("stage 4", 49, 12, 64),
)
# map, sr_ratio (1: plain attention), heads, shared, routed
MOH = {
    "MoH-S-75 stage 1": (56, 8, 3, 3, 0),
    "MoH-S-75 stage 2": (28, 4, 6, 6, 0),
    "MoH-S-75 stage 3": (14, 2, 12, 3, 6),
    "MoH-S-75 stage 4": (7, 1, 24, 4, 12),
    "MoH-B-50 stage 2": (28, 4, 8, 2, 4),
    "MoH-B-50 stage 3": (14, 2, 16, 2, 6),
    "MoH-B-50 stage 4": (7, 1, 32, 4, 8),
}
HEAD_DIM = 24


def authors_flow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flow-Attention of (B, N, heads, d), vision form, element by element."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    eps, ratio = 1e-6, q.shape[2] / k.shape[2]
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    incoming = 1.0 / (((q + eps) * (k.sum(2, keepdim=True) + eps)).sum(3) + eps)
    outgoing = 1.0 / (((k + eps) * (q.sum(2, keepdim=True) + eps)).sum(3) + eps)
    sinks = ((q + eps) * ((k * outgoing[..., None]).sum(2, keepdim=True) + eps)).sum(3) + eps
    sources = (((k + eps) * ((q * incoming[..., None]).sum(2, keepdim=True) + eps)).sum(3) + eps).clamp(-1.0, 1.0)
    allocation = torch.sigmoid(sinks * ratio)
    competition = torch.softmax(sources, -1) * float(sources.shape[2])
    mixed = k.transpose(-2, -1) @ (v * competition[..., None])
    return ((q @ mixed) * incoming[..., None] * allocation[..., None]).transpose(1, 2)


def authors_aggregated(
    q: Tensor, pooled_k: Tensor, pooled_v: Tensor, local_k: Tensor, local_v: Tensor, *, embedding: Tensor,
    temperature: Tensor, pooled_bias: Tensor, bias_rows: Tensor, bias_cols: Tensor, local_bias: Tensor, tokens: Tensor,
    token_bias: Tensor, gates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Aggregated attention with 9 copies of keys and values, all heads."""
    batch, height, width, heads, dim = q.shape
    size, near = (height, width), local_bias[0].numel()
    u = F.normalize(q.flatten(1, 2).transpose(1, 2), dim=-1)  # (B, heads, N, d)
    seen = log_keys_seen(size, (3, 3), pooled_k.shape[1], q.device, q.dtype).flatten()[:, None]
    scaled = (u + embedding[:, None]) * temperature[:, None, None] * seen
    maps = torch.cat([F.normalize(local_k, dim=-1), local_v], 3).permute(0, 3, 4, 1, 2).flatten(1, 2)
    copies = F.unfold(maps, 3, padding=1).view(batch, 2 * heads, dim, near, -1).permute(0, 1, 4, 2, 3)
    near_k, near_v = copies.chunk(2, 1)  # (B, heads, N, d, 9)
    inside = F.unfold(q.new_ones(1, 1, height, width), 3, padding=1)[0].T
    local = (scaled[..., None, :] @ near_k).squeeze(-2) + local_bias.flatten(1)[:, None]
    local = local.masked_fill(inside == 0, -torch.inf)
    keys, values = (x.transpose(1, 2) for x in (F.normalize(pooled_k, dim=-1), pooled_v))
    logits = scaled @ keys.mT + pair_bias(pooled_bias, bias_rows, bias_cols)
    probs = torch.cat([local, logits], -1).softmax(-1)
    weights = probs[..., :near] + u @ tokens + token_bias[:, None]
    out = (weights[..., None, :] @ near_v.mT).squeeze(-2) + probs[..., near:] @ values
    out = out.transpose(1, 2).unflatten(1, size)
    return out if gates is None else out * gates[..., None]


def authors_attention(
    q: Tensor, pooled_k: Tensor, pooled_v: Tensor, *, embedding: Tensor, temperature: Tensor, pooled_bias: Tensor,
    bias_rows: Tensor, bias_cols: Tensor, gates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cosine attention with a bias by SDPA, all heads."""
    size = q.shape[1:3]
    u = F.normalize(q.flatten(1, 2).transpose(1, 2), dim=-1)
    scaled = (u + embedding[:, None]) * temperature[:, None, None] * torch.tensor(float(pooled_k.shape[1])).log()
    keys, values = (x.transpose(1, 2) for x in (F.normalize(pooled_k, dim=-1), pooled_v))
    bias = pair_bias(pooled_bias, bias_rows, bias_cols)
    out = F.scaled_dot_product_attention(scaled, keys, values, attn_mask=bias, scale=1.0)
    out = out.transpose(1, 2).unflatten(1, size)
    return out if gates is None else out * gates[..., None]


def moh_inputs(side: int, ratio: int, heads: int, shared: int, routed: int, batch: int) -> dict[str, Tensor]:
    """The arguments of one layer, on views of packed projections; gates of random weights."""
    torch.manual_seed(0)
    pooled = side // ratio
    rows, values = axis_cells(side, pooled, torch.device("cpu"))
    k, v = torch.randn(batch, pooled**2, 2, heads, HEAD_DIM).unbind(2)
    given = {
        "q": torch.randn(batch, side, side, heads, HEAD_DIM), "pooled_k": k, "pooled_v": v, "bias_rows": rows,
        "bias_cols": rows, "pooled_bias": torch.randn(heads, len(values), len(values)),
        "embedding": torch.randn(heads, HEAD_DIM) * 0.02, "temperature": torch.full((heads,), 1 / 0.24),
    }  # fmt: skip
    if ratio > 1:
        local_k, local_v = torch.randn(batch, side, side, 2, heads, HEAD_DIM).unbind(3)
        given |= {"local_k": local_k, "local_v": local_v, "local_bias": torch.randn(heads, 3, 3)}
        given |= {"tokens": torch.randn(heads, HEAD_DIM, 9) * 0.02, "token_bias": torch.randn(heads, 9) * 0.02}
    layer = MohAttention(heads * HEAD_DIM, heads, shared=shared, routed=routed)
    return given | {"gates": layer.gates(torch.randn(batch, side, side, heads * HEAD_DIM)).detach()}


def checked(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], name: str) -> None:
    a, b = ours(), theirs()
    if float((a - b).abs().max()) > 1e-3 * float(b.abs().max()):
        raise RuntimeError(f"{name}: the results differ, so they are not timed")


def training(call: Callable[..., Tensor], given: dict[str, Tensor]) -> Callable[[], object]:
    leaves = {name: t.detach().requires_grad_() for name, t in given.items() if t.is_floating_point()}

    def step() -> None:
        out = call(**given | leaves)
        torch.autograd.grad(out, list(leaves.values()), out.detach(), allow_unused=True)

    return step


def compare(
    name: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], given: dict[str, Tensor], rounds: int,
    work: float | None, larger: dict[str, Tensor] | None = None,
) -> list[list[str]]:  # fmt: skip
    """Rows of a table: forward in inference, then forward and backward."""
    checked(lambda: ours(**given), lambda: theirs(**given), name)
    rows = []
    for way in ("forward", "both"):

        def run(call: Callable[..., Tensor], of: dict[str, Tensor], way: str = way) -> Callable[[], object]:
            return (lambda: call(**of)) if way == "forward" else training(call, of)

        calls = {"ours": run(ours, given), "authors": run(theirs, given)}
        if work is not None and work < 1:
            calls["all heads"] = run(ours, {k: v for k, v in given.items() if k != "gates"})
        with torch.inference_mode(way == "forward"):
            seconds = interleaved_seconds(calls, rounds=rounds)
            memory = "-"
            if larger is not None:
                memory = f"{peak_tensor_bytes(run(ours, larger)) / peak_tensor_bytes(calls['ours']):.1f}"
        peers = [_ratio(seconds, peer) for peer in ("authors", "all heads")]
        share = "-" if work is None else f"{100 * work:.0f}"
        rows.append([name, way, f"{1e3 * seconds['ours']:.2f}", share, *peers, memory])
    return rows


def _ratio(seconds: dict[str, float], peer: str) -> str:
    return f"{seconds[peer] / seconds['ours']:.2f}" if peer in seconds else "-"


def op_table(batch: int, rounds: int, only: list[str]) -> Table:
    table = Table(title=f"ops, float32, batch {batch}, median of {rounds} rounds; peers: their time / ours")
    for column in ("layer", "pass", "ms", "work %", "authors", "all heads", "memory x4"):
        table.add_column(column, justify="left" if column in ("layer", "pass") else "right")
    rows = []
    for name, tokens, heads, dim in FLOW:
        if any(word in f"flow {name}" for word in only):
            q, k, v = torch.randn(batch, tokens, 3, heads, dim).unbind(2)
            rows += compare(f"flow {name}", flow_attention, authors_flow, {"q": q, "k": k, "v": v}, rounds, None)
    for name, (side, ratio, heads, shared, routed) in MOH.items():
        if any(word in name for word in only):
            given = moh_inputs(side, ratio, heads, shared, routed, batch)
            theirs = authors_aggregated if ratio > 1 else authors_attention
            larger = moh_inputs(2 * side, 2 * ratio, heads, shared, routed, batch) if ratio > 1 else None
            rows += compare(name, aggregated_attention, theirs, given, rounds, (shared + routed) / heads, larger)
    for row in rows:
        table.add_row(*row)
    return table


class AllHeads(nn.Module):
    """A model whose attention computes all heads: by the authors' form, or by our own body."""

    def __init__(self, model: nn.Module, op: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.model, self.op = model, op

    def forward(self, x: Tensor) -> Tensor:
        from ..attention_ops import moh

        plain = moh.aggregated_attention

        def call(*args: Tensor, gates: Tensor | None = None, **kwargs: Any) -> Tensor:
            if self.op is None:
                return gated(plain(*args, **kwargs), gates)
            form = authors_aggregated if len(args) == 5 else authors_attention
            return form(*args, gates=gates, **kwargs)

        moh.aggregated_attention = call  # type: ignore[assignment]
        try:
            return self.model(x)
        finally:
            moh.aggregated_attention = plain


def model_table(names: list[str], batch: int, rounds: int) -> Table:
    table = Table(
        title=f"models at 224 px, inference, batch {batch}, median of {rounds} rounds; peers: their time / ours"
    )
    for column in ("model", "ms", "work %", "authors", "all heads"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in names:
        torch.manual_seed(0)
        model, x = timm.create_model(name).eval(), torch.randn(batch, 3, 224, 224)
        calls = {"ours": model, "authors": AllHeads(model, authors_aggregated), "all heads": AllHeads(model, None)}
        with torch.inference_mode():
            exact = deepcopy(model).double()  # in float32, rounding may choose other heads
            checked(
                lambda m=exact, x=x: m(x[:1].double()),
                lambda m=exact, x=x: AllHeads(m, authors_aggregated)(x[:1].double()),
                name,
            )
            seconds = interleaved_seconds({k: (lambda m=m, x=x: m(x)) for k, m in calls.items()}, rounds=rounds)
        layers = [m for m in model.modules() if isinstance(m, MohBase)]
        work = sum(m.active * m.heads for m in layers) / sum(m.heads for m in layers)
        peers = [f"{seconds[peer] / seconds['ours']:.2f}" for peer in ("authors", "all heads")]
        table.add_row(name, f"{1e3 * seconds['ours']:.0f}", f"{100 * work:.0f}", *peers)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__)
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="layers whose name contains a WORD")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="time these MoH models, not the ops")
    options = parse_and_set_threads(parser, arguments)
    if options.models:
        table = model_table(options.models, options.batch, options.rounds)
    else:
        table = op_table(options.batch, options.rounds, options.only)
    write_report(table, module=MODULE, machine=describe_machine(), out=options.out)


if __name__ == "__main__":
    main()
