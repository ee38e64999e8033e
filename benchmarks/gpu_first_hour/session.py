"""What all parts of one run share: the device, the batch, the time that is left, and the results."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Session:
    """One run of the script.

    Args:
        device: "cuda", or "cpu" for a dry run in Triton's interpreter on small maps.
        batch: images of a full-sized layer or training step.
        budget: seconds for all parts.
        compiles: whether torch.compile may run.
        only: a word that the name of a case of part a must hold.
    """

    device: str
    batch: int
    budget: float
    compiles: bool
    only: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def low(self) -> torch.dtype:
        """The 16-bit type of the timings; Triton's interpreter does not multiply bfloat16 correctly."""
        return torch.bfloat16 if self.gpu else torch.float16

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.budget - (time.perf_counter() - self.started)

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def say(*words: object) -> None:
    print(*words, flush=True)


def first_line(error: BaseException) -> str:
    """Return the type of an error and at most 150 characters of its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"
