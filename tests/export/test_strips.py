"""1-D convolutions become 2-D ones for ExecuTorch, whose own rewriting fails where a layer is called twice."""

import copy

import pytest
import torch
from torch import nn

from foveate.attention_ops import EfficientChannelAttention, EfficientLocalAttention
from foveate.export import export_executorch, open_file
from foveate.export.strips import decompositions, fold_weights
from foveate.export.xnnpack import without_cycles


class Twice(nn.Module):
    """One layer for rows and for columns."""

    def __init__(self, strip: nn.Module) -> None:
        super().__init__()
        self.stem, self.strip = nn.Conv2d(3, 8, 3), strip

    def forward(self, x):
        maps = self.stem(x)
        return self.strip(maps.mean(3)).sum(2) + self.strip(maps.mean(2)).sum(2)


class Penalized(Twice):
    """Something else reads the weight too."""

    def forward(self, x):
        return super().forward(x) * self.strip.weight.square().mean()


class Frozen(nn.Module):
    """A weight that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.randn(8, 1, 3))
        self.register_buffer("lost", torch.randn(8, 1, 3), persistent=False)

    def forward(self, x):
        y = torch.nn.functional.conv1d(x.mean(3).repeat(1, 4, 1)[:, :8], self.taps, stride=2, groups=8)
        return torch.nn.functional.conv1d(y, self.lost, None, 1, 1, 1, 8).sum(2)


def gated(gate: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), gate, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


CASES = {
    "strided, dilated, grouped": lambda: Twice(nn.Conv1d(8, 8, 3, stride=2, dilation=2, groups=2)),
    "same padding, no bias": lambda: Twice(nn.Conv1d(8, 4, 4, padding="same", bias=False)),
    "reflected": lambda: Twice(nn.Conv1d(8, 4, 3, padding=1, padding_mode="reflect")),
    "transposed": lambda: Twice(nn.ConvTranspose1d(8, 6, 3, 2, 1, 1, groups=2)),
    "chain": lambda: Twice(nn.Sequential(nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.Conv1d(4, 4, 1))),
    "odd same padding": lambda: Twice(nn.Conv1d(8, 4, 3, padding="same", dilation=2)),
    "buffers": Frozen,
    "penalized": lambda: Penalized(nn.Conv1d(8, 8, 3)),
    "ela": lambda: gated(EfficientLocalAttention(8, "l")),
    "eca": lambda: gated(EfficientChannelAttention(8)),
}
X = torch.randn(2, 3, 20, 32, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim("batch", max=8)},)
    return fold_weights(torch.export.export(model, (X,), dynamic_shapes=batch).run_decompositions(decompositions()))


@pytest.mark.filterwarnings("ignore:.*even kernel lengths")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_convolutions_have_two_axes_and_stored_weights(case):
    torch.manual_seed(0)
    model = CASES[case]().eval()
    before = copy.deepcopy(model.state_dict())
    program = exported(model)
    convolutions = [n for n in program.graph.nodes if "conv" in str(n.target) and n.op == "call_function"]
    assert {n.args[1].meta["val"].dim() for n in convolutions} == {4}
    stored = [n.args[1].op == "placeholder" for n in convolutions]
    assert all(stored) if case != "penalized" else stored == [True, False, False]
    for batch in (1, 2, 5):
        x = X[:1].repeat(batch, 1, 1, 1)
        torch.testing.assert_close(program.module()(x), model(x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_parts_that_wait_for_each_other_are_split():
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    a, b = graph.call_function(torch.relu, (x,)), graph.call_function(torch.mul, (x, weight))
    outside = graph.call_function(torch.exp, (b,))
    c, d = graph.call_function(torch.mul, (a, weight)), graph.call_function(torch.relu, (outside,))
    graph.output((c, d))
    assert without_cycles(graph, [[a, c], [weight, b], [d]]) is None
    assert without_cycles(graph, [[a], [weight, b, c]]) is None
    parts = without_cycles(graph, [[a, d], [weight, b, c]])
    assert parts is not None and sorted(map(set, parts), key=len) == [{a}, {d}, {c}, {weight, b}]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*even kernel lengths")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_executorch_runs_them(case, tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = CASES[case]().eval()
    run = open_file(export_executorch(model, tmp_path / "net.pte", example=X)).run
    for batch in (1, 2, 5):
        x = X[:1].repeat(batch, 1, 1, 1)
        torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-5)
