"""Speed of models with half of their heads and hidden channels cut, in PyTorch and ONNX Runtime.

    python -m foveate.benchmarks.pruning --batch 4 --threads 2

Models     Random weights. Speed does not depend on them, but the choice of layers in a global ranking does.
Pruned     Half of all heads and half of all hidden channels of the MLPs, by summed DIMAP scores. `layer`: half of each
           layer. `group`: ranked over the whole model, which removes more from late layers with small feature maps.
Verified   Logits of the pruned model against the masked model, and of the ONNX file against PyTorch.
"""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from ..export import export_onnx, verify
from ..pruning import Plan, plan
from ._timing import (
    common_parser,
    describe_machine,
    interleaved_seconds,
    parse_and_set_threads,
    write_report,
)

MODULE = "foveate.benchmarks.pruning"

MODELS = ("nat_mini", "fv_davit_tiny", "biformer_tiny")
SCOPES = ("layer", "group")
STRUCTURE = ("heads", "mlp")
RATIO = 0.5


@dataclass(frozen=True)
class Row:
    """One model, dense and pruned."""

    name: str
    scope: str
    params_share: float  # of the dense model
    macs_share: float
    seconds: dict[str, float]  # of one batch: "torch", "torch dense", "onnx", "onnx dense"


def measure(name: str, batch: int, img_size: int, rounds: int, *, with_onnx: bool) -> list[Row]:
    """Time a model and its two pruned versions."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    images = torch.randn(batch, 3, img_size, img_size)
    plans = {
        scope: plan(dense, "dimap", RATIO, structure=STRUCTURE, scope=scope, img_size=img_size) for scope in SCOPES
    }
    models = {"dense": dense} | {scope: _checked(p, dense, images) for scope, p in plans.items()}
    seconds = interleaved_seconds({("torch", key): _eager(m, images) for key, m in models.items()}, rounds=rounds)
    if with_onnx:  # separately: waiting threads of ONNX Runtime slow torch down
        with tempfile.TemporaryDirectory() as folder:
            calls = {
                ("onnx", key): _session(model, Path(folder) / f"{key}.onnx", images) for key, model in models.items()
            }
            seconds |= interleaved_seconds(calls, rounds=rounds, settle=True)
    return [_row(name, scope, plans[scope], seconds) for scope in SCOPES]


def _row(name: str, scope: str, p: Plan, seconds: dict[tuple[str, str], float]) -> Row:
    counts = p.counts
    mine = {runtime: taken for (runtime, key), taken in seconds.items() if key == scope}
    mine |= {f"{runtime} dense": taken for (runtime, key), taken in seconds.items() if key == "dense"}
    shares = counts.params_after / counts.params_before, counts.macs_after / counts.macs_before
    return Row(name, scope, *shares, mine)


def _checked(p: Plan, dense: nn.Module, images: Tensor) -> nn.Module:
    """Cut the model, and refuse to time it if its logits differ from the masked model."""
    smaller = p.cut(dense).eval()
    with torch.inference_mode():
        wanted = p.apply(deepcopy(dense))(images[:1])
        torch.testing.assert_close(smaller(images[:1]), wanted, rtol=0, atol=1e-4 * wanted.std().item())
    return smaller


def _eager(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return torch.inference_mode()(lambda: model(images))


def _session(model: nn.Module, path: Path, images: Tensor) -> Callable[[], object]:
    import onnxruntime

    export_onnx(model, path, example=images, dynamic=())
    verify(model, path, images, batch_sizes=(len(images),))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads slow other sessions
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, images.numpy()
    return lambda: session.run(None, {name: array})


def tabulate(rows: list[Row], batch: int, img_size: int, rounds: int) -> Table:
    size = f"batch {batch}, {img_size} px, float32, CPU, median of {rounds} interleaved rounds"
    table = Table(title=f"{RATIO:.0%} of heads and of MLP channels cut, {size}")
    for name in ("model", "ranked per"):
        table.add_column(name, no_wrap=True)
    for name in ("params", "GMACs", "torch img/s", "dense", "speed-up", "ORT img/s", "dense", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, row.scope, f"{row.params_share:.0%}", f"{row.macs_share:.0%}", *_cells(row, batch))
    return table


def _cells(row: Row, batch: int) -> list[str]:
    cells = []
    for runtime in ("torch", "onnx"):
        if runtime not in row.seconds:
            cells += ["-"] * 3
            continue
        ours, dense = row.seconds[runtime], row.seconds[f"{runtime} dense"]
        cells += [f"{batch / ours:.1f}", f"{batch / dense:.1f}", f"{dense / ours:.2f}"]
    return cells


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__, rounds=7)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm model names")
    parser.add_argument("--batch", type=int, default=4, help="images (default %(default)s)")
    parser.add_argument("--img-size", type=int, default=224, help="px (default %(default)s)")
    parser.add_argument("--no-onnx", action="store_true", help="without ONNX Runtime")
    options = parse_and_set_threads(parser, arguments)
    sizes = (options.batch, options.img_size, options.rounds)
    rows = [row for name in options.models for row in measure(name, *sizes, with_onnx=not options.no_onnx)]
    machine = describe_machine()
    write_report(tabulate(rows, *sizes), module=MODULE, machine=machine, out=options.out)


if __name__ == "__main__":
    main()
