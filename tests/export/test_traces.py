"""Every way out of PyTorch, for every kind of model: plain torch operations, and the same numbers."""

import subprocess
import sys

import pytest
import torch
from small_models import KINDS, SMALL, alive, small

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning"
)


def kinds(*default: str) -> pytest.MarkDecorator:
    """All kinds of models; the others are slow."""
    return pytest.mark.parametrize(
        "name", [n if n in default else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
    )


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def trace(name: str) -> tuple[torch.nn.Module, torch.jit.ScriptModule]:
    model = alive(small(name, num_classes=5))
    return model, torch.jit.trace(model, images(2), check_trace=False)


def check(model, run, batches=(2, 3)) -> None:
    for batch in batches:
        with torch.no_grad():
            out, plain = run(images(batch)), model(images(batch))
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4 * float(plain.std()))


@kinds(*SMALL)
def test_a_trace_equals_the_model(name):
    model, traced = trace(name)
    foreign = [n.kind() for n in traced.inlined_graph.nodes() if not n.kind().startswith(("aten::", "prim::"))]
    assert foreign == []  # neither ours nor torchvision's
    check(model, traced)


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


@kinds("nat_mini", "litv2_small")
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_torchs_own_export_holds_no_op_of_ours(name, strict):
    model = alive(small(name, num_classes=5))
    program = torch.export.export(model, (images(2),), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert [name for name in targets if name.startswith(("foveate", "torchvision"))] == []
    check(model, program.module(), batches=(2,))


@kinds("nat_mini", "vitrpb_small", "biformer_stl_nchw", "litv2_small")
def test_a_frozen_script_equals_the_model(name):
    model = alive(small(name, num_classes=5))
    check(model, torch.jit.freeze(torch.jit.script(model)))


ONNX = pytest.mark.parametrize("records", [False, True], ids=["no_grad", "with gradients"])


@kinds("nat_mini")
@ONNX
def test_torchs_own_onnx_export_with_and_without_gradients(name, records, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = alive(small(name, num_classes=5))
    with torch.set_grad_enabled(records):
        torch.onnx.export(model, (images(2),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0].name
    check(model, lambda x: torch.from_numpy(session.run(None, {feed: x.numpy()})[0]), batches=(2,))


@kinds("litv2_small")
def test_openvino_converts_a_trace(name):
    openvino = pytest.importorskip("openvino")
    model, traced = trace(name)
    converted = openvino.convert_model(traced, example_input=images(2))
    request = (
        openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    )
    check(model, lambda x: torch.from_numpy(request.infer({0: x.numpy()})[0].copy()), batches=(2,))
