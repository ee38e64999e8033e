"""The kernels' ops under torch's own machinery, run by Triton's interpreter: opcheck, compile, and the layers."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from gates import by_op
from ops import CASES
from torch._dynamo.backends.common import aot_autograd

from foveate.attention_ops import (
    BiLevelRoutingAttention,
    ChannelAttention,
    EfficientChannelAttention,
    EfficientLocalAttention,
    HiLoAttention,
)
from foveate.kernels import register  # noqa: F401  registers the ops

LAYERS = {
    "routed": lambda: BiLevelRoutingAttention(16, 2, 2, 2),
    "hilo": lambda: HiLoAttention(16, 2, 2, 0.5),
    "channel": lambda: ChannelAttention(16, 2),
    "channel gate": lambda: by_op(EfficientChannelAttention(16)),
    "strip gate": lambda: by_op(EfficientLocalAttention(16)),
}
ONE_OF_EACH = list({case.name: name for name, case in CASES.items()}.values())  # of the ops
SOME = [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
NODES = {"routed": "routed_attention", "hilo": "local_attention", "channel": "channel_attention"}


def results(layer, x, run):
    out = run(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_in_one_graph_with_gradients(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    x = torch.randn(1, 16, 4, 6) if "gate" in kind else torch.randn(1, 4, 6, 16)
    x.requires_grad_()
    nodes = []

    def note(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    for ours, eager in zip(results(layer, x, compiled), results(layer, x, layer), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    op = NODES.get(kind, kind.replace(" ", "_"))
    assert [f"foveate.{op}_{way}.default" in nodes for way in ("forward", "backward")] == [True, True]


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_equal_their_double_selves_which_no_kernel_runs(kind):
    torch.manual_seed(0)
    layer, x = LAYERS[kind](), torch.randn(1, 16, 5, 7)
    x = F.pad(x, (0, 1, 0, 1)) if "gate" in kind else x.permute(0, 2, 3, 1)
    x.requires_grad_()
    single = results(layer, x, layer)
    layer = layer.double()
    double = results(layer, x.detach().double().requires_grad_(), layer)
    for ours, truth in zip(single, double, strict=True):
        assert (ours - truth).abs().max() <= 1e-5 * max(truth.abs().max(), 1)


@cache
def refusal(name) -> str | None:
    """The reason why no kernel takes a case with gradients."""
    try:
        CASES[name].call(*CASES[name].tensors(torch.float32), impl="fused")
    except NotImplementedError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CASES)
def test_transforms_never_reach_a_kernel(name):
    """The kernels would drop tangents silently: by name they refuse, and `auto` takes the differentiable body."""
    case, why = CASES[name], refusal(name)
    refused = r"cannot run here: the kernels support neither torch\.func nor" if why is None else "cannot run here"
    tensors, tangents = (tuple(case.tensors(torch.float32, seed, grad=False)) for seed in (0, 1))
    for transform in (
        lambda call: torch.func.jvp(call, tensors, tangents)[1],
        lambda call: torch.func.grad(lambda *t: call(*t).sum())(*tensors),
        lambda call: torch.func.vmap(call)(*(t[None] for t in tensors)),
    ):
        with pytest.raises(NotImplementedError, match=refused):
            transform(lambda *t: case.call(*t, impl="fused"))
        ours, reference = (transform(lambda *t, i=impl: case.call(*t, impl=i)) for impl in ("auto", "reference"))
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_a_second_derivative_of_a_kernel_is_refused(name):
    if (why := refusal(name)) is not None:
        assert "cannot run here" in why
        return
    tensors = CASES[name].tensors(torch.float32)
    (first,) = torch.autograd.grad(
        CASES[name].call(*tensors, impl="fused").square().sum(), tensors[:1], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="the fused kernels can be differentiated once; use impl='tiled'"):
        first.sum().backward()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_backward_pass_inside_autocast_gives_the_same_gradients(name):
    """Users may call backward inside autocast: what it calls of torch keeps the dtypes of its tensors."""
    if (why := refusal(name)) is not None:
        assert "cannot run here" in why
        return
    tensors, grads = CASES[name].tensors(torch.float32), []
    for on in (False, True):
        out = CASES[name].call(*tensors, impl="fused")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            grads.append(torch.autograd.grad(out, tensors, torch.ones_like(out)))
    for inside, outside in zip(*grads, strict=True):
        assert torch.equal(inside, outside)
