"""Count the nodes of every family's ONNX file, and what ONNX Runtime and OpenVINO make of it.

    python -m foveate.benchmarks.export_nodes --out benchmarks/results/export_nodes.txt

nodes        Of the file, constants apart.
Transpose    Of these, the transposes; Gather: the copies of rows.
after ORT    Nodes that are left when ONNX Runtime has optimized the graph for this CPU, and its transposes.
"""

import argparse
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from rich.table import Table

from ..export import export_onnx
from ._timing import describe_machine, write_report

MODULE = "foveate.benchmarks.export_nodes"
MODELS: tuple[str, ...] = (
    "nat_mini",
    "dinat_mini",
    "vitrpb_small",
    "biformer_tiny",
    "biformer_stl_nchw",
    "litv2_small",
)
MODELS += ("litv2_small", "fv_davit_tiny", "fv_halonet26t", "van_b1", "eca_resnet50", "ela_resnet50_l")


def kinds(path: Path) -> Counter[str]:
    """The nodes of a file by kind, without constants."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    return Counter(node.op_type for node in nodes if node.op_type != "Constant")


def optimized(path: Path, out: Path) -> Path:
    """Write what ONNX Runtime makes of a file when it loads it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(out), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


def count(name: str) -> tuple[Counter[str], Counter[str]]:
    """The nodes of a model's file, and those that ONNX Runtime leaves."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with TemporaryDirectory() as folder:
        file = export_onnx(model, Path(folder) / "model.onnx", example=torch.zeros(2, 3, 224, 224), dynamic=())
        return kinds(file), kinds(optimized(file, Path(folder) / "optimized.onnx"))


def tabulate(models: tuple[str, ...]) -> Table:
    table = Table(title="nodes of ONNX files, batch 2, 224 px")
    table.add_column("model", no_wrap=True)
    for title in ("nodes", "Transpose", "Gather", "after ORT", "Transpose after ORT"):
        table.add_column(title, justify="right")
    for name in models:
        file, loaded = count(name)
        numbers = (file.total(), file["Transpose"], file["Gather"], loaded.total(), loaded["Transpose"])
        table.add_row(name, *map(str, numbers))
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm model names")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    write_report(tabulate(tuple(options.models)), module=MODULE, machine=describe_machine(), out=options.out)


if __name__ == "__main__":
    main()
