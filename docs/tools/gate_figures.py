"""What gates and mixers read and give, computed by the ops, layers and models themselves."""

import timm
import torch
from panels import Panel
from pattern_figures import HEIGHT, INSIDE, REFERENCE, SIZE, WIDTH, identity, of_query, scene, zeros
from torch import Tensor

from foveate.attention_ops import (
    MohAttention,
    aggregated_attention,
    channel_gate,
    grouped_query_attention,
    large_kernel_attention,
    strip_gate,
    subspace_gate,
)
from foveate.attention_ops.attention_pool import gaussian_weights, lama_weights
from foveate.attention_ops.grouped_query import key_heads_of, key_norm_sizes
from foveate.backbones.ninformer import NinformerBlock


def large_kernel() -> list[Panel]:
    """VAN: the derivative of one output by the map, at a map of ones and equal taps, less the gate itself."""
    side, query = 31, (15, 15)
    x = torch.ones(1, 1, side, side, requires_grad=True)
    taps = torch.ones(1, 1, 5, 5) / 25, torch.ones(1, 1, 7, 7) / 49, torch.ones(1, 1, 1, 1)
    out = large_kernel_attention(x, taps[0], None, taps[1], None, taps[2], None, 3, impl=REFERENCE)
    out[0, 0, query[0], query[1]].backward()
    assert x.grad is not None
    field = x.grad[0, 0].clone()
    field[query] -= out[0, 0, query[0], query[1]].detach()  # x * gate(x): the gate of the query, where x is 1
    return [Panel("what one gate reads, 23x23", field, query)]


def channels() -> list[Panel]:
    """ECA: how the gate of a channel changes with the means of the channels beside it."""
    weight = torch.tensor([0.2, 0.5, 1.0, 0.5, 0.2]).view(1, 1, 5)

    def gated(means: Tensor) -> Tensor:
        return channel_gate(means.view(1, 16, 1, 1), weight, impl=REFERENCE).flatten()

    ones = torch.ones(16)
    jacobian = torch.autograd.functional.jacobian(gated, ones)
    assert isinstance(jacobian, Tensor)
    matrix = jacobian - torch.diag(gated(ones))  # x * gate(x), where x is 1
    return [Panel("kernel 5, 16 channels", matrix, labels=("mean of channel", "gate of channel"))]


def strips() -> list[Panel]:
    """ELA: the gates of rows and columns of one channel."""
    x = scene(16, seed=2).permute(0, 3, 1, 2) + 4
    weight = torch.ones(16, 1, 5) / 5
    out = strip_gate(x, weight, torch.full((16,), 2.0), torch.zeros(16), 4, impl=REFERENCE)
    return [
        Panel("one channel of a map", x[0, 0]),
        Panel("its gate: rows times columns", (out / x)[0, 0]),
    ]


def subspaces() -> list[Panel]:
    """ULSAM: the distributions over positions of two groups of channels."""
    x = scene(8, seed=3).permute(0, 3, 1, 2) + 4
    ones, zero = torch.ones(8), torch.full((8,), -4.0)
    out = subspace_gate(x, ones, zero, torch.full((2, 4), 2.0), torch.zeros(2), impl=REFERENCE)
    gates = (out / x - 1)[0]
    return [Panel("group 1: softmax over positions", gates[0]), Panel("group 2", gates[4])]


def heads() -> list[Panel]:
    """MoH: the gates of two heads that tokens choose, and the keys of TransNeXt's aggregated attention."""
    torch.manual_seed(0)
    layer = MohAttention(32, 8, shared=2, routed=2).eval()
    with torch.no_grad():
        gates = layer.gates(3 * scene(32, seed=4))[0]
    cells = (HEIGHT // 4, WIDTH // 4)
    pooled = torch.nn.functional.avg_pool2d(identity()[:, :, :, 0].permute(0, 3, 1, 2), 4).flatten(2).mT[:, :, None]
    count = cells[0] * cells[1]
    out = aggregated_attention(
        zeros(4), torch.zeros(1, count, 1, 4), pooled, zeros(4), identity(), embedding=torch.zeros(1, 4),
        temperature=torch.ones(1), pooled_bias=torch.zeros(1, 1, 1),
        bias_rows=torch.zeros(HEIGHT, cells[0], dtype=torch.int64),
        bias_cols=torch.zeros(WIDTH, cells[1], dtype=torch.int64), local_bias=torch.zeros(1, 3, 3),
        tokens=torch.zeros(1, 4, 9), token_bias=torch.zeros(1, 9), impl=REFERENCE,
    )  # fmt: skip
    return [
        Panel("gate of routed head 1", gates[..., 2]),
        Panel("gate of routed head 2", gates[..., 3]),
        Panel("keys: 3x3 around, and pooled cells", of_query(out, INSIDE), INSIDE, (4, 4)),
    ]


def grouped() -> list[Panel]:
    """Grouped-query attention: the key head of every query head, by two rules."""
    norms = torch.tensor([[1.0, 2.0, 3.5]])
    values = torch.eye(3).view(1, 1, 3, 3)  # entry g of key head g is 1

    def assigned(sizes: Tensor) -> Tensor:
        q, k = torch.zeros(1, 1, 12, 1), torch.zeros(1, 1, 3, 1)
        return grouped_query_attention(q, k, values, key_heads_of(sizes, 12), impl=REFERENCE)[0, 0]

    labels = ("key head", "query head")
    return [
        Panel('"uniform"', assigned(torch.tensor([[4.0, 4.0, 4.0]])), labels=labels),
        Panel('"key_norm", norms 1, 2, 3.5', assigned(key_norm_sizes(norms, 12)), labels=labels),
    ]


def mixed_gate() -> list[Panel]:
    """NiNformer: how much the output of one token changes with every token of the map, weights at random."""
    torch.manual_seed(0)
    model = timm.create_model("ninformer", dims=(16,), depths=(1,), hidden_dim=24, img_size=(48, 64)).eval()
    block = next(module for module in model.modules() if isinstance(module, NinformerBlock))
    x = scene(16, seed=5).requires_grad_()
    block(x)[0, INSIDE[0], INSIDE[1]].square().sum().backward()
    assert x.grad is not None
    change = x.grad[0].norm(dim=-1)
    change[INSIDE] = 0  # the token itself, through the shortcut
    return [Panel("influence of the other tokens", change, INSIDE)]


def pooling() -> list[Panel]:
    """LAMA's weights of two heads, and GAAM's weights of one channel."""
    x = scene(16, seed=16).flatten(1, 2)
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(16, 4, generator=generator) for _ in range(2))
    lama = lama_weights(x + 1, p, q)[0]
    offsets, widths = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.5])
    gaam = gaussian_weights(x[..., :1], offsets, widths, dim=1)[0, :, 0]
    return [
        Panel("LAMA, head 1", lama[0].view(SIZE)),
        Panel("LAMA, head 2", lama[2].view(SIZE)),
        Panel("GAAM, one channel", gaam.view(SIZE)),
    ]
