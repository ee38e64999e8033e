"""Time and memory of routed attention, compared with code that copies the routed keys.

    python -m foveate.benchmarks.routed_attention --batch 8 --threads 2

Shapes     The routed stages of BiFormer-T at 224 px (56x56 with 2 heads, 28x28 with 4, 14x14 with 8; 49 regions; 32
           channels per head), stage 1 also with topk 4 and 16, and stage 1 of 600 x 500 px images, half as many images.
Gather     Plain PyTorch code with gradients by autograd: split into regions, copy the routed regions for every region
           (topk copies of k and v), attention with its logits in memory.
Ours       The fused kernels on a GPU, the tiled body on a CPU.
Memory     Peak memory of tensors in forward and backward, without the inputs, relative to the bytes of q, k, v and out;
           `resident` is ours as the system counts it. Out and the three gradients alone make 1.0. On a GPU, `floor` is
           the minimum memory time of the forward pass in % of the measured time.
Model      The whole BiFormer-T, with its routed layers replaced by the copying code with the same weights.
"""

from collections.abc import Callable

import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from ..attention_ops import BiLevelRoutingAttention, bi_level_routes, routed_attention
from ._timing import (
    common_parser,
    copy_bytes_per_second,
    describe_machine,
    interleaved_seconds,
    parse_and_set_threads,
    peak_bytes,
    peak_tensor_bytes,
    write_report,
)

MODULE = "foveate.benchmarks.routed_attention"

HEAD_DIM = 32
REGIONS = 7  # per side
LARGE = (154, 126, 2, 1)  # rows, columns, heads, topk
SHAPES = [(56, 56, 2, 1), (56, 56, 2, 4), (56, 56, 2, 16), (28, 28, 4, 4), (14, 14, 8, 16), LARGE]
IMAGE_SIZES = (224, 336)  # px, of the whole model


def cut(x: Tensor, region: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, regions, tokens, C), a copy."""
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0])).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def gather_attention(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    """Routed attention on (B, regions, tokens, C), with copies of the routed keys."""
    batch, regions, tokens, dim = k.shape
    topk = routes.shape[2]
    index = routes.view(batch, regions, topk, 1, 1).expand(-1, -1, -1, tokens, dim)
    keys, values = (
        torch.gather(x[:, None].expand(-1, regions, -1, -1, -1), 2, index).flatten(2, 3) for x in (k, v)
    )  # (B, regions, topk * tokens, C)
    q, keys, values = (x.unflatten(-1, (heads, -1)).transpose(2, 3) for x in (q, keys, values))
    probs = (q * scale @ keys.mT).softmax(-1)
    return (probs @ values).transpose(2, 3).flatten(3)


def join(x: Tensor, size: tuple[int, int], region: tuple[int, int]) -> Tensor:
    """(B, regions, tokens, C) -> (B, H, W, C): the inverse of `cut`."""
    x = x.unflatten(2, region).unflatten(1, (size[0] // region[0], size[1] // region[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class GatheringAttention(nn.Module):
    """BiFormer's layer in plain code, with the weights of ours."""

    def __init__(self, ours: BiLevelRoutingAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        ours, size = self.ours, (x.shape[1], x.shape[2])
        region = (size[0] // ours.regions, size[1] // ours.regions)
        q, k, v = ours.qkv(cut(x, region)).chunk(3, dim=-1)
        means_q, means_k = q.mean(2).detach(), k.mean(2).detach()
        routes = (means_q * ours.scale @ means_k.mT).topk(ours.topk).indices
        out = join(gather_attention(q, k, v, routes, ours.heads, ours.scale), size, region)
        v = join(v, size, region).permute(0, 3, 1, 2).contiguous()
        return ours.proj(out + ours.lepe(v).permute(0, 2, 3, 1))


def calls(shape: tuple[int, int, int, int], batch: int, device: str) -> tuple[dict[str, Callable], list[Tensor]]:
    """Return both implementations, and their inputs: strided views of one packed qkv."""
    rows, cols, heads, topk = shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    packed = torch.randn(batch, rows, cols, 3, heads, HEAD_DIM, device=device, dtype=dtype)
    leaves = list(packed.unbind(3))
    region, scale = (rows // REGIONS, cols // REGIONS), (heads * HEAD_DIM) ** -0.5
    routes = bi_level_routes(*leaves[:2], region_size=region, topk=topk)

    def ours() -> Tensor:
        return routed_attention(*leaves, routes, region_size=region, scale=scale)

    def gather() -> Tensor:
        q, k, v = (cut(x.flatten(3), region) for x in leaves)
        out = gather_attention(q, k, v, routes, heads, scale)
        return join(out, (rows, cols), region).unflatten(-1, (heads, -1))

    return {"ours": ours, "gather": gather}, leaves


def both_ways(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(), leaves, grad)


def measure_op(batch: int, rounds: int, device: str) -> Table:
    table = Table(title=f"one layer's attention, batch {batch}, {device}, median ms of {rounds} interleaved rounds")
    table.add_column("map, heads, topk", no_wrap=True)
    names = ("forward", "gather", "ratio", "backward", "gather", "ratio", "memory", "gather", "resident", "floor")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for shape in SHAPES:
        images = max(batch // 2, 1) if shape == LARGE else batch
        table.add_row(f"{shape[0]}x{shape[1]}, {shape[2]}, {shape[3]}", *_cells(shape, images, rounds, device))
    return table


def _cells(shape: tuple[int, int, int, int], batch: int, rounds: int, device: str) -> list[str]:
    forms, leaves = calls(shape, batch, device)
    with torch.no_grad():
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if leaves[0].dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(forms["ours"](), forms["gather"](), **tolerance)  # refuse to time a wrong result
        forward = interleaved_seconds(forms, rounds=rounds, device=device, replay=True)
    grad = torch.randn_like(forms["ours"]())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    steps = {name: both_ways(call, leaves, grad) for name, call in forms.items()}
    both = interleaved_seconds(steps, rounds=rounds, device=device, replay=True)
    peaks = [peak_tensor_bytes(step, device) for step in steps.values()]
    peaks.append(peak_bytes(steps["ours"]) if device == "cpu" else None)
    backward = {name: both[name] - forward[name] for name in both}
    maps = 4 * grad.nbytes
    cells = []
    for seconds in (forward, backward):
        ours, gather = seconds["ours"], seconds["gather"]
        cells += [f"{1e3 * ours:.2f}", f"{1e3 * gather:.2f}", f"{gather / ours:.1f}"]
    cells += ["-" if peak is None else f"{peak / maps:.2f}" for peak in peaks]
    if device == "cpu":
        return [*cells, "-"]
    floor = maps / copy_bytes_per_second(device) / forward["ours"]
    return [*cells, f"{floor:.0%}"]


def models(device: str) -> dict[str, nn.Module]:
    ours, gather = (timm.create_model("biformer_tiny").to(device).eval() for _ in range(2))
    gather.load_state_dict(ours.state_dict())
    for name, layer in list(gather.named_modules()):
        if isinstance(layer, BiLevelRoutingAttention):
            gather.set_submodule(name, GatheringAttention(layer))
    return {"ours": ours, "gather": gather}


def measure_model(batch: int, rounds: int, device: str) -> Table:
    table = Table(title=f"BiFormer-T, inference, batch {batch}, float32, {device}, {rounds} interleaved rounds")
    table.add_column("px", no_wrap=True)
    for name in ("img/s", "gather img/s", "ratio", "memory MB", "gather MB"):
        table.add_column(name, justify="right", no_wrap=True)
    nets = models(device)
    for size in IMAGE_SIZES:
        images = torch.randn(batch, 3, size, size, device=device)
        steps = {name: torch.inference_mode()(lambda net=net, x=images: net(x)) for name, net in nets.items()}
        difference = (steps["ours"]() - steps["gather"]()).abs().max()
        if difference > 1e-3 * steps["gather"]().abs().max():
            raise RuntimeError(f"the logits of the two models differ by {difference}")
        seconds = interleaved_seconds(steps, rounds=rounds, device=device)
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
        speeds = [f"{batch / seconds[name]:.1f}" for name in steps]
        memory = ["-" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks.values()]
        table.add_row(str(size), *speeds, f"{seconds['gather'] / seconds['ours']:.2f}", *memory)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__)
    parser.add_argument("what", nargs="?", choices=["op", "model"], default="op", help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    options = parse_and_set_threads(parser, arguments)
    measure = measure_op if options.what == "op" else measure_model
    table = measure(options.batch, options.rounds, options.device)
    write_report(table, module=MODULE, machine=describe_machine(options.device), out=options.out)


if __name__ == "__main__":
    main()
