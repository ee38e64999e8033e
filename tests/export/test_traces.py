"""torch.jit.trace of every kind of model: plain torch operations, right for another batch, loaded without foveate."""

import subprocess
import sys

import pytest
import torch
from small_models import KINDS, alive, small

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning"
)


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def trace(name: str) -> tuple[torch.nn.Module, torch.jit.ScriptModule]:
    model = alive(small(name, num_classes=5))
    return model, torch.jit.trace(model, images(2), check_trace=False)


@pytest.mark.parametrize("name", [n if ":" not in n else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_a_trace_equals_the_model(name):
    model, traced = trace(name)
    assert not [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("foveate::")]
    for batch in (2, 3):
        with torch.no_grad():
            out, plain = traced(images(batch)), model(images(batch))
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4 * float(plain.std()))


def test_a_saved_trace_needs_torch_alone(tmp_path):
    model, traced = trace("nat_mini")
    traced.save(str(tmp_path / "model.pt"))
    torch.save((images(3), model(images(3)).detach()), tmp_path / "pair.pt")
    script = """
import sys, torch
x, wanted = torch.load(sys.argv[2])
torch.testing.assert_close(torch.jit.load(sys.argv[1])(x), wanted, rtol=1e-4, atol=1e-4)
assert "foveate" not in sys.modules
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt"), str(tmp_path / "pair.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
