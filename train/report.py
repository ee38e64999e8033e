"""Output of a run: one line per epoch, a progress bar on a terminal, and scalars.jsonl for plots."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, get_dist_info, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._files import atomic_path
from .._torch import compiled_graphs
from .describe import duration
from .errors import DivergedError
from .recipe import Recipe
from .together import on_first
from .unreadable import Unreadable

__all__ = ["SCALARS", "DivergedError", "EpochLog", "ProgressBar", "StepLog", "read_scalars"]

SCALARS = "scalars.jsonl"

_SUMS = ("loss", "batches", "norm", "steps", "skipped")  # of an epoch, in one process


class EpochLog(Hook):
    """Append one JSON line per epoch to scalars.jsonl, and print its values.

    Keys: epoch (from 1), iter, lr (of the last step), train_loss, grad_norm (mean over steps, before clipping),
    val_loss, val_top1, val_top5 (%), images_per_s (training, all processes), seconds (training and validation).
    Where they apply: skipped_steps (fp16), unreadable (training images that others replaced), val_unreadable (not
    counted), val_map (%, loss.multi_label), raw_loss, raw_top1, raw_top5 (of the weights; val_ are then those of their
    averages), graphs (torch.compile), memory_gb (peak on a GPU).
    """

    priority = "BELOW_NORMAL"

    def __init__(self, recipe: Recipe, work_dir: Path, console: Console, unreadable: Unreadable) -> None:
        self.recipe = recipe
        self.path = work_dir / SCALARS
        self.console = console
        self.unreadable = unreadable
        self.sums = dict.fromkeys(_SUMS, torch.zeros(()))
        self.kept: dict[str, Any] | None = None  # of the first part of an epoch, before a resume

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Keep the lines of the epochs before a resumed run; later ones will be written again."""
        done = runner.epoch - runner.train_loop.pending
        lines = [json.dumps(record) for record in read_scalars(self.path) if record["epoch"] <= done]
        with atomic_path(self.path) as part:
            part.write_text("".join(f"{line}\n" for line in lines))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["process"].get("log")
        if checkpoint["meta"].get("pending"):
            self.start = time.perf_counter()
            self.record = dict(checkpoint["processes"][0]["log"]["record"])  # the same in all processes

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        pending = {"record": self.record} if runner.train_loop.pending else {}
        checkpoint["process"]["log"] = {name: value.cpu() for name, value in self.sums.items()} | pending

    def before_train_epoch(self, runner: Runner) -> None:
        self.start = time.perf_counter()
        self.images = 0
        kept, self.kept = self.kept if runner.train_loop.batch else None, None
        device = next(runner.model.parameters()).device
        self.sums = {name: (kept or {}).get(name, torch.zeros(())).to(device) for name in _SUMS}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loss, wrapper = outputs["loss"].detach(), runner.optim_wrapper
        finite = loss.isfinite()  # fp16 skips steps with others
        self.sums["loss"] = self.sums["loss"] + torch.where(finite, loss, 0.0)
        self.sums["batches"] = self.sums["batches"] + finite
        self.images += len(data_batch[1])
        if wrapper.stepped:
            self.sums["norm"] = self.sums["norm"] + wrapper.grad_norm
            self.sums["steps"] = self.sums["steps"] + 1
        elif wrapper.ended:
            self.sums["skipped"] = self.sums["skipped"] + 1

    def after_train_epoch(self, runner: Runner) -> None:
        total = torch.stack([self.sums[name].float() for name in _SUMS])
        all_reduce(total, op="sum")
        loss, batches, norm, steps, skipped = total.tolist()
        if not batches:
            raise DivergedError(f"epoch {runner.epoch + 1}: the loss of no batch was finite; use another precision")
        speed = self.images * runner.world_size / (time.perf_counter() - self.start)
        self.record = {
            "epoch": runner.epoch + 1,
            "iter": runner.iter,
            "lr": max(group["lr"] for group in runner.optim_wrapper.param_groups),
            "train_loss": loss / batches,
            "grad_norm": norm / max(steps, 1.0),
            **({"skipped_steps": round(skipped / get_dist_info()[1])} if skipped else {}),
            **self._more(),
            "images_per_s": speed,
        }

    def after_epoch(self, runner: Runner, metrics: dict[str, float] | None) -> None:
        named = {name if name.startswith("raw_") else f"val_{name}": value for name, value in (metrics or {}).items()}
        clock = {"images_per_s": self.record.pop("images_per_s"), "seconds": time.perf_counter() - self.start}
        record = self.record | named | clock
        on_first(lambda: self._append(record))
        self.console.print(_line(record, runner.max_epochs), highlight=False)

    def _more(self) -> dict[str, float]:
        replaced = self.unreadable.count()
        return {
            **({"unreadable": replaced} if replaced else {}),
            **({"graphs": compiled_graphs()} if self.recipe.engine.compile else {}),
            **({"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_initialized() else {}),
        }

    def _append(self, record: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class StepLog(Hook):
    """Print a line every few iterations of an epoch, if the output is no terminal, which has a bar."""

    priority = "LOWEST"

    def __init__(self, console: Console, interval: int) -> None:
        self.console = console
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        self.first, self.start = runner.iter, time.perf_counter()

    def before_train_epoch(self, runner: Runner) -> None:
        self.images, self.epoch_start = 0, time.perf_counter()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.images += len(data_batch[1]) * runner.world_size
        batches, done = len(runner.train_dataloader), batch_idx + 1
        if self.console.is_terminal or self.console.quiet or done % self.interval or done == batches:
            return
        now = time.perf_counter()
        left = (runner.max_iters - runner.iter - 1) * (now - self.start) / (runner.iter + 1 - self.first)
        lr = max(group["lr"] for group in runner.optim_wrapper.param_groups)
        self.console.print(
            f"epoch {runner.epoch + 1}/{runner.max_epochs}  {done}/{batches}  loss {outputs['loss'].item():.4f}  "
            f"lr {lr:.2e}  {self.images / (now - self.epoch_start):,.0f} img/s  {duration(left)} left",
            highlight=False,
        )


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
    return numbers and "epoch" in record


def _line(record: dict[str, float], epochs: int) -> str:
    return (
        f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4f}  {_scores(record)}lr {record['lr']:.2e}  "
        f"{record['images_per_s']:,.0f} img/s  {record['seconds']:.1f} s"
    )


def _scores(record: dict[str, float]) -> str:
    parts = []
    for name, title in (("top1", "top1"), ("top5", "top5"), ("map", "mAP")):
        if f"val_{name}" in record:
            raw = f" (raw weights {record[f'raw_{name}']:.2f})" if f"raw_{name}" in record else ""
            parts.append(f"{title} {record[f'val_{name}']:.2f}{raw}  ")
    for key, what in (("unreadable", "unreadable images replaced"), ("val_unreadable", "validation images not read")):
        if key in record:
            parts.append(f"{record[key]:.0f} {what}  ")
    return "".join(parts)
