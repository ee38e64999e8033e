"""Simplified ONNX graphs: the same outputs from fewer nodes, in a time that grows with their number."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.export.onnx_graph import LEAST_GROWN, simplify


class Tables(nn.Module):
    """A convolution, its batch norm, and a small table of which every image reads a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.table = nn.Parameter(torch.randn(8, 16))
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        wide = self.table[:, :, None] + self.table[:, None]  # (8, 16, 16)
        wide = torch.cat([wide] * 4).reshape(8, 32, 32)
        return F.relu(self.norm(self.conv(x)) + wide)[:, :, 2:][:, :, :-3]


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, x):
        for i in range(self.depth):
            x = x + x[:, :, i % 7 :][:, :, :16].mean((2, 3), keepdim=True)
        return x


def graph_of(model: nn.Module, x):
    """The model's graph as torch exports it, without simplification."""
    options = {"dynamo": True, "verbose": False, "optimize": False, "input_names": ["images"]}
    return torch.onnx.export(model.eval(), (x,), **options)


def run(graph, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_outputs_stay_and_nodes_go(x):
    graph = graph_of(model := Tables(), x)
    before = len(graph.model.graph)
    simplify(graph.model)
    kinds = [node.op_type for node in graph.model.graph]
    assert len(kinds) < before / 2 and "BatchNormalization" not in kinds and "Constant" not in kinds
    torch.testing.assert_close(run(graph, x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_no_stored_constant_is_larger_than_what_it_is_made_of(x):
    graph = graph_of(Tables(), x)
    simplify(graph.model)
    assert max(value.const_value.size for value in graph.model.graph.initializers.values()) <= LEAST_GROWN
    assert 8 * 32 * 32 > LEAST_GROWN


class Shared(nn.Module):
    """One linear layer that reads two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 120, bias=False)  # more numbers than onnxscript folds of a shared weight

    def forward(self, x):
        return self.linear(x.flatten(2)[..., :96]) + self.linear(x.flatten(2)[..., 96:192])


def test_a_weight_that_two_products_read_is_stored_as_they_read_it(x):
    graph = graph_of(model := Shared(), x)
    simplify(graph.model)
    assert "Transpose" not in {node.op_type for node in graph.model.graph}
    stored = [value.const_value.size for value in graph.model.graph.initializers.values()]
    assert stored.count(96 * 120) == 1
    torch.testing.assert_close(run(graph, x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_no_rule_tries_pairs_of_nodes(x, monkeypatch):
    """The rules look at a node and those before it: twice the nodes take twice the steps."""
    from onnxscript.rewriter import _matcher

    plain, steps = _matcher.SimplePatternMatcher._init_match, []
    monkeypatch.setattr(
        _matcher.SimplePatternMatcher, "_init_match", lambda self, *args: steps.append(None) or plain(self, *args)
    )
    taken = []
    for depth in (10, 20):
        graph = graph_of(Deep(depth), x)
        steps.clear()
        simplify(graph.model)
        taken.append(len(steps))
    assert 0 < taken[1] < 3 * taken[0]
