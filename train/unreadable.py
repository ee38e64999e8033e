"""Files that cannot be read: named, counted, and an error beyond a limit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner

from .images import Batch
from .together import Flags

LIST = "unreadable.txt"  # in the work_dir: split, file and reason
_SAID = 10  # files per split


class Unreadable(Hook):
    """Say the first files that cannot be read, and write the names of all to unreadable.txt."""

    priority = "VERY_HIGH"

    def __init__(self, limit: int, work_dir: Path, flags: Flags, say: Callable[[str], None]) -> None:
        self.limit, self.work_dir, self.flags, self.say = limit, work_dir, flags, say
        self.known: dict[str, set[str]] = {"training": set(), "validation": set()}
        self.skipped = 0  # images of this epoch that others replaced, in this process

    def before_train_epoch(self, runner: Runner) -> None:
        if not runner.train_loop.batch:
            self.skipped = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.skipped += data_batch.replaced
        self._note("training", data_batch)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._note("validation", data_batch)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        checkpoint["process"]["skipped_images"] = self.skipped

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self.skipped = int(checkpoint["process"].get("skipped_images", 0))

    def count(self) -> int:
        """Return how many images of this epoch were replaced, in all processes."""
        total = torch.tensor(float(self.skipped))
        all_reduce(total, op="sum")
        return int(total)

    def _note(self, split: str, batch: Batch) -> None:
        known = self.known[split]
        for name, why in batch.skipped:
            if name in known:
                continue
            known.add(name)
            with (self.work_dir / LIST).open("a", errors="backslashreplace") as file:
                file.write(f"{split}\t{name}\t{why}\n")
            if len(known) <= _SAID:
                does = "another image takes its place" if split == "training" else "it is not counted"
                self.say(f"cannot read {split} image {name}: {why}; {does}")
            if len(known) == _SAID + 1:
                self.say(f"more {split} images cannot be read, see {self.work_dir / LIST}")
            if len(known) > self.limit:
                self.flags.fail(
                    f"data: {len(known)} {split} images cannot be read, the last is {name}: {why}; "
                    f"data.max_unreadable is {self.limit}"
                )
        if batch.error:
            self.flags.fail(batch.error)
