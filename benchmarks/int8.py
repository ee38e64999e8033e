"""Int8 files of every family: accuracy on real digits, size, and latency beside float32 in the same runtime.

    python -m foveate.benchmarks.int8 --runs runs/digits --threads 2 --out benchmarks/results/int8_cpu.txt

Accuracy   Top-1 on the 1000 held-out digits of the models of the digits recipes, in ONNX Runtime: float32, and int8 by
           every preset, calibrated on training digits. Models that DIR does not hold yet are trained there.
Speed      Milliseconds of a batch at --img-size, float32 and int8 files taking turns (see _timing.py), of models of
           published size with random weights. int8 is "-" on a CPU without VNNI or AMX. AOTI compiles for minutes a
           model: it is measured on request, `--runtimes onnxruntime openvino aoti`. Writing files takes most of the
           time: `--files DIR` keeps them, so that a second run, on a quiet machine, only measures. `--runtimes` without
           a name leaves speed out, as `--recipes` leaves out accuracy.
Size       Int8 file over float32 file. Files of digits models are mostly graph; the table of speed is of real sizes.
"""

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from .._errors import RequestError, first_line
from .._torch import has_vnni
from ..export import open_file
from ..export.formats import FORMATS, Format, Request, write
from ..export.int8 import file_bytes, write_quantized
from ..export.presets import PRESETS
from ..train import load_recipe
from ._digits_runs import digits, digits_recipes, observed_digits, top1, trained
from ._settings import ModelSettings, add_model_options, parse_model_settings
from ._timing import common_parser, describe_machine, interleaved_seconds, write_report

MODULE = "foveate.benchmarks.int8"
MODELS = (
    *("eca_resnet50", "ela_resnet50_b", "van_b1", "fv_davit_tiny", "biformer_tiny", "litv2_small", "nat_mini"),
    *("dinat_mini", "vitrpb_small", "fv_halonet26t", "agent_deit_tiny", "agent_pvt_tiny", "agent_swin_tiny"),
    *("agent_cswin_tiny", "moh_transnext_small_75", "flowformer_cv", "mixer_vit_tiny", "quantizable_vit_small"),
    *("sparsifiner_deit_small", "dependencyvit_small", "gqa_vit_small", "ulsam_mobilenetv2", "ninformer"),
)
RUNTIMES = {"onnxruntime": Format.ONNX, "openvino": Format.OPENVINO, "aoti": Format.AOTI}
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "aoti": "AOTI"}
KINDS = ("float32", "int8")
ONE_SIZE = ("ninformer",)  # models that take their own size only
NO_VNNI = "this CPU adds no int8 products (no VNNI, no AMX)"


@dataclass(frozen=True)
class Settings(ModelSettings):
    """One run of the benchmark."""

    models: tuple[str, ...] = MODELS
    batch: int = 1
    recipes: Sequence[str] = ()
    runtimes: Sequence[str] = ("onnxruntime", "openvino")
    runs: Path | None = None  # None: a temporary folder
    files: Path | None = None  # None: a temporary folder
    epochs: int | None = None  # None: the recipes'

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.runtimes if name not in RUNTIMES]:
            raise ValueError(f"unknown runtimes: {', '.join(unknown)}; known: {', '.join(RUNTIMES)}")
        if unknown := [name for name in self.recipes if name not in digits_recipes()]:
            raise ValueError(f"unknown recipes: {', '.join(unknown)}; known: {', '.join(digits_recipes())}")
        if not (self.recipes or self.runtimes):
            raise ValueError("wanted names of recipes, runtimes or both, got none")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"wanted at least 1, got epochs {self.epochs}")


@dataclass
class Accuracy:
    """Top-1 of one digits model in %, by "float32" and the names of presets; bytes of the files by the same names."""

    name: str
    top1: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Speed:
    """Seconds of a batch and bytes of the file, by runtime, float32 first; and why a runtime has none."""

    name: str
    seconds: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    bytes: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def measure_accuracy(recipe: str, folder: Path, epochs: int | None) -> Accuracy:
    """Train a digits model where `folder` holds none, and measure its files."""
    model, found = trained(recipe, folder, epochs=epochs), Accuracy(load_recipe(recipe).model.name)
    images, targets = digits("validation", recipe)
    with TemporaryDirectory() as temporary:
        for name in ("float32", *PRESETS):
            path = Path(temporary) / f"{name}.onnx"
            try:
                request = Request(model, path, Format.ONNX)
                if name == "float32":
                    write(request, path)
                else:
                    write_quantized(request, path, observed_digits(PRESETS[name].images, recipe), PRESETS[name])
                run = open_file(path).run
                found.top1[name] = top1(partial(_first, run), images, targets)
                found.bytes[name] = file_bytes(path)
            except RequestError as error:
                found.refused[name] = first_line(error)
    return found


def measure_speed(name: str, settings: Settings) -> Speed:
    """Measure the files of one model in all runtimes."""
    found, size = Speed(name), None if name in ONE_SIZE else settings.img_size
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(max(16, settings.batch), *_input_size(model, size))
    for runtime in settings.runtimes:
        with TemporaryDirectory() as temporary:
            folder = (settings.files or Path(temporary)) / name / runtime
            try:
                _measure_files(found, runtime, model, images, size, folder, settings)
            except RequestError as error:
                found.refused[runtime] = first_line(error)
        gc.collect()
    return found


def _measure_files(
    found: Speed, runtime: str, model: nn.Module, images: Tensor, size: int | None, folder: Path, settings: Settings
) -> None:
    name = f"net{FORMATS[RUNTIMES[runtime]].suffix}"
    if not folder.exists():
        _write_files(folder, name, partial(Request, model, format=RUNTIMES[runtime], img_size=size), images)
    paths = [folder / kind / name for kind in KINDS]
    found.bytes[runtime] = (file_bytes(paths[0]), file_bytes(paths[1]))
    timed = paths if has_vnni() else paths[:1]
    batch = images[: settings.batch]
    calls: dict[str, Callable[[], object]] = {p.parent.name: partial(open_file(p).run, batch) for p in timed}
    seconds = interleaved_seconds(calls, rounds=settings.rounds, warmup=3, settle=True)
    found.seconds[runtime] = (seconds["float32"], seconds.get("int8"))


def _write_files(folder: Path, name: str, request: Callable[[Path], Request], images: Tensor) -> None:
    """Write the float32 and the int8 file of a model; `folder` exists once both are complete."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    float32, int8 = (part / kind / name for kind in KINDS)
    for path in (float32, int8):
        path.parent.mkdir(parents=True)
    write(request(float32), float32)
    write_quantized(request(int8), int8, images)
    part.rename(folder)


def _input_size(model: nn.Module, size: int | None) -> tuple[int, int, int]:
    channels, *own = model.pretrained_cfg["input_size"]  # type: ignore[index]  # of timm's models
    return (channels, *own) if size is None else (channels, size, size)


def _first(run: Callable[[Tensor], list[Tensor]], x: Tensor) -> Tensor:
    return run(x)[0]


def tabulate_accuracy(rows: list[Accuracy]) -> Table:
    table = Table(title="top-1 on 1000 held-out digits, %: int8 files by preset in ONNX Runtime; size of the default")
    names = ("float32", *PRESETS)
    for name in ("model", *names, "MB", "int8 MB"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        scores = [f"{row.top1[name]:.1f}" if name in row.top1 else "-" for name in names]
        sizes = [f"{row.bytes[name] / 1e6:.2f}" if name in row.bytes else "-" for name in ("float32", "default")]
        table.add_row(row.name, *scores, *sizes)
    return table


def tabulate_speed(rows: list[Speed], settings: Settings) -> Table:
    size = f"batch {settings.batch}, {settings.img_size} px, {settings.rounds} rounds"
    table = Table(title=f"ms of a batch, float32 / int8, and int8 file over float32 file; {size}")
    table.add_column("model", no_wrap=True)
    for runtime in settings.runtimes:
        for title in (TITLES[runtime], "faster", "size"):
            table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *(text for runtime in settings.runtimes for text in _cells(row, runtime)))
    return table


def _cells(row: Speed, runtime: str) -> tuple[str, str, str]:
    if runtime not in row.seconds:
        return "-", "-", "-"
    plain, int8 = row.seconds[runtime]
    before, after = row.bytes[runtime]
    times = f"{1e3 * plain:.1f} / {'-' if int8 is None else f'{1e3 * int8:.1f}'}"
    return times, "-" if int8 is None else f"{plain / int8:.2f}", f"{after / before:.2f}"


def notes(rows: list[Accuracy | Speed]) -> str:
    """Why figures are missing, a line each."""
    lines = [f"{row.name}, {name}: {why}" for row in rows for name, why in row.refused.items()]
    lines += [] if has_vnni() else [f"int8 latency: {NO_VNNI}"]
    return "\n".join(["Not measured", *lines]) if lines else ""


def parse_settings(arguments: list[str] | None = None) -> tuple[Settings, Path | None]:
    """Read the command line; an invalid request exits with one line and code 2."""
    default = Settings()
    parser = common_parser(MODULE, __doc__, rounds=21)
    add_model_options(parser, default)
    names = " ".join(RUNTIMES)
    parser.add_argument("--recipes", nargs="*", default=digits_recipes(), metavar="NAME", help="digits (default: all)")
    parser.add_argument("--runtimes", nargs="*", default=default.runtimes, metavar="NAME", help=names)
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the digits runs in DIR, and take those there")
    parser.add_argument("--files", type=Path, metavar="DIR", help="keep the files in DIR, and take those there")
    parser.add_argument("--epochs", type=int, help="epochs of training (default: the recipes')")

    return parse_model_settings(Settings, parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    settings, out = parse_settings(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with TemporaryDirectory() as temporary:
        runs = settings.runs or Path(temporary)
        accuracies = [measure_accuracy(name, runs / name, settings.epochs) for name in settings.recipes]
    speeds = [measure_speed(name, settings) for name in settings.models] if settings.runtimes else []
    tables = [tabulate_accuracy(accuracies)] if accuracies else []
    tables += [tabulate_speed(speeds, settings)] if speeds else []
    report = Group(*tables, notes([*accuracies, *speeds]))
    write_report(report, module=MODULE, machine=describe_machine(), out=out)


if __name__ == "__main__":
    main()
