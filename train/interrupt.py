"""Handle Ctrl-C between two iterations.

Python drops a KeyboardInterrupt during a fork (loader workers are forked in each epoch), and one inside a collective
call or a write leaves an inconsistent state. So the first Ctrl-C is raised after the iteration, a second one
immediately.
"""

import signal
import threading
from types import FrameType
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner


class CtrlC(Hook):
    """A hook and context manager that delays Ctrl-C; outside the main thread it changes nothing."""

    priority = "VERY_LOW"

    def __enter__(self) -> "CtrlC":
        self.pressed = False
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._raise()

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._raise()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def _raise(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt
