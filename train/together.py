"""Decisions that all processes take together, and files that process 0 writes for all."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_dist_info
from mmengine.model import is_model_wrapper
from torch import distributed, nn

from .._errors import first_line
from .checkpoints import list_checkpoints
from .errors import StorageError, TrainError

T = TypeVar("T")
Flag = Literal["bad", "failed", "stop", "save"]

_FLAGS: tuple[Flag, ...] = ("bad", "failed", "stop", "save")
_STORAGE = {  # other numbers, such as a closed pipe, do not concern the run's folder
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE", "EACCES", "EPERM", "ENOENT", "ENOTDIR")
    if hasattr(errno, name)
}


class Flags:
    """What one process notices and all processes must act on in the same step.

    bad: the loss or the gradient is not finite. failed: the data cannot be read. stop: number of a signal. save: a
    checkpoint is due. Processes exchange them once per optimizer step, on the CPU; a GPU does not wait for it.
    """

    def __init__(self) -> None:
        self.mine: dict[Flag, int] = dict.fromkeys(_FLAGS, 0)
        self.seen: dict[Flag, int] = dict.fromkeys(_FLAGS, 0)
        self.reason = ""
        several = distributed.is_initialized() and distributed.get_backend() != "gloo"
        self.group: Any = distributed.new_group(backend="gloo") if several else None

    def gather(self) -> dict[Flag, int]:
        """Return the largest value of each flag over all processes, and keep it in `seen`."""
        values = torch.tensor([self.mine[name] for name in _FLAGS])
        if get_dist_info()[1] > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.group)
        self.seen = dict(zip(_FLAGS, values.tolist(), strict=True))
        return self.seen

    def take(self) -> dict[Flag, int]:
        """Return `seen`, and clear it: a flag is acted on once. One process sees its flags at once."""
        if get_dist_info()[1] == 1:
            self.gather()
        seen, self.seen = self.seen, dict.fromkeys(_FLAGS, 0)
        if seen["save"]:
            self.mine["save"] = 0
        return seen

    def fail(self, reason: str) -> None:
        """End the run with a TrainError: at once in one process, otherwise in the next `gather` of all of them."""
        if get_dist_info()[1] == 1:
            raise TrainError(reason)
        self.mine["failed"] = 1
        self.reason = self.reason or reason

    def raise_failure(self) -> None:
        """Raise the reason of the first process that failed, in every process."""
        raise TrainError(next(reason for reason in all_gather_object(self.reason) if reason))


def on_first(action: Callable[[], T]) -> T:
    """Let process 0 act, and give its result, or its error, to all processes."""
    answer: list[Any] = [None, None]
    raised: Exception | None = None
    if get_dist_info()[0] == 0:
        try:
            answer[0] = action()
        except (TrainError, OSError) as error:
            raised, answer[1] = error, first_line(error)
    broadcast_object_list(answer)
    if raised is not None:
        raise raised
    if answer[1] is not None:
        raise TrainError(answer[1])
    return answer[0]


@contextmanager
def storage_errors(work_dir: Path) -> Iterator[None]:
    """Raise a StorageError, one line that says from where to resume, where a file of the run cannot be written."""
    try:
        yield
    except (TrainError, StorageError):
        raise
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        name = f" ({error.filename})" if error.filename else ""
        raise StorageError(
            f"work_dir {work_dir}: {error.strerror or first_line(error)}{name}; {_what_is_left(work_dir)}"
        ) from error


def _what_is_left(work_dir: Path) -> str:
    try:
        complete = list_checkpoints(work_dir)
    except OSError:
        complete = []
    if not complete:
        return "no checkpoint was written yet"
    return f"{complete[0].name} is complete: run the same command with --resume to continue from it"


def unwrapped(model: nn.Module) -> Any:
    """Return the Classifier inside the wrapper of distributed training, if any."""
    return model.module if is_model_wrapper(model) else model
