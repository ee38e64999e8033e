"""The layers of the ops under torch's own machinery: compile, export, script, autocast, checkpointing, meta."""

import pytest
import torch
from ops import OnMap, OnTokens
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from foveate.attention_ops import (
    AgentAttention,
    BiLevelRoutingAttention,
    BiLevelRoutingAttentionNchw,
    ChannelAttention,
    EfficientChannelAttention,
    EfficientLocalAttention,
    GatedAttention,
    GroupedQueryAttention,
    HaloAttention2d,
    HiLoAttention,
    LargeKernelAttention,
    MohAggregatedAttention,
    MohAttention,
    NeighborhoodAttention2d,
    ReducedAgentAttention,
    ReversedAttention,
    SparsifiedAttention,
    SubspaceAttention,
    WindowAttention2d,
)
from foveate.attention_ops.mixers import create_mixer


class Circle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        q, k, v = x.unflatten(-1, (1, 2, -1)).expand(-1, -1, -1, 3, -1, -1).unbind(3)
        return torch.ops.foveate.circle_attention(q, k, v, 3).flatten(3)


def mixed(name: str, **keywords) -> nn.Module:
    """A registered token mixer on a map."""
    return OnMap(create_mixer(name, 16, 2, map_size=(13, 22), **keywords))


class Agents(nn.Module):
    """Agent attention on maps, made for another size than any test's, and with the means of rows as first token."""

    def __init__(self, prefix_tokens: int, agent_shape: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.prefix = prefix_tokens
        self.layer = AgentAttention(
            16, 2, map_size=(9, 11), prefix_tokens=prefix_tokens, agents=9, agent_shape=agent_shape
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        size, tokens = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        if self.prefix > 0:
            tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        return self.layer(tokens, size)[:, self.prefix :].unflatten(1, [size[0], size[1]])


LAYERS = {
    "agent": lambda: Agents(0),
    "agent with a class token": lambda: Agents(1, (4, 2)),
    "reduced agent": lambda: ReducedAgentAttention(16, 2, map_size=(9, 11), agents=9, sr_ratio=2),
    "circle": Circle,
    "neighborhood": lambda: NeighborhoodAttention2d(16, 2, 3, 2),
    "strided neighborhood": lambda: NeighborhoodAttention2d(16, 2, 3, stride=(2, 3), is_causal=(True, False)),
    "large kernel": lambda: LargeKernelAttention(16),
    "window": lambda: WindowAttention2d(16, 2, (3, 5)),
    "clipped window": lambda: WindowAttention2d(16, 2, (3, 5), clip=(-0.05, 1.0)),
    "clipped": lambda: OnMap(GatedAttention(16, 2, softmax_clip=(-0.003, 1.0), gate="mlp")),
    "reversed": lambda: OnMap(ReversedAttention(16, 2)),
    "sparsified": lambda: OnMap(SparsifiedAttention(16, 2, map_size=(13, 22))),
    "routed": lambda: BiLevelRoutingAttention(16, 2, 3, 2),
    "routed nchw": lambda: BiLevelRoutingAttentionNchw(16, 2, 3, 2),
    "hilo": lambda: HiLoAttention(16, 4, 2, 0.5),
    "channel": lambda: ChannelAttention(16, 2),
    "channel by tokens": lambda: ChannelAttention(16, 2, by_tokens=True),
    "halo": lambda: HaloAttention2d(16, heads=2, block_size=4, halo=1),
    "strided halo": lambda: HaloAttention2d(16, heads=2, block_size=4, halo=1, stride=2),
    "channel gate": lambda: EfficientChannelAttention(16),
    "strip gate": lambda: EfficientLocalAttention(16, "s"),
    "subspace gate": lambda: SubspaceAttention(16, 4),
    "grouped query": lambda: OnTokens(GroupedQueryAttention(16, 4, 2)),
    "grouped query by norms": lambda: OnTokens(GroupedQueryAttention(16, 4, 2, allocation="key_norm")),
    "attention": lambda: mixed("attention"),
    "flow": lambda: mixed("flow"),
    "causal flow": lambda: mixed("flow", form="causal"),
    "circle mixer": lambda: mixed("circle", radius=3, qk_norm=True),
    "routing": lambda: mixed("routing", clusters=3).eval(),  # in training every call moves the centroids
    "nprf": lambda: mixed("nprf", features=4),
    "mixture of heads": lambda: MohAttention(16, 4, shared=1, routed=2),
    "aggregated": lambda: MohAggregatedAttention(16, 4, sr_ratio=3, shared=1, routed=2),
}
CHOOSES = ("sparsified", "routing", "mixture of heads", "aggregated")  # rounded scores choose others
NCHW = ("large kernel", "routed nchw", "halo", "strided halo", "channel gate", "strip gate", "subspace gate")
# to the size that they are exported with: regions, adaptive pooling, tables and numbers of tokens of their own
TIED = ("routed", "routed nchw", "hilo", "mixture of heads", "aggregated", "nprf", "routing", "causal flow")


def layer(kind: str):
    torch.manual_seed(0)
    return LAYERS[kind]()


def image(*batch_and_size):
    b, h, w = batch_and_size or (2, 13, 22)
    return torch.randn(b, h, w, 16, generator=torch.Generator().manual_seed(1))


def as_input(kind, x):
    return x.permute(0, 3, 1, 2) if kind in NCHW else x


every_layer = pytest.mark.parametrize("kind", LAYERS)


@every_layer
def test_compile_in_one_graph_with_gradients(kind):
    module, x = layer(kind).double(), as_input(kind, image()).double().requires_grad_()
    torch._dynamo.reset()
    compiled, found = torch.compile(module, fullgraph=True, backend="aot_eager"), []
    for run in (compiled, module):
        out = run(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*found)


OWN_BODY = (
    "agent",
    "reduced agent",
    "circle",
    "neighborhood",
    "window",
    "clipped window",
    "clipped",
    "reversed",
    "sparsified",
    "routed",
    "routed nchw",
    "hilo",
    "halo",
    "strided halo",
    "grouped query",
)


@pytest.mark.parametrize("kind", OWN_BODY)
@pytest.mark.parametrize("casts", [False, True], ids=["float32", "autocast"])
def test_compiled_inference_calls_the_tiled_body(kind, casts):
    module, x, graphs = layer(kind), as_input(kind, image()), []

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
        out, plain = compiled(x), module(x)
    ours = [node.target for graph in graphs for node in graph.graph.nodes if str(node.target).startswith("foveate._")]
    assert len(ours) == 1
    torch.testing.assert_close(out, plain, **({"rtol": 0.016, "atol": 1e-3} if casts else {}))


@every_layer
def test_export_with_dynamic_batch(kind):
    module = layer(kind).eval()
    program = torch.export.export(module, (as_input(kind, image()),), dynamic_shapes=({0: Dim("batch")},))
    other = as_input(kind, image(5, 13, 22))
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in TIED])
def test_export_with_dynamic_size(kind, export_any_size):
    module = layer(kind).eval()
    rows, cols = (2, 3) if kind in NCHW else (1, 2)
    sizes = {0: Dim("batch"), rows: Dim("height", min=6, max=512), cols: Dim("width", min=6, max=512)}
    program = export_any_size(module, as_input(kind, image()), sizes)
    for size in [(1, 6, 6), (3, 16, 40), (2, 31, 7)]:
        x = as_input(kind, image(*size))
        torch.testing.assert_close(program.module()(x), module(x))


ONE_TILE = "a map of one tile"


@pytest.mark.parametrize("kind", [ONE_TILE, *(pytest.param(kind, marks=pytest.mark.slow) for kind in LAYERS)])
def test_onnx_export_where_gradients_are_recorded(kind, tmp_path):
    """The exporter decomposes SDPA by another rule than the one by which it recorded the graph."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module = NeighborhoodAttention2d(16, 2, 3).eval() if kind == ONE_TILE else layer(kind).eval()
    x = as_input(kind, image(2, 6, 6))
    torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(str(tmp_path / "layer.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    [out] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), module(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@every_layer
def test_script(kind, tmp_path):
    module = layer(kind).eval()
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    x = as_input(kind, image(1, 5, 9))  # 5 < kernel * dilation: padding happens inside the script
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "module.pt"))(x), module(x))


@every_layer
def test_autocast_runs_in_its_dtype_and_gradients_stay_float32(kind):
    module, x = layer(kind), as_input(kind, image()).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
    of_the_map = kind.endswith(" gate") or kind == "large kernel"
    assert out.dtype == (torch.float32 if of_the_map else torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    plain = module(x)
    close = (out.float() - plain).abs() <= 0.05 + 0.05 * plain.abs()
    assert close.float().mean() > 0.95 if kind in CHOOSES else close.all()


@every_layer
def test_activation_checkpointing_changes_nothing(kind):
    module = layer(kind)
    x = as_input(kind, image()).requires_grad_()
    plain = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(plain, again)


@every_layer
def test_meta_tensors_give_the_shape(kind):
    expected = layer(kind)(as_input(kind, image())).shape
    with torch.device("meta"):
        module, x = layer(kind), torch.empty(as_input(kind, image()).shape)
    assert module(x).shape == expected
