"""Speed of our backbones and timm's, measured in one process.

    python -m foveate.benchmarks.backbones --models nat_mini van_b0 swin_tiny_patch4_window7_224 --batch 8 --threads 2

Speed         Median images per second of interleaved rounds, in eager mode, with contiguous NCHW inputs.
GMACs         Multiply-adds of one image by definition (see attention_ops/macs.py), and the authors' figure at 224 px.
              GMAC/s counts useful work only: no masked logits and no padding.
of resnet50   GMAC/s relative to resnet50, which is always measured in the same process.
Training      Forward and backward of a cross-entropy, without optimizer, counted as 3 forward passes.
Memory        Memory of one step, without weights, gradients and inputs (see _timing.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from ..attention_ops.macs import count_macs
from ._settings import ModelSettings, add_model_options, parse_model_settings
from ._timing import common_parser, describe_machine, interleaved_seconds, peak_bytes, write_report
from .measuring import TRAINING_PASSES, create_model, random_images, training_step

MODULE = "foveate.benchmarks.backbones"

BASELINE = "resnet50"
PEERS = (BASELINE, "convnext_tiny", "swin_tiny_patch4_window7_224", "davit_tiny")
OURS = ("nat_mini", "nat_tiny", "dinat_tiny", "van_b0", "van_b1", "van_b2", "biformer_tiny", "litv2_small")
OURS += ("fv_davit_tiny", "fv_halonet26t", "eca_resnet50", "ela_resnet50_b")
PUBLISHED_PX = 224
PUBLISHED_GMACS = {  # "FLOPs" of the papers and repositories
    **{"resnet50": 4.1, "convnext_tiny": 4.5, "swin_tiny_patch4_window7_224": 4.5, "davit_tiny": 4.5},
    **{"nat_mini": 2.7, "nat_tiny": 4.3, "nat_small": 7.8, "nat_base": 13.7},
    **{"dinat_mini": 2.7, "dinat_tiny": 4.3, "dinat_small": 7.8, "dinat_base": 13.7, "dinat_large": 30.6},
    **{
        "biformer_tiny": 2.2,
        "biformer_small": 4.5,
        "biformer_base": 9.8,
        "biformer_stl": 4.6,
        "biformer_stl_nchw": 4.6,
    },
    **{"litv2_small": 3.7, "litv2_medium": 7.5, "litv2_base": 13.2},
    **{"van_b0": 0.9, "van_b1": 2.5, "van_b2": 5.0, "van_b3": 9.0},
    **{"fv_davit_tiny": 4.5, "fv_davit_small": 8.8, "fv_davit_base": 15.5, "eca_resnet50": 4.1},
}


@dataclass(frozen=True)
class Settings(ModelSettings):
    """One run of the benchmark."""

    models: tuple[str, ...] = PEERS + OURS
    train: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"wanted device cpu, or cuda where torch sees one, got {self.device}")


@dataclass(frozen=True)
class Row:
    """Measurements of one model."""

    name: str
    parameters: int
    macs: int  # of one image, forward
    seconds: float  # of one step
    memory_bytes: int | None


def measure(settings: Settings) -> list[Row]:
    """Measure all models of the settings, and the baseline."""
    names = list(dict.fromkeys((BASELINE, *settings.models)))
    models = {name: create_model(name, settings.img_size, settings.device) for name in names}
    images = random_images(settings.batch, settings.img_size, settings.device)
    macs = {name: count_macs(model, images[:1]) for name, model in models.items()}
    steps = {name: _step(model, images, settings.train) for name, model in models.items()}
    memory = {name: peak_bytes(step, settings.device) for name, step in steps.items()}
    seconds = interleaved_seconds(steps, rounds=settings.rounds, device=settings.device)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return [Row(name, sizes[name], macs[name], seconds[name], memory[name]) for name in names]


def tabulate(rows: list[Row], settings: Settings) -> Table:
    """Return the table of the rows; the first row is the baseline."""
    mode = "training step" if settings.train else "inference"
    size = f"batch {settings.batch}, {settings.img_size} px, float32, {settings.device}"
    table = Table(title=f"{mode}, {size}, median of {settings.rounds} interleaved rounds")
    table.add_column("model", no_wrap=True)
    for name in ("params M", "GMACs", "published", "img/s", "GMAC/s", f"of {BASELINE}", "memory MB"):
        table.add_column(name, justify="right", no_wrap=True)
    unit = _macs_per_second(rows[0], settings)
    for row in rows:
        table.add_row(row.name, *_cells(row, unit, settings))
    return table


def _cells(row: Row, unit: float, settings: Settings) -> list[str]:
    published = PUBLISHED_GMACS.get(row.name) if settings.img_size == PUBLISHED_PX else None
    rate = _macs_per_second(row, settings)
    return [
        f"{row.parameters / 1e6:.1f}",
        f"{row.macs / 1e9:.2f}",
        "-" if published is None else f"{published:.1f}",
        f"{settings.batch / row.seconds:.1f}",
        f"{rate / 1e9:.0f}",
        f"{rate / unit:.0%}",
        "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f}",
    ]


def _macs_per_second(row: Row, settings: Settings) -> float:
    return row.macs * settings.batch * (TRAINING_PASSES if settings.train else 1) / row.seconds


def _step(model: nn.Module, images: Tensor, train: bool) -> Callable[[], object]:
    return training_step(model, images) if train else torch.inference_mode()(lambda: model(images))


def parse_settings(arguments: list[str] | None = None) -> tuple[Settings, Path | None]:
    """Read the command line; an invalid request exits with one line and code 2."""
    default = Settings()
    parser = common_parser(MODULE, __doc__, rounds=default.rounds)
    add_model_options(parser, default)
    parser.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    parser.add_argument("--device", default=default.device, help="cpu or cuda (default %(default)s)")
    return parse_model_settings(Settings, parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    settings, out = parse_settings(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    table = tabulate(measure(settings), settings)
    write_report(table, module=MODULE, machine=describe_machine(settings.device), out=out)


if __name__ == "__main__":
    main()
