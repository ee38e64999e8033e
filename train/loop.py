"""MMEngine's loops, which can begin within an epoch, and validate two sets of weights."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from mmengine.runner import EpochBasedTrainLoop, ValLoop
from torch import nn

from .._errors import first_line
from .errors import DivergedError, TrainError
from .finite import explain
from .images import Batch, seed_everything
from .samplers import EpochSampler
from .stepper import NotFiniteError
from .together import unwrapped


class EpochLoop(EpochBasedTrainLoop):
    """Train epoch after epoch.

    Hooks of ours: after_step(runner) after each batch, after_epoch(runner, metrics) after validation or in its place.

    Attributes:
        batch: batches of the current epoch that are done.
        pending: the validation of the last epoch is not done.
    """

    def __init__(self, runner: Any, dataloader: Any, max_epochs: int, val_interval: int, seed: int) -> None:
        super().__init__(runner, dataloader, max_epochs, val_interval=val_interval)
        self.seed = seed
        self.batch = 0
        self.pending = False
        self.group: list[tuple[int, Batch]] = []  # batches since the last optimizer step

    def go_to(self, meta: dict[str, Any], images: int) -> None:
        """Continue where a checkpoint was written.

        Args:
            meta: of the checkpoint; without `batch`, it was written after an epoch.
            images: of an iteration now, over all processes; where it was another number, the nearest earlier step.

        Raises:
            TrainError: the checkpoint is within an epoch of another number of batches.
        """
        batches = len(self.dataloader)
        self._epoch, self.pending = meta["epoch"], meta.get("pending", False)
        self.batch = meta.get("batch", 0)
        if self.batch and images != meta["images"]:
            self.batch = min(self.batch * meta["images"] // images, batches)
            self.batch -= self.batch % self.runner.optim_wrapper._accumulative_counts
        elif self.batch and meta["batches"] != batches:
            raise TrainError(f"its epochs have {meta['batches']} batches, those of the data set now {batches}")
        self._iter = self._epoch * batches + self.batch

    def run(self) -> nn.Module:
        self.runner.call_hook("before_train")
        while self.pending or (self._epoch < self._max_epochs and not self.stop_training):
            if not self.pending:
                self.run_epoch()
            self.pending = True
            due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
            metrics = self.runner.val_loop.run() if due else None
            self.pending = False
            self.runner.call_hook("after_epoch", metrics=metrics)
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for index, data_batch in self._batches(self.batch):
            self.run_iter(index, data_batch)
        self.batch = 0
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _batches(self, first: int) -> Iterator[tuple[int, Any]]:
        """Yield the batches of an epoch from number `first` on. A stream is read from its start."""
        sampler = self.dataloader.sampler
        if not isinstance(sampler, EpochSampler):
            yield from islice(enumerate(self.dataloader), first, None)
            return
        sampler.first_batch = first
        yield from enumerate(self.dataloader, first)
        sampler.first_batch = 0

    def run_iter(self, idx: int, data_batch: Any) -> None:
        self.group.append((idx, data_batch))
        try:
            super().run_iter(idx, data_batch)
        except NotFiniteError as error:
            raise DivergedError(self._diverged(error, idx)) from None
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise TrainError(f"engine.compile: {type(error).__name__}: {first_line(error)}") from error
        self.batch = idx + 1
        if self.runner.optim_wrapper.ended:
            self.group = []
        self.runner.call_hook("after_step")

    def reseed(self, batch: int) -> None:
        """Seed all random numbers of a batch in this process."""
        seed_everything(self.seed, self._epoch, batch, self.runner.rank)

    def _name(self, index: int) -> str:
        name = getattr(self.dataloader.dataset, "name", None)
        return f"image {index}" if name is None else name(index)

    def _diverged(self, error: NotFiniteError, idx: int) -> str:
        where = explain(self.runner.model, self.group, self.reseed, self._name)
        return (
            f"step {self._iter + 1} (epoch {self._epoch + 1}, batch {idx + 1}): {error}, {where}. Lower optimizer.lr, "
            "clip gradients (optimizer.clip_grad) or use another precision"
        )


class BothLoop(ValLoop):
    """Validate the weights, and their averages if there are any; hooks are called as in one validation.

    Metrics are those of the averages (of the weights, if there are none); with the prefix raw_ those of the weights.
    Hook of ours: after_val_step(runner) after each batch.
    """

    average: nn.Module | None = None

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        metrics = self.measure(unwrapped(self.runner.model))
        if self.average is not None:
            raw = {f"raw_{name}": value for name, value in metrics.items()}
            metrics = self.measure(self.average) | raw
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Return the metrics of a Classifier over the split and all processes."""
        model.eval()
        for index, batch in enumerate(self.dataloader):
            self.runner.call_hook("before_val_iter", batch_idx=index, data_batch=batch)
            rows = model.val_step(batch)
            self.evaluator.process(data_samples=rows, data_batch=batch)
            self.runner.call_hook("after_val_iter", batch_idx=index, data_batch=batch, outputs=rows)
            self.runner.call_hook("after_val_step")
        return self.evaluator.evaluate(len(self.dataloader.dataset))
