"""Time of channel attention, large-kernel attention and the gates, compared with plain PyTorch code.

    python -m foveate.benchmarks.channel_and_gates --batch 8 --threads 2

Channel    DaViT's channel attention on views of a packed qkv, against two einsums and a softmax.
ECA, ELA   Against mean, convolution (norm), sigmoid and products, on the feature maps of ResNet-50.
LKA        Against three convolutions and a product on an NCHW map; ours on a channels-last map, as in VAN on a CPU.
Ours       The fused kernels on a GPU, the tiled bodies on a CPU.
Floor      On a GPU: minimum time to read and write the maps at the card's bandwidth, in % of the measured time.
Model      VAN-B0, which runs channels-last, against the same layers and weights in NCHW.
"""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..attention_ops import channel_attention, channel_gate, large_kernel_attention, strip_gate
from ..backbones._layers import MapGELU
from ._timing import (
    common_parser,
    copy_bytes_per_second,
    describe_machine,
    interleaved_seconds,
    parse_and_set_threads,
    peak_bytes,
    write_report,
)

MODULE = "foveate.benchmarks.channel_and_gates"

IMAGE_PX = 224


@dataclass(frozen=True)
class Case:
    """Two functions of the same leaves, and how many maps the forward pass reads or writes at least."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    passes: int


def channel_case(batch: int, side: int, heads: int, dim: int = 32, **like) -> Case:
    def plain(packed: Tensor) -> Tensor:
        q, k, v = packed.unbind(3)
        probs = torch.einsum("bhwni,bhwnj->bnij", q * dim**-0.5, k).softmax(-1)
        return torch.einsum("bnij,bhwnj->bhwni", probs, v)

    def ours(packed: Tensor) -> Tensor:
        return channel_attention(*packed.unbind(3))

    return Case(ours, plain, (torch.randn(batch, side, side, 3, heads, dim, **like),), 4)


def eca_case(batch: int, channels: int, side: int, **like) -> Case:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        gate = F.conv1d(x.mean((2, 3), keepdim=True).squeeze(-1).mT, weight, padding=weight.shape[-1] // 2)
        return x * gate.mT.unsqueeze(-1).sigmoid().expand_as(x)

    x = torch.randn(batch, channels, side, side, **like).contiguous(memory_format=torch.channels_last)
    return Case(channel_gate, plain, (x, torch.randn(1, 1, 5, **like)), 3)


def ela_case(batch: int, channels: int, side: int, **like) -> Case:
    def plain(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        def gate(strip: Tensor) -> Tensor:
            y = F.conv1d(strip, weight, padding=weight.shape[-1] // 2, groups=channels)
            return F.group_norm(y, 16, scale, bias).sigmoid()

        return x * gate(x.mean(3))[:, :, :, None] * gate(x.mean(2))[:, :, None, :]

    def ours(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return strip_gate(x, weight, scale, bias, 16)

    x = torch.randn(batch, channels, side, side, **like).contiguous(memory_format=torch.channels_last)
    weights = (torch.randn(channels, 1, 7, **like), torch.randn(channels, **like), torch.randn(channels, **like))
    return Case(ours, plain, (x, *weights), 3)


def plain_lka(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    gate = F.conv2d(x, w0, b0, padding=2, groups=x.shape[1])
    gate = F.conv2d(gate, w1, b1, padding=9, dilation=3, groups=x.shape[1])
    return x * F.conv2d(gate, w2, b2)


def lka_case(batch: int, channels: int, side: int, **like) -> Case:
    x = torch.randn(batch, channels, side, side, **like)
    shapes = (
        (channels, 1, 5, 5),
        (channels,),
        (channels, 1, 7, 7),
        (channels,),
        (channels, channels, 1, 1),
        (channels,),
    )
    weights = tuple(torch.randn(shape, **like) / max(shape[-1], 5) for shape in shapes)

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        return large_kernel_attention(x.contiguous(memory_format=torch.channels_last), *weights)

    return Case(ours, plain_lka, (x, *weights), 2)


CASES: dict[str, Callable[..., Case]] = {
    "channel 56x56, 3 x 32": lambda batch, **like: channel_case(batch, 56, 3, **like),
    "channel 14x14, 12 x 32": lambda batch, **like: channel_case(batch, 14, 12, **like),
    "ECA 256 x 56x56": lambda batch, **like: eca_case(batch, 256, 56, **like),
    "ECA 2048 x 7x7": lambda batch, **like: eca_case(batch, 2048, 7, **like),
    "ELA 256 x 56x56": lambda batch, **like: ela_case(batch, 256, 56, **like),
    "ELA 1024 x 14x14": lambda batch, **like: ela_case(batch, 1024, 14, **like),
    "LKA 64 x 56x56": lambda batch, **like: lka_case(batch, 64, 56, **like),
    "LKA 160 x 14x14": lambda batch, **like: lka_case(batch, 160, 14, **like),
}


def measure_ops(batch: int, rounds: int, device: str) -> Table:
    like = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    table = Table(title=f"batch {batch}, {device}, median ms of {rounds} interleaved rounds; memory in MB of one step")
    table.add_column("op, map", no_wrap=True)
    for name in ("forward", "plain", "ratio", "backward", "plain", "ratio", "memory", "plain", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, make in CASES.items():
        torch.manual_seed(0)
        table.add_row(name, *_cells(make(batch, **like), rounds, device))
    return table


def _cells(case: Case, rounds: int, device: str) -> list[str]:
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    forms = {"ours": lambda: case.ours(*leaves), "plain": lambda: case.plain(*leaves)}
    with torch.no_grad():
        ours, plain = forms["ours"](), forms["plain"]()
        difference, tolerance = (ours - plain).abs().max(), 1e-4 if ours.dtype == torch.float32 else 3e-2
        if difference > tolerance * plain.abs().max():
            raise RuntimeError(f"the two implementations differ by {difference}")
        forward = interleaved_seconds(forms, rounds=rounds, device=device, replay=True)
    grad = torch.randn_like(ours)
    steps = {name: _step(call, leaves, grad) for name, call in forms.items()}
    both = interleaved_seconds(steps, rounds=rounds, device=device, replay=True)
    peaks = [peak_bytes(step, device) for step in steps.values()]
    cells = []
    for seconds in (forward, {name: both[name] - forward[name] for name in both}):
        cells += [f"{1e3 * seconds[name]:.2f}" for name in forms] + [f"{seconds['plain'] / seconds['ours']:.1f}"]
    cells += ["-" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks]
    if device == "cpu":
        return [*cells, "-"]
    floor = case.passes * grad.nbytes / copy_bytes_per_second(device) / forward["ours"]
    return [*cells, f"{floor:.0%}"]


def _step(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(), leaves, grad)


def models(device: str) -> dict[str, nn.Module]:
    ours, plain = (timm.create_model("van_b0").to(device).eval() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    plain.channels_last = False
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, MapGELU):
            plain.set_submodule(name, nn.GELU())
    return {"ours": ours, "plain": plain}


def measure_model(batch: int, rounds: int, device: str) -> Table:
    table = Table(title=f"VAN-B0, inference, batch {batch}, {IMAGE_PX} px, float32, {device}, {rounds} rounds")
    for name in ("img/s", "plain NCHW img/s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    nets, images = models(device), torch.randn(batch, 3, IMAGE_PX, IMAGE_PX, device=device)
    steps = {name: torch.inference_mode()(lambda net=net: net(images)) for name, net in nets.items()}
    difference = (steps["ours"]() - steps["plain"]()).abs().max()
    if difference > 1e-3 * steps["plain"]().abs().max():
        raise RuntimeError(f"the logits of the two models differ by {difference}")
    seconds = interleaved_seconds(steps, rounds=rounds, device=device)
    table.add_row(*(f"{batch / seconds[name]:.1f}" for name in steps), f"{seconds['plain'] / seconds['ours']:.2f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__)
    parser.add_argument("what", nargs="?", choices=["ops", "model"], default="ops", help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    options = parse_and_set_threads(parser, arguments)
    measure = measure_ops if options.what == "ops" else measure_model
    table = measure(options.batch, options.rounds, options.device)
    write_report(table, module=MODULE, machine=describe_machine(options.device), out=options.out)


if __name__ == "__main__":
    main()
