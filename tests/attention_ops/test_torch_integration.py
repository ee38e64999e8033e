"""The ops under torch's own machinery: opcheck, compile, export, script, autocast, checkpointing, meta."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from foveate.attention_ops import (
    BiLevelRoutingAttention,
    BiLevelRoutingAttentionNchw,
    HiLoAttention,
    LargeKernelAttention,
    NeighborhoodAttention2d,
    WindowAttention2d,
    circle_attention,
    hilo_attention,
    neighborhood_attention,
    routed_attention,
    window_attention,
)


class Circle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        q, k, v = x.unflatten(-1, (1, 2, -1)).expand(-1, -1, -1, 3, -1, -1).unbind(3)
        return torch.ops.foveate.circle_attention(q, k, v, 3, None, "auto").flatten(3)


LAYERS = {
    "circle": Circle,
    "neighborhood": lambda: NeighborhoodAttention2d(16, 2, 3, 2),
    "large kernel": lambda: LargeKernelAttention(16),
    "window": lambda: WindowAttention2d(16, 2, (3, 5)),
    "routed": lambda: BiLevelRoutingAttention(16, 2, 3, 2),
    "routed nchw": lambda: BiLevelRoutingAttentionNchw(16, 2, 3, 2),
    "hilo": lambda: HiLoAttention(16, 4, 2, 0.5),
}


def layer(kind: str):
    torch.manual_seed(0)
    return LAYERS[kind]()


def image(*batch_and_size):
    b, h, w = batch_and_size or (2, 13, 22)
    return torch.randn(b, h, w, 16, generator=torch.Generator().manual_seed(1))


def as_input(kind, x):
    return x.permute(0, 3, 1, 2) if kind in ("large kernel", "routed nchw") else x


every_layer = pytest.mark.parametrize("kind", LAYERS)


def packed(*size, parts=3, heads=2):
    return torch.randn(*size, parts, heads, 4, requires_grad=True).unbind(-3)


CALLS = {  # op: arguments
    "neighborhood_attention": (*packed(1, 9, 8), torch.randn(2, 5, 5), [3, 3], [1, 2], [False, True], None, "auto"),
    "circle_attention": (*packed(1, 9, 8), 3, None, "auto"),
    "window_attention": (*packed(1, 6, 8), None, None, [3, 4], None, "auto"),
    "routed_attention": (*packed(1, 6, 8), torch.arange(4).view(1, 4, 1), [3, 4], [3, 4], None, "auto"),
    "hilo_attention": (*packed(1, 6, 8), *packed(1, 6, 8, parts=1), *packed(1, 2, 3, parts=2), [3, 4], None, "auto"),
    "channel_attention": (*packed(1, 6, 8), None, "auto"),
    "halo_attention": (*packed(1, 6, 9), torch.randn(11, 4), torch.randn(15, 4), [2, 4], [2, 2], 1, None, "auto"),
    "channel_gate": (torch.randn(2, 6, 5, 4, requires_grad=True), torch.randn(1, 1, 3), "auto"),
    "strip_gate": (
        torch.randn(2, 6, 5, 4, requires_grad=True),
        torch.randn(6, 2, 3),
        torch.randn(6),
        torch.randn(6),
        3,
        1e-5,
        "auto",
    ),
    "bi_level_routes": (torch.randn(1, 6, 8, 2, 4), torch.randn(1, 6, 8, 2, 4), [3, 4], 2),
}


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    results = torch.library.opcheck(getattr(torch.ops.foveate, op).default, CALLS[op], test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


@every_layer
def test_compile_in_one_graph_with_gradients(kind):
    module = layer(kind).double()
    x = as_input(kind, image()).double().requires_grad_()
    expected = module(x)
    grad = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    torch._dynamo.reset()
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]), grad)


@every_layer
def test_export_with_dynamic_batch(kind):
    module = layer(kind).eval()
    program = torch.export.export(module, (as_input(kind, image()),), dynamic_shapes=({0: Dim("batch")},))
    other = as_input(kind, image(5, 13, 22))
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("kind", ["neighborhood", "window", "circle"])
def test_export_with_dynamic_size(kind, export_any_size):
    module = layer(kind).eval()
    sizes = {0: Dim("batch"), 1: Dim("height", min=6, max=512), 2: Dim("width", min=6, max=512)}
    program = export_any_size(module, image(), sizes)
    for size in [(1, 6, 6), (3, 16, 40), (2, 31, 7)]:
        torch.testing.assert_close(program.module()(image(*size)), module(image(*size)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@every_layer
def test_script(kind, tmp_path):
    module = layer(kind).eval()
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    x = as_input(kind, image(1, 5, 9))  # 5 < kernel * dilation: padding happens inside the script
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "module.pt"))(x), module(x))


def test_autocast_runs_in_its_dtype_and_gradients_stay_float32():
    module = layer("neighborhood")
    x = image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.01)


def test_autocast_casts_the_op_itself():
    q = torch.randn(1, 9, 8, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert neighborhood_attention(q, q, q, 3).dtype == torch.bfloat16


def test_autocast_casts_the_tiled_ops_themselves():
    q, k, v = packed(1, 6, 8)
    routes = torch.arange(4).view(1, 4, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [
            window_attention(q, k, v, (3, 4)),
            circle_attention(q, k, v, 2),
            routed_attention(q, k, v, routes, region_size=(3, 4)),
            hilo_attention((q, k, v), (q, k, v), (3, 4)),
        ]
    assert [out.dtype for out in outs] == [torch.bfloat16] * 4


@every_layer
def test_activation_checkpointing_changes_nothing(kind):
    module = layer(kind)
    x = as_input(kind, image()).requires_grad_()
    plain = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(plain, again)


@every_layer
def test_meta_tensors_give_the_shape(kind):
    with torch.device("meta"):
        module = layer(kind)
        x = torch.empty(as_input(kind, image()).shape)
    assert module(x).shape == x.shape
