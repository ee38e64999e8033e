"""Times on a GPU: of the work alone, as a CUDA graph with a cold L2 cache, and of plain calls with their launches."""

import statistics
import time
from collections.abc import Callable

import torch

from .._timing import FLUSHED_BYTES, captured, copy_bytes_per_second
from .session import Session

Call = Callable[[], object]
REPEATS = 15
LOOP_SECONDS = 0.08


class Clock:
    """Medians in microseconds. In the interpreter one call is timed, which shows that it runs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda") if session.gpu else None

    def eager_us(self, call: Call) -> float:
        """Plain calls in a row: launch costs where they dominate."""
        if not self.session.gpu:
            return self._once(call)
        call()
        one = self._seconds(call, 1)
        count = max(3, min(200, int(LOOP_SECONDS / max(one, 1e-6))))
        return statistics.median(self._seconds(call, count) / count for _ in range(3)) * 1e6

    def events_us(self, call: Call) -> float:
        """One call after a flush of the L2 cache, between two events."""
        if self.flush is None:
            return self._once(call)
        for _ in range(2):
            call()
        pairs = []
        for _ in range(REPEATS):
            self.flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
        self.session.sync()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs) * 1e3

    def gpu_us(self, call: Call) -> tuple[float, str | None]:
        """Return the time of a replayed CUDA graph; where the call cannot be captured, `events_us` and the reason."""
        if not self.session.gpu:
            return self._once(call), None
        replay, reason = captured(call)
        return self.events_us(replay), reason

    def bytes_per_second(self) -> float:
        """Return the bandwidth of a plain copy, reads and writes together."""
        return copy_bytes_per_second(self.session.device)

    def _seconds(self, call: Call, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.session.sync()
        return time.perf_counter() - start

    def _once(self, call: Call) -> float:
        return self._seconds(call, 1) * 1e6
