"""The ops under torch's own machinery: opcheck, compile, export, script, autocast, checkpointing, meta."""

import pytest
import torch
from ops import CASES
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
)


class Circle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        q, k, v = x.unflatten(-1, (1, 2, -1)).expand(-1, -1, -1, 3, -1, -1).unbind(3)
        return torch.ops.foveate.circle_attention(q, k, v, 3).flatten(3)


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


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op, args, kwargs = CASES[name].op_call()
    assert torch.library.opcheck(op, args, kwargs, test_utils=CHECKS) == dict.fromkeys(CHECKS, "SUCCESS")


def test_opcheck_of_routes():
    args, kwargs = (torch.randn(1, 6, 8, 2, 4), torch.randn(1, 6, 8, 2, 4)), {"region_size": [3, 4], "topk": 2}
    results = torch.library.opcheck(torch.ops.foveate.bi_level_routes.default, args, kwargs, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")


@every_layer
def test_compile_in_one_graph_with_gradients(kind):
    module = layer(kind)
    x = as_input(kind, image()).requires_grad_()
    expected = module(x)
    grad = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    torch._dynamo.reset()
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    compiled = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(compiled, grad, rtol=1e-4, atol=1e-5)


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
