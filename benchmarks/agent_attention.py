"""Time of agent attention in inference and training, compared with the authors' form.

    python -m foveate.benchmarks.agent_attention --batch 8 --threads 2

Layers     Those of published models at 224 px, with projections, pooled agents, biases and depthwise convolution.
Authors    The layer written from the paper and the authors' rules in plain PyTorch, with the same weights: biases are
           resized at every call, both probabilities are in memory.
SDPA       The same with torch's fused attention, which takes the biases as masks.
Ours       The layer of the models in eager mode; `fused` is the same layer after `foveate.fuse`, which resizes the
           biases once.
Op         The op alone, without projections: both softmaxes from given biases; for `authors` and `SDPA` too.
Model      Whole models: eager ours, ours after `foveate.fuse`, and the authors' form with SDPA.
"""

from collections.abc import Callable, Mapping

import timm
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..attention_ops import AgentAttention, ReducedAgentAttention, agent_attention
from ..attention_ops.agent_layer import AgentBiases
from ..fusion import fuse, keep_memory
from ._timing import common_parser, describe_machine, interleaved_seconds, parse_and_set_threads, write_report

MODULE = "foveate.benchmarks.agent_attention"

Pair = tuple[int, int]
# map, class token, heads, head_dim, agents
SHAPES: dict[str, tuple[Pair, int, int, int, int]] = {
    "DeiT-T": ((14, 14), 1, 3, 64, 49),
    "DeiT-S": ((14, 14), 1, 6, 64, 49),
    "Swin-T, stage 1": ((56, 56), 0, 3, 32, 9),
    "Swin-T, stage 2": ((28, 28), 0, 6, 32, 16),
    "Swin-T, stage 3": ((14, 14), 0, 12, 32, 49),
    "PVT-T, stage 1": ((56, 56), 0, 1, 64, 9),
}
MODELS = ("agent_deit_tiny", "agent_pvt_tiny", "agent_swin_tiny")


class AuthorsForm(nn.Module):
    """The layer in plain PyTorch, with the weights of ours.

    Args:
        ours: a layer whose keys come from the queries' map.
        sdpa: use torch's fused attention.
    """

    def __init__(self, ours: AgentBiases, sdpa: bool) -> None:
        super().__init__()
        self.ours, self.sdpa = ours, sdpa

    def forward(self, x: Tensor, size: Pair | None = None) -> Tensor:
        ours, on_map = self.ours, size is None
        if size is None:
            size = (x.shape[1], x.shape[2])
            x = x.flatten(1, 2)
        q, k, v = self.project(x)
        first = ours.prefix_tokens
        side = ours.agent_shape
        few = F.adaptive_avg_pool2d(q[:, first:].transpose(1, 2).unflatten(2, size), side).flatten(2).transpose(1, 2)
        heads = [t.unflatten(-1, (ours.heads, -1)).transpose(1, 2) for t in (few, k, v, q)]
        out = self.attend(*heads, *self.biases(len(x), size)).transpose(1, 2).flatten(2)  # type: ignore[call-arg]
        local = ours.dwc(v[:, first:].transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)  # type: ignore[operator]
        out = torch.cat([out[:, :first], out[:, first:] + local], 1) if first else out + local
        out = ours.proj(out)  # type: ignore[operator]
        return out.unflatten(1, size) if on_map else out

    def project(self, x: Tensor) -> list[Tensor]:
        ours = self.ours
        if isinstance(ours, ReducedAgentAttention):
            return [ours.q(x), *ours.kv(x).chunk(2, -1)]
        return list(ours.qkv(x).chunk(3, -1))  # type: ignore[operator]

    def biases(self, batch: int, size: Pair) -> tuple[Tensor, Tensor]:
        """Both biases, (B, heads, agents, tokens) and (B, heads, tokens, agents), from the authors' parts."""
        ours = self.ours
        to, of = (F.interpolate(t, size=size, mode="bilinear").flatten(2)[None] for t in (ours.an_bias, ours.na_bias))
        to = to.repeat(batch, 1, 1, 1) + (ours.ah_bias + ours.aw_bias).flatten(3).repeat(batch, 1, 1, 1)
        of = of.mT.repeat(batch, 1, 1, 1) + (ours.ha_bias + ours.wa_bias).flatten(2, 3).repeat(batch, 1, 1, 1)
        if ours.ac_bias is not None and ours.ca_bias is not None:
            to = torch.cat([ours.ac_bias.repeat(batch, 1, 1, 1), to], -1)
            of = torch.cat([ours.ca_bias.repeat(batch, 1, 1, 1), of], -2)
        return to, of

    def attend(self, few: Tensor, k: Tensor, v: Tensor, q: Tensor, to: Tensor, of: Tensor) -> Tensor:
        if self.sdpa:
            return with_sdpa(few, k, v, q, to, of)
        return in_memory(few, k, v, q, to, of)


def in_memory(few: Tensor, k: Tensor, v: Tensor, q: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Both attentions with their probabilities in memory; (B, heads, tokens, head_dim)."""
    scale = q.shape[-1] ** -0.5
    gathered = ((few * scale) @ k.mT + to).softmax(-1) @ v
    return ((q * scale) @ few.mT + of).softmax(-1) @ gathered


def with_sdpa(few: Tensor, k: Tensor, v: Tensor, q: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Both attentions by torch's fused attention."""
    gathered = F.scaled_dot_product_attention(few, k, v, to)
    return F.scaled_dot_product_attention(q, few, gathered, of)


class OnMap(nn.Module):
    """A layer of tokens with the size of its map, for `fuse`, which takes functions of one tensor."""

    def __init__(self, layer: nn.Module, size: Pair) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.size)


def layers(shape: tuple[Pair, int, int, int, int], batch: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The forms of one layer with one set of weights, and an input."""
    size, prefix, heads, dim, agents = shape
    torch.manual_seed(0)
    ours = AgentAttention(heads * dim, heads, map_size=size, prefix_tokens=prefix, agents=agents).eval()
    x = torch.randn(batch, prefix + size[0] * size[1], heads * dim)
    forms: dict[str, nn.Module] = {"ours": OnMap(ours, size)}
    forms |= {name: OnMap(AuthorsForm(ours, name == "SDPA"), size) for name in ("authors", "SDPA")}
    return {name: form.eval() for name, form in forms.items()}, x


def op_calls(shape: tuple[Pair, int, int, int, int], batch: int) -> dict[str, Callable[[], Tensor]]:
    """The op alone in each form, on views of one packed qkv."""
    size, prefix, heads, dim, agents = shape
    torch.manual_seed(0)
    tokens = prefix + size[0] * size[1]
    q, k, v = torch.randn(batch, tokens, 3, heads, dim).unbind(2)
    few = torch.randn(batch, agents, heads, dim)
    to, of = torch.randn(heads, agents, tokens), torch.randn(heads, tokens, agents)
    views = [t.transpose(1, 2) for t in (few, k, v, q)]
    return {
        "ours": lambda: agent_attention(q, k, v, few, bias_to=to, bias_from=of),
        "authors": lambda: in_memory(*views, to, of).transpose(1, 2),  # type: ignore[call-arg]
        "SDPA": lambda: with_sdpa(*views, to[None], of[None]).transpose(1, 2),  # type: ignore[call-arg]
    }


def check_equal(found: Mapping[str, Tensor]) -> None:
    """Refuse to time forms that do not agree."""
    for name, value in found.items():
        torch.testing.assert_close(value, found["ours"], rtol=1e-3, atol=1e-4 * float(found["ours"].std()), msg=name)


def measure_layers(batch: int, rounds: int) -> Table:
    table = Table(title=f"layers, batch {batch}, float32, cpu, median ms of {rounds} interleaved rounds")
    columns = ("op", "authors", "SDPA", "layer", "fused", "authors", "SDPA", "authors / fused", "SDPA / fused")
    for name in ("layer of", *columns, "train", "authors"):
        table.add_column(name, justify="left" if name == "layer of" else "right", no_wrap=True)
    for name, shape in SHAPES.items():
        table.add_row(name, *_cells(shape, batch, rounds))
    return table


def _cells(shape: tuple[Pair, int, int, int, int], batch: int, rounds: int) -> list[str]:
    calls = op_calls(shape, batch)
    forms, x = layers(shape, batch)
    forms["fused"] = fuse(forms["ours"], x)
    with torch.no_grad():
        check_equal({name: call() for name, call in calls.items()})
        check_equal({name: form(x) for name, form in forms.items()})
        op = interleaved_seconds(calls, rounds=rounds)
        layer = interleaved_seconds({name: lambda f=f: f(x) for name, f in forms.items()}, rounds=rounds)  # type: ignore[misc]
    steps = {name: lambda f=forms[name]: f(x).square().sum().backward() for name in ("ours", "authors")}
    train = interleaved_seconds(steps, rounds=rounds)
    times = [*(op[n] for n in ("ours", "authors", "SDPA")), *(layer[n] for n in ("ours", "fused", "authors", "SDPA"))]
    ratios = [layer[name] / layer["fused"] for name in ("authors", "SDPA")]
    cells = [*(f"{1e3 * t:.2f}" for t in times), *(f"{ratio:.2f}" for ratio in ratios)]
    return [*cells, *(f"{1e3 * train[name]:.2f}" for name in steps)]


def authors_model(name: str, sdpa: bool = True) -> nn.Module:
    """A model whose agent layers run in the authors' form; the weights of `timm.create_model(name)` with seed 0."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, AgentAttention | ReducedAgentAttention):
            model.set_submodule(path, AuthorsForm(layer, sdpa))
    return model


def measure_models(batch: int, rounds: int) -> Table:
    table = Table(title=f"models at 224 px, inference, batch {batch}, float32, cpu, {rounds} interleaved rounds")
    for name in ("model", "img/s", "fused img/s", "authors img/s", "ratio", "fused ratio"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    x = torch.randn(batch, 3, 224, 224)
    for name in MODELS:
        torch.manual_seed(0)
        ours = timm.create_model(name).eval()
        nets = {"ours": ours, "fused": fuse(ours, x), "authors": authors_model(name)}
        with torch.no_grad():
            check_equal({key: net(x) for key, net in nets.items()})
            seconds = interleaved_seconds({key: lambda n=n: n(x) for key, n in nets.items()}, rounds=rounds)  # type: ignore[misc]
        ratios = [seconds["authors"] / seconds[key] for key in ("ours", "fused")]
        table.add_row(name, *(f"{batch / seconds[key]:.1f}" for key in nets), *(f"{ratio:.2f}" for ratio in ratios))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__)
    parser.add_argument("what", nargs="?", choices=["layers", "models"], default="layers", help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    options = parse_and_set_threads(parser, arguments)
    keep_memory()
    measure = measure_layers if options.what == "layers" else measure_models
    table = measure(options.batch, options.rounds)
    write_report(table, module=MODULE, machine=describe_machine("cpu"), out=options.out)


if __name__ == "__main__":
    main()
