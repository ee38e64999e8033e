"""Outliers of activations and accuracy in simulated int8, with and without clipped softmax and gates: same training.

    python -m foveate.benchmarks.outliers --runs runs/outliers --threads 2 --out benchmarks/results/outliers_cpu.txt

Models       The quantizable ViT of the digits recipe in five forms, each trained by this recipe with the same seed;
             what DIR does not hold yet is trained there.
Outliers     Of the outputs of blocks, attention and MLPs on the 1000 held-out digits: largest mean of the largest
             number of an image, mean and largest kurtosis (3 for normal numbers), as in the paper.
W8A8         Top-1 by simulated int8 with the paper's settings (`simulate_int8`), on 16 batches of training digits.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from ..export.outliers import measure_outliers
from ..export.simulate import OUTLIER_FREE, simulate_int8
from ._digits_runs import digits, observed_digits, top1, trained
from ._timing import common_parser, describe_machine, parse_and_set_threads, write_report

MODULE = "foveate.benchmarks.outliers"
RECIPE = "quantizable_vit_micro_1xb64_mnist5k"
FORMS: dict[str, dict[str, Any]] = {  # keywords of the model
    "plain": {},
    "clipped softmax": {"softmax_clip": (-0.003, 1.0)},
    "linear gate": {"gate": "linear"},
    "both": {"softmax_clip": (-0.003, 1.0), "gate": "linear"},
    "patch norm, gate": {"gate": "linear", "patch_norm": True},
}
MEASURED = re.compile(r"blocks\.\d+(\.(attn|mlp))?")
BATCH = 64


@dataclass(frozen=True)
class Row:
    """Measurements of one form: top-1 in %, outliers over all measured modules."""

    form: str
    float32: float
    int8: float
    inf_norm: float
    mean_kurtosis: float
    max_kurtosis: float


def measure(form: str, keywords: Mapping[str, Any], folder: Path, *, seed: int, epochs: int | None) -> Row:
    """Train a form where `folder` holds no run, and measure it."""
    options = {f"model.{name}": keywords.get(name) for name in ("softmax_clip", "gate")} | {"seed": seed}
    options |= {"model.patch_norm": True} if keywords.get("patch_norm") else {}
    model = trained(RECIPE, folder, options, epochs)
    (images, targets), observed = digits("validation"), observed_digits(OUTLIER_FREE.batches * BATCH)
    chosen = measure_outliers(model, images.split(BATCH), lambda name: MEASURED.fullmatch(name) is not None).values()
    int8 = simulate_int8(model, observed.split(BATCH))
    kurtoses = [one.kurtosis for one in chosen]
    return Row(
        form,
        top1(model, images, targets),
        top1(int8, images, targets),
        max(one.inf_norm for one in chosen),
        sum(kurtoses) / len(kurtoses),
        max(kurtoses),
    )


def tabulate(rows: list[Row], seed: int, epochs: int | None) -> Table:
    trained_for = "" if epochs is None else f", {epochs} epochs"
    table = Table(title=f"{RECIPE}, seed {seed}{trained_for}: top-1, %, and outliers of activations")
    for name in ("form", "float32", "W8A8", "max. norm", "mean kurtosis", "max. kurtosis"):
        table.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
    for row in rows:
        outliers = (f"{value:.2f}" for value in (row.inf_norm, row.mean_kurtosis, row.max_kurtosis))
        table.add_row(row.form, f"{row.float32:.1f}", f"{row.int8:.1f}", *outliers)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = common_parser(MODULE, __doc__, rounds=None)
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--epochs", type=int, help="epochs of training (default: the recipe's)")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the runs in DIR, and take those there")
    options = parse_and_set_threads(parser, arguments)
    with TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)
        kwargs = {"seed": options.seed, "epochs": options.epochs}
        rows = [measure(form, keywords, runs / form.replace(" ", "-"), **kwargs) for form, keywords in FORMS.items()]
    table = tabulate(rows, options.seed, options.epochs)
    write_report(table, module=MODULE, machine=describe_machine(), out=options.out)


if __name__ == "__main__":
    main()
