"""Gates, halo and channel attention under torch's own machinery: compile, export, script, autocast, meta."""

import pytest
import torch
from torch.export import Dim

from foveate.attention_ops import ChannelAttention, EfficientChannelAttention, EfficientLocalAttention, HaloAttention2d

LAYERS = {
    "channel gate": lambda: EfficientChannelAttention(16),
    "strip gate": lambda: EfficientLocalAttention(16, "s"),
    "halo": lambda: HaloAttention2d(16, heads=2, block_size=4, halo=1),
    "strided halo": lambda: HaloAttention2d(16, heads=2, block_size=4, halo=1, stride=2),
    "channel": lambda: ChannelAttention(16, 2),
    "channel by tokens": lambda: ChannelAttention(16, 2, by_tokens=True),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def layer(kind):
    torch.manual_seed(0)
    return LAYERS[kind]()


def image(kind, batch=2, height=8, width=12):
    x = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(1))
    return x.permute(0, 2, 3, 1) if kind.startswith("channel") and kind != "channel gate" else x


@every_layer
def test_compile_in_one_graph_with_gradients(kind):
    module, x = layer(kind).double(), image(kind).double().requires_grad_()
    expected = module(x)
    grad = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    torch._dynamo.reset()
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]), grad)


@every_layer
def test_export_with_dynamic_batch(kind):
    module = layer(kind).eval()
    program = torch.export.export(module, (image(kind),), dynamic_shapes=({0: Dim("batch")},))
    other = image(kind, 5)
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("kind", [k for k in LAYERS])
def test_export_with_dynamic_size(kind, export_any_size):
    module = layer(kind).eval()
    height, width = (1, 2) if image(kind).shape[-1] == 16 else (2, 3)
    sizes = {0: Dim("batch"), height: Dim("height", min=4, max=512), width: Dim("width", min=4, max=512)}
    program = export_any_size(module, image(kind), sizes)
    for size in [(1, 6, 6), (3, 16, 40), (2, 31, 7)]:
        torch.testing.assert_close(program.module()(image(kind, *size)), module(image(kind, *size)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@every_layer
def test_script(kind, tmp_path):
    module = layer(kind).eval()
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    x = image(kind, 1, 5, 9)
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "module.pt"))(x), module(x))


@every_layer
def test_autocast_runs_in_its_dtype_and_gradients_stay_float32(kind):
    module, x = layer(kind), image(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)


@every_layer
def test_meta_tensors_give_the_shape(kind):
    expected = layer(kind)(image(kind)).shape
    with torch.device("meta"):
        module, x = layer(kind), torch.empty(image(kind).shape)
    assert module(x).shape == expected
