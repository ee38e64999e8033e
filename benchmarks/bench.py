"""Measure models in engines, precisions, batches and image sizes on this machine: what `foveate bench` runs.

A cell is one model in one engine at one precision, batch and size. All cells are prepared first; then they take turns
in one process, round after round, so that other load on the machine affects all of them alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor, nn

from .._errors import RequestError, did_you_mean, first_line
from .._memory import check_images_fit
from .._torch import has_bfloat16_products
from ..attention_ops.macs import count_macs
from ..backbones import list_models
from ..backbones.published import Published, published_top1
from ..export import ExportError
from ..export.files import require_packages
from ._timing import interleaved_rounds, peak_bytes
from .measuring import (
    KEEPS_BUFFERS,
    ON_ANY_DEVICE,
    PRECISIONS,
    TRAINING_PASSES,
    create_model,
    prepare_call,
    random_images,
    training_step,
)

ENGINES = {  # names on the command line, and those of export/engines.py
    "eager": "eager",
    "fused": "fused",
    "compile": "compiled",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "aoti": "aoti",
    "executorch": "executorch",
}
PACKAGES = {  # of engines: the extra, and what it must have installed
    "onnx": ("export", "onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript", "openvino"),
    "executorch": ("executorch", "executorch"),
}
MODELS = ("nat_mini", "van_b1", "biformer_tiny", "litv2_small", "fv_davit_tiny")
SWEEP_PX = (224, 448, 896, 1344, 2048)
DEFAULT_PX = 224  # of a model that does not say its own
LEARNING_RATE = 1e-5  # of training steps; its value has no influence on their time

Call = Callable[[], object]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """What one figure is measured on."""

    model: str
    engine: str  # a key of ENGINES
    precision: str
    batch: int
    px: int  # height and width of the images


@dataclass(frozen=True)
class BenchSettings:
    """One run.

    Raises:
        RequestError: an unknown model, engine, precision or device, or a number below 1.
        MissingExtraError: an engine is not installed.
    """

    models: tuple[str, ...] = MODELS
    against: tuple[str, ...] = ()  # models that the others are divided by
    engines: tuple[str, ...] = ("eager", "fused")
    precisions: tuple[str, ...] = ("float32",)
    batches: tuple[int, ...] = (8,)
    sizes: tuple[int, ...] = ()  # px; empty: each model's own
    device: str = "cpu"
    train: bool = False
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in (*self.models, *self.against):
            if not is_model(name) or ("." in name and _cfg(name) is None):
                raise RequestError(f"unknown model {name!r}" + did_you_mean(name, list_models()))
        _check_names("engine", self.engines, ENGINES)
        _check_names("precision", self.precisions, PRECISIONS)
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise RequestError(f"--device: wanted cpu, or cuda where torch sees a GPU, got {self.device}")
        numbers = {"batch": self.batches, "size": self.sizes, "rounds": (self.rounds,)}
        if wrong := [f"--{name} {n}" for name, values in numbers.items() for n in values if n < 1]:
            raise RequestError(f"wanted a number >= 1, got {wrong[0]}")
        for engine in self.engines:
            if engine in PACKAGES:
                require_packages(*PACKAGES[engine])

    def cells(self) -> list[Cell]:
        """Return all cells, in the order of the report."""
        return [
            Cell(model, engine, precision, batch, px)
            for model in dict.fromkeys((*self.models, *self.against))
            for px in self.sizes or (own_px(model),)
            for precision in self.precisions
            for batch in self.batches
            for engine in self.engines
        ]


@dataclass
class Row:
    """What was measured of a cell, or why nothing was."""

    cell: Cell
    passes: int = 1  # forward passes that a call counts as
    macs: int = 0  # of one image, forward
    seconds: list[float] = field(default_factory=list)  # of each round
    memory_bytes: int | None = None  # peak of one call, without weights, gradients and inputs
    refused: str | None = None

    @property
    def images_per_second(self) -> float | None:
        return self.cell.batch / median(self.seconds) if self.seconds else None

    @property
    def p50_ms(self) -> float | None:
        return 1e3 * median(self.seconds) if self.seconds else None

    @property
    def p95_ms(self) -> float | None:
        """Latency that 95 % of the rounds stay below, interpolated between rounds."""
        if len(self.seconds) < 2:
            return self.p50_ms
        return 1e3 * quantiles(self.seconds, n=20, method="inclusive")[-1]

    @property
    def gmacs_per_second(self) -> float | None:
        """Useful multiply-adds: no masked logits and no padding."""
        return self.passes * self.macs * self.images_per_second / 1e9 if self.images_per_second else None

    @property
    def published(self) -> Published | None:
        return published_top1(self.cell.model, self.cell.px)


def own_px(model: str) -> int:
    """Return the height and width of the images that a model is made for."""
    cfg = _cfg(model)
    return DEFAULT_PX if cfg is None else cfg.input_size[-1]


def measure(settings: BenchSettings, say: Say = lambda line: None) -> list[Row]:
    """Prepare all cells, then measure them in turns. A cell that is refused says why, the others go on.

    Args:
        say: called with a line of progress.
    """
    rows = [Row(cell, TRAINING_PASSES if settings.train else 1) for cell in settings.cells()]
    calls: dict[Cell, Call] = {}
    for group in _by_model(rows):
        calls |= _prepare_group(group, settings, say)
    if calls:
        say(f"measuring {len(calls)} cells in {settings.rounds} rounds")
        taken = interleaved_rounds(calls, rounds=settings.rounds, device=settings.device, settle=True)
        for row in rows:
            row.seconds = taken.get(row.cell, [])
    return rows


def notes(rows: list[Row], settings: BenchSettings) -> list[str]:
    """Return the lines below the table: refused cells, one line for each reason, and what a figure does not say."""
    lines = []
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.refused is not None:
            cell = row.cell
            where = f"{cell.model} {cell.engine} {cell.precision}, {cell.batch} x {cell.px} px"
            reasons.setdefault(row.refused, []).append(where)
    for why, cells in reasons.items():
        lines.append(f"not measured: {'; '.join(cells)}: {why}")
    if "bfloat16" in settings.precisions and settings.device == "cpu" and not has_bfloat16_products():
        lines.append("bfloat16: this CPU has no bfloat16 products, which makes it slower than float32")
    return lines


def relative_speed(rows: list[Row], row: Row, rival: str) -> float | None:
    """Return the speed of a row over that of a rival in the same engine, precision and batch, each at its size."""
    same = ("engine", "precision", "batch")
    for other in rows:
        alike = all(getattr(other.cell, name) == getattr(row.cell, name) for name in same)
        if other.cell.model == rival and alike and (other.cell.px == row.cell.px or _one_size(rows, rival)):
            if row.images_per_second and other.images_per_second:
                return row.images_per_second / other.images_per_second
    return None


def _one_size(rows: list[Row], model: str) -> bool:
    return len({row.cell.px for row in rows if row.cell.model == model}) == 1


def _cfg(name: str) -> Any:
    try:
        return get_pretrained_cfg(name)
    except RuntimeError:  # a tag that the model does not have
        return None


def _check_names(kind: str, names: tuple[str, ...], known: dict[str, Any]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise RequestError(f"unknown {kind} {unknown[0]!r}; known: {', '.join(known)}")


def _by_model(rows: list[Row]) -> Iterator[list[Row]]:
    """Yield the rows of each model and size: they share one model."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.cell.model, row.cell.px), []).append(row)
    yield from groups.values()


def _prepare_group(rows: list[Row], settings: BenchSettings, say: Say) -> dict[Cell, Call]:
    name, px = rows[0].cell.model, rows[0].cell.px
    calls: dict[Cell, Call] = {}
    try:
        _check_memory(1, px, settings.device)
        model = create_model(name, px, settings.device)
        macs = count_macs(model, random_images(1, px, settings.device))
    except Exception as error:  # models raise many types
        for row in rows:
            row.refused = first_line(error)
        return calls
    for row in rows:
        row.macs, cell = macs, row.cell
        say(f"preparing {cell.model} {cell.engine}, {cell.precision}, {cell.batch} x {px} px")
        try:
            _check_memory(cell.batch, px, settings.device)
            call = _prepare(cell, model, random_images(cell.batch, px, settings.device), settings.train)
            keeps = ENGINES[cell.engine] in KEEPS_BUFFERS
            row.memory_bytes = peak_bytes(call, settings.device, first=keeps)
            calls[cell] = call
        except Exception as error:  # engines and models raise many types
            row.refused = first_line(error)
    return calls


def _check_memory(images: int, px: int, device: str) -> None:
    if device == "cpu":
        check_images_fit(images, 3, px, px)


def _prepare(cell: Cell, model: nn.Module, images: Tensor, train: bool) -> Call:
    engine = ENGINES[cell.engine]
    if not train:
        return prepare_call(engine, model, images, cell.precision)
    if engine not in ON_ANY_DEVICE:
        raise ExportError(f"{cell.engine} does not train; eager and compile do")
    own = create_model(cell.model, cell.px, images.device.type)
    optimizer = torch.optim.AdamW(own.parameters(), lr=LEARNING_RATE)
    forward = torch.compile(own) if engine == "compiled" else None
    return training_step(own, images, optimizer, forward=forward, precision=cell.precision)
