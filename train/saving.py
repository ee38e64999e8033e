"""Write checkpoints: after epochs, within them, and before a signal ends the run."""

import signal
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, get_dist_info
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..export.adapters import save_adapter
from .average import raw_weights
from .checkpoints import ADAPTER, net_weights, write_best, write_epoch, write_within
from .errors import StoppedError
from .parallel import model_state, optimizer_state
from .recipe import Recipe, recipe_data
from .together import Flags, on_first, unwrapped


class SaveCheckpoints(Hook):
    """Write the checkpoint of an epoch, best.pth and LoRA adapters when they are the best so far, and those in between.

    best.pth holds the weights or their averages, whichever validated better (top-1; mean average precision with
    loss.multi_label); its meta.best names them.
    """

    priority = "VERY_LOW"  # after weights are averaged and the log line is written

    def __init__(self, recipe: Recipe, work_dir: Path, classes: Sequence[str] | None, flags: Flags) -> None:
        self.recipe = recipe
        self.work_dir = work_dir
        self.classes = classes
        self.flags = flags
        self.best: dict[str, Any] | None = None
        self.score = "map" if recipe.loss.multi_label else "top1"
        self.sharded = recipe.engine.parallel == "fsdp"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["meta"]["best"]

    def before_train(self, runner: Runner) -> None:
        self.saved_at = time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        minutes = self.recipe.checkpoint.every_minutes
        if minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes:
            self.flags.mine["save"] = 1

    def after_step(self, runner: Runner) -> None:
        if not runner.optim_wrapper.ended:
            return
        seen = self.flags.take()
        if seen["save"] or seen["stop"]:
            self._write_within(runner)
        self._stop(seen["stop"])

    def after_val_step(self, runner: Runner) -> None:
        seen = self.flags.gather()
        if seen["failed"]:
            self.flags.raise_failure()
        if self.flags.take()["stop"]:
            self._write_within(runner)
            self._stop(seen["stop"])

    def after_epoch(self, runner: Runner, metrics: dict[str, float] | None) -> None:
        improved = metrics is not None and self._improves(runner.epoch, metrics)
        due = runner.epoch % self.recipe.checkpoint.interval == 0 or runner.epoch == runner.max_epochs
        if not (improved or due):
            return
        checkpoint = self._snapshot(runner)
        if improved:
            on_first(lambda: self._write_best(unwrapped(runner.model), checkpoint))
        if due:
            on_first(lambda: write_epoch(self.work_dir, checkpoint, self.recipe.checkpoint.keep))
            self.saved_at = time.monotonic()

    def _improves(self, epoch: int, metrics: dict[str, float]) -> bool:
        named = [("averaged", f"{self.score}"), ("raw", f"raw_{self.score}")]
        scores = {name: metrics[key] for name, key in named if key in metrics}
        if len(scores) == 1:
            scores = {"raw": scores["averaged"]}
        weights = max(scores, key=lambda name: scores[name])  # the averages where both are equal
        if self.best is not None and scores[weights] <= self.best[self.score]:
            return False
        self.best = {"epoch": epoch, self.score: scores[weights], "weights": weights}
        return True

    def _write_best(self, model: Any, checkpoint: dict[str, Any]) -> None:
        assert self.best is not None
        if self.best["weights"] != checkpoint["meta"]["weights"]:  # raw weights, beside averages
            meta = checkpoint["meta"] | {"weights": "raw"}
            checkpoint = {"meta": meta, "state_dict": raw_weights(checkpoint)}
        write_best(self.work_dir, checkpoint)
        if self.recipe.model.lora is not None:
            save_adapter(model.net, self.work_dir / ADAPTER, net_weights(checkpoint))

    def _write_within(self, runner: Runner) -> None:
        checkpoint = self._snapshot(runner, within=True)
        on_first(lambda: write_within(self.work_dir, checkpoint))
        self.saved_at = time.monotonic()

    def _stop(self, number: int) -> None:
        if number:
            name = signal.Signals(number).name
            raise StoppedError(f"stopped by {name}", number)

    def _snapshot(self, runner: Runner, within: bool = False) -> dict[str, Any]:
        """Return a checkpoint. All processes take part; that of process 0 is complete."""
        model, wrapper = unwrapped(runner.model), runner.optim_wrapper
        checkpoint: dict[str, Any] = {
            "meta": self._meta(runner),
            "state_dict": model_state(model, self.sharded),
            "optimizer": optimizer_state(model, wrapper.optimizer) if self.sharded else wrapper.state_dict(),
            "process": {},
        }
        runner.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        own = checkpoint.pop("process")
        return checkpoint | ({"processes": all_gather_object(own)} if within else {})

    def _meta(self, runner: Runner) -> dict[str, Any]:
        loop, processes = runner.train_loop, get_dist_info()[1]
        return {
            "epoch": runner.epoch,
            "iter": runner.iter,
            "batch": loop.batch,
            "batches": len(loop.dataloader),
            "images": self.recipe.batch_size * processes,
            "pending": loop.pending,
            "seed": self.recipe.seed,
            "recipe": recipe_data(self.recipe),
            "classes": None if self.classes is None else list(self.classes),
            "processes": processes,
            "best": self.best,
            "weights": "raw",
            "versions": {name: version(name) for name in ("foveate", "torch", "timm", "mmengine")},
        }
