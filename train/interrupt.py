"""Signals are acted on between two steps.

Python drops a KeyboardInterrupt during a fork (loader workers are forked in each epoch), and one inside a collective
call or a write leaves an inconsistent state. So the first Ctrl-C is raised after the iteration, a second one
immediately. SIGTERM, SIGUSR1 and SIGHUP, with which schedulers announce the end of a job, ask for a checkpoint.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from .together import Flags

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


class Signals(Hook):
    """A hook and context manager that delays signals; outside the main thread it changes nothing."""

    priority = "VERY_LOW"

    def __init__(self, flags: Flags | None = None) -> None:
        self.flags = flags
        self.previous: dict[int, Any] = {}
        self.pressed = False

    def __enter__(self) -> "Signals":
        self.pressed = False
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._remember)
            for number in _ENDING if self.flags is not None else ():
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
                    self.previous[number] = signal.signal(number, self._ask_to_stop)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._raise()

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._raise()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        assert self.flags is not None
        if self.flags.mine["stop"]:  # the second one: the run does not get to its next step
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.flags.mine["stop"] = number

    def _raise(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt


def outlive_signals(worker: int) -> None:
    """Let a loader worker outlive signals to the whole group of processes: its parent needs it for the last step.

    The parent ends it through its queue. A second SIGTERM, which a parent sends to a worker that hangs, ends it.
    """
    del worker  # its number; torch passes it
    for number in (signal.SIGINT, *_ENDING):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_the_second)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # see `loader_context`


def loader_context(workers: int) -> BaseContext | None:
    """Return a DataLoader's `multiprocessing_context`, whose workers start with signals held back.

    Between its fork and `outlive_signals` a worker would die of a signal to the whole group, and the run with it.
    None, torch's default, where there are no workers or they are not forked.
    """
    if workers == 0 or multiprocessing.get_start_method() != "fork":
        return None
    context = multiprocessing.get_context("fork")

    class HeldProcess(context.Process):  # type: ignore[name-defined]  # a class that the context holds
        def start(self) -> None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    held = type("HeldContext", (type(context),), {"Process": HeldProcess})
    return held()


def _end_at_the_second(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
