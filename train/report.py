"""Output of a run: one line per epoch, a progress bar on a terminal, and scalars.jsonl for plots."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._errors import ResultError
from .._files import atomic_path

SCALARS = "scalars.jsonl"


class DivergedError(ResultError, RuntimeError):
    """The training loss is not finite."""


class EpochLog(Hook):
    """Append one JSON line per epoch to scalars.jsonl, and print its values.

    Keys: epoch (from 1), iter, lr (of the last step), train_loss, val_loss, val_top1, val_top5 (%),
    images_per_s (training, all processes), seconds (training and validation).
    """

    priority = "BELOW_NORMAL"

    def __init__(self, work_dir: Path, console: Console) -> None:
        self.path = work_dir / SCALARS
        self.console = console

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Keep the lines of the epochs before a resumed run; later ones will be written again."""
        lines = [json.dumps(record) for record in read_scalars(self.path) if record["epoch"] <= runner.epoch]
        with atomic_path(self.path) as part:
            part.write_text("".join(f"{line}\n" for line in lines))

    def before_train_epoch(self, runner: Runner) -> None:
        self.start = time.perf_counter()
        self.loss, self.images = 0.0, 0

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.loss = self.loss + outputs["loss"].detach()
        self.images += len(data_batch[1])

    def after_train_epoch(self, runner: Runner) -> None:
        loss = torch.as_tensor(self.loss / len(runner.train_dataloader)).float()
        all_reduce(loss, op="mean")
        self.train_loss = loss.item()
        self.images_per_s = self.images * runner.world_size / (time.perf_counter() - self.start)
        if not math.isfinite(self.train_loss):
            raise DivergedError(
                f"epoch {runner.epoch + 1}: the training loss became {self.train_loss}; "
                "lower optimizer.lr, clip gradients or use another precision"
            )

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        record = {
            "epoch": runner.epoch,
            "iter": runner.iter,
            "lr": max(group["lr"] for group in runner.optim_wrapper.param_groups),
            "train_loss": self.train_loss,
            **{f"val_{name}": metrics[name] for name in ("loss", "top1", "top5")},
            "images_per_s": self.images_per_s,
            "seconds": time.perf_counter() - self.start,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.console.print(_line(record, runner.max_epochs), highlight=False)


class ProgressBar(Hook):
    """Show a bar of the whole run with speed, time left, loss and learning rate, if the output is a terminal."""

    priority = "LOWEST"

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
        self.bar = Progress(
            TextColumn("{task.description}"), *columns, console=console, transient=True, disable=not console.is_terminal
        )

    def before_train(self, runner: Runner) -> None:
        self.task = self.bar.add_task("", total=runner.max_iters, completed=runner.iter, facts="")
        self.bar.start()

    def before_train_epoch(self, runner: Runner) -> None:
        self.images, self.start = 0, time.perf_counter()
        self.bar.update(self.task, description=f"epoch {runner.epoch + 1}/{runner.max_epochs}")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.images += len(data_batch[1]) * runner.world_size
        speed = self.images / (time.perf_counter() - self.start)
        lr = max(group["lr"] for group in runner.optim_wrapper.param_groups)
        facts = f"loss {outputs['loss'].item():.3f}  lr {lr:.1e}  {speed:,.0f} img/s"
        self.bar.update(self.task, completed=runner.iter + 1, facts=facts)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def read_scalars(path: Path) -> list[dict[str, float]]:
    """Return the records of a scalars.jsonl, up to the first incomplete line (of a killed process). Runs nothing."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_record(record):
            break
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
    return numbers and {"epoch", "val_top1"} <= record.keys()


def _line(record: dict[str, float], epochs: int) -> str:
    return (
        f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4f}  top1 {record['val_top1']:.2f}  "
        f"top5 {record['val_top5']:.2f}  lr {record['lr']:.2e}  {record['images_per_s']:,.0f} img/s  "
        f"{record['seconds']:.1f} s"
    )
