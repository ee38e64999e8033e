"""Views of layers without queries and keys: gates, pooling weights, and the effective field of large kernels.

Effective field   of a query position p: for every position r of the layer's input, the norm over input channels of the
                  gradient of out[p], summed over output channels, by in[r]. Exact, by autograd, for the image at hand.
                  The measure is that of Luo et al. 2016, arXiv:1701.04128, for one layer and every position.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, SEModule
from timm.layers.squeeze_excite import SqueezeExciteCl
from torch import Tensor, nn

from .._timm import SqueezeExcite
from ..attention_ops import LargeKernelAttention
from ..attention_ops.attention_pool import GaussianPool, LamaPool, gaussian_weights, lama_weights
from ..attention_ops.channel_gate import EfficientChannelAttention
from ..attention_ops.strip_gate import EfficientLocalAttention
from ..attention_ops.subspace_gate import SubspaceAttention
from ..backbones.ninformer import NinformerBlock
from .capture import Call
from .places import Size
from .views import AttentionView, Canvas, GateView, Grid, View

FIELD = "effective field"
CHUNK = 1 << 24  # numbers of the copies of a layer's input

See = Callable[[list[View]], None]


def gates_of_call(call: Call, queries: Grid) -> list[View]:
    """Return the gates that are arguments of a call: of heads (MoH), of outputs, of a token's messages."""
    names = {"gates": "gates", "gate": "gates"} | ({"weight": "messages"} if call.op == "reversed_attention" else {})
    found: list[View] = []
    for name, branch in names.items():
        if isinstance(gate := call.arguments.get(name), Tensor):  # (B, H, W, heads), (B, N, heads)
            values = gate.detach().float().cpu().flatten(0, -2).T.contiguous()  # (heads, tokens of all windows)
            found.append(_on_image(call.layer, call.op, branch, values, queries, "gate"))
    return found


def _on_image(layer: str, op: str, branch: str, values: Tensor, grid: Grid, unit: str, word: str = "head") -> GateView:
    """`values`: (maps, tokens). Without a place for tokens, one row each."""
    names = (word,) if len(values) == 1 and word != "head" else tuple(f"{word} {i}" for i in range(len(values)))
    if not grid.is_placed:
        return GateView(layer, op, branch, values[:, None], names, ("", "token"), None, unit)
    return GateView(layer, op, branch, grid.on_map(values), names, ("y", "x"), grid.cell, unit)


@contextlib.contextmanager
def watching_gates(model: nn.Module, canvas: Canvas, see: See) -> Iterator[None]:
    """Inside, `see` gets the views of every gate, pooling and large kernel, as the model comes to them."""
    handles = []
    for name, module in model.named_modules():
        for kind, view in VIEWS.items():
            if isinstance(module, kind):

                def hook(module: Any, args: tuple, out: Any, name: str = name, view: Any = view) -> None:
                    with torch.no_grad():
                        see(view(name, module, args[0].detach(), canvas))

                handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_gate(name: str, module: EfficientChannelAttention, x: Tensor, canvas: Canvas) -> list[View]:
    return [_of_channels(name, "channel gate", module.gate(x))]


def _timms_gate(name: str, module: Any, x: Tensor, canvas: Canvas) -> list[View]:
    """Squeeze and excite, timm's ECA: the output of its last activation, which multiplies the map."""
    found: list[Tensor] = []
    with module.gate.register_forward_hook(lambda _, args, out: found.append(out)):
        type(module).forward(module, x)
    return [_of_channels(name, "channel gate", found[0].flatten(1))]


def _of_channels(name: str, op: str, gate: Tensor) -> GateView:  # (1, C)
    return GateView(name, op, "", gate.float().cpu()[:, None], ("channels",), ("", "channel"), None, "gate")


def _strip_gate(name: str, module: EfficientLocalAttention, x: Tensor, canvas: Canvas) -> list[View]:
    of_both = zip(module.gates(x), ("rows", "columns"), ("row", "column"), strict=True)
    return [
        GateView(name, "strip gate", branch, gate.float().cpu(), ("channels",), ("channel", axis), None, "gate")
        for gate, branch, axis in of_both
    ]


def _subspaces(name: str, module: SubspaceAttention, x: Tensor, canvas: Canvas) -> list[View]:
    maps = module.attention(x)[0].float().cpu()  # (groups, H, W)
    grid = _whole_map((maps.shape[1], maps.shape[2]), canvas)
    return [_on_image(name, "subspace gate", "", maps.flatten(1), grid, "probability", "group")]


def _large_kernel(name: str, module: LargeKernelAttention, x: Tensor, canvas: Canvas) -> list[View]:
    grid = _whole_map((x.shape[2], x.shape[3]), canvas)

    def outputs(copies: Tensor) -> Tensor:  # (n, C, H, W) -> (n, H * W)
        return module(copies).sum(1).flatten(1)

    return [_field(name, outputs, x, 1, grid)]


def _token_mixer(name: str, block: NinformerBlock, x: Tensor, canvas: Canvas) -> list[View]:
    """The gate that the mixer makes, and its field."""
    tokens = block.norm(x.flatten(1, 2))
    grid = _whole_map((x.shape[1], x.shape[2]), canvas)

    def outputs(copies: Tensor) -> Tensor:  # (n, N, C) -> (n, N)
        return block.mixer(copies).sum(2)

    gate = block.mixer(tokens).abs().mean(2).float().cpu()  # (1, N)
    mean = _on_image(f"{name}.mixer", "token mixer", "gate", gate, grid, "mean size of the gate", "all channels")
    return [mean, _field(f"{name}.mixer", outputs, tokens, 2, grid)]


def _field(name: str, outputs: Callable[[Tensor], Tensor], x: Tensor, axis: int, grid: Grid) -> AttentionView:
    """`axis`: of the channels of the input."""
    most = max(1, CHUNK // x.numel())

    def rows_of(rows: Tensor) -> Tensor:
        found = []
        for few in rows.to(x.device).split(most):
            copies = x.expand(len(few), *x.shape[1:]).clone().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(outputs(copies)[torch.arange(len(few)), few].sum(), copies)
            found.append(grad.norm(dim=axis).flatten(1))
        return torch.cat(found)[None] if found else x.new_zeros(1, 0, len(grid.places))

    return AttentionView(name, FIELD, "", 1, grid, grid, "gradient norm", "token", rows_of)


def _whole_map(size: Size, canvas: Canvas) -> Grid:
    row, col = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return Grid(size, canvas.cell(size), torch.stack([row, col], -1).flatten(0, 1))


def _lama(name: str, module: LamaPool, x: Tensor, canvas: Canvas) -> list[View]:
    return [_pooling(name, lama_weights(x, module.p, module.q)[0], canvas)]


def _gaussian(name: str, module: GaussianPool, x: Tensor, canvas: Canvas) -> list[View]:
    grouped = x.unflatten(2, (module.heads, -1))
    weights = gaussian_weights(grouped, module.mean_offsets[:, None], module.c[:, None], dim=1)
    return [_pooling(name, weights[0].mean(-1).T, canvas)]  # the mean over the channels of a head


def _pooling(name: str, weights: Tensor, canvas: Canvas) -> GateView:  # (heads, N)
    tokens, wanted = weights.shape[1], math.log(canvas.size[0] / canvas.size[1])
    pairs = [(n, tokens // n) for n in range(1, tokens + 1) if tokens % n == 0]
    size = min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1]) - wanted))
    return _on_image(name, "attention pooling", "", weights.float().cpu(), _whole_map(size, canvas), "weight")


VIEWS: dict[type[nn.Module], Callable[..., list[View]]] = {
    EfficientChannelAttention: _channel_gate,
    EfficientLocalAttention: _strip_gate,
    SubspaceAttention: _subspaces,
    LargeKernelAttention: _large_kernel,
    NinformerBlock: _token_mixer,
    LamaPool: _lama,
    GaussianPool: _gaussian,
    **dict.fromkeys((SEModule, EffectiveSEModule, SqueezeExcite, SqueezeExciteCl), _timms_gate),
    **dict.fromkeys((EcaModule, CecaModule), _timms_gate),
}
