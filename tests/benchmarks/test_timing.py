"""The measuring tools, on calls whose cost is known. No test here depends on how fast the machine is."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.table import Table

from foveate.benchmarks import _timing
from foveate.benchmarks._timing import (
    captured,
    describe_machine,
    interleaved_seconds,
    peak_tensor_bytes,
    write_report,
)


def test_calls_take_turns():
    seen = []
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    interleaved_seconds(calls, rounds=2, warmup=1)
    assert "".join(seen) == "ababab"


def test_a_settled_call_is_timed_after_one_that_is_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: now[0])
    taken = iter([0.06, 1, 0.03, 0.03, 2, 9, 3])  # s: 50 ms go to calls that are not timed, at least one

    def call():
        now[0] += next(taken)

    assert interleaved_seconds({"a": call}, rounds=3, warmup=0, settle=True) == {"a": 2}


def test_the_median_of_the_rounds_is_taken_and_the_warm_up_is_not(monkeypatch):
    clock = iter([0, 100, 0, 1, 0, 9, 0, 2])  # one warm-up of 100 s, then rounds of 1, 9 and 2 s
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(clock))
    assert interleaved_seconds({"a": lambda: None}, rounds=3) == {"a": 2}


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleaved_seconds({"a": lambda: None}, rounds=0)


def test_a_call_that_cannot_be_captured_is_timed_as_it_is():
    def call() -> None:
        raise RuntimeError("not on this machine\nmore")

    found, reason = captured(call)  # without a GPU, too, where no stream exists
    assert found is call and reason and "\n" not in reason


def test_on_a_gpu_a_replayed_graph_is_timed_by_events_after_a_flush(monkeypatch):
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def elapsed_time(self, other):
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    monkeypatch.setattr(_timing, "_flushed", lambda: SimpleNamespace(zero_=lambda: seen.append("flush")))
    monkeypatch.setattr(_timing, "captured", lambda call: (lambda: seen.append("graph"), None))
    calls = {"a": lambda: seen.append("call")}
    one = ["flush", "event", "call", "event", "synchronize"]
    assert interleaved_seconds(calls, rounds=1, device="cuda", warmup=0) == {"a": 0.25} and seen == one
    seen.clear()
    interleaved_seconds(calls, rounds=1, device="cuda", warmup=0, replay=True)
    assert seen == ["flush", "event", "graph", "event", "synchronize"]
    seen.clear()
    interleaved_seconds(calls, rounds=1, device="cuda", warmup=0, settle=True)  # no threads wait there
    assert seen == one


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_the_peak_is_that_of_one_call():
    hold = "lambda: torch.ones({} * 250_000).sum()"  # megabytes of float32
    calls = f"print(peak_bytes({hold.format(100)}), peak_bytes({hold.format(40)}))"
    script = f"import torch; from foveate.benchmarks._timing import peak_bytes; {calls}"
    # A process of its own: what other tests left running may allocate at any time.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first == pytest.approx(100e6, rel=0.05)
    assert second == pytest.approx(40e6, rel=0.1)  # after a larger one, too


def test_the_peak_of_tensors_is_exact():
    def call() -> None:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1
        del first
        second + torch.zeros(3000)[:1000]  # 12,000, beside 4000 each of second and the sum

    assert peak_tensor_bytes(call) == 4 * (1000 + 3000 + 1000)


def test_the_machine_is_described():
    words = describe_machine()
    assert torch.__version__.split("+")[0] in words and f"{torch.get_num_threads()} threads" in words


def test_the_report_holds_command_machine_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--models", "a b"])
    table = Table("model")
    table.add_row("nat_mini")
    write_report(table, module="foveate.benchmarks.backbones", machine="a laptop", out=tmp_path / "report.txt")
    report = (tmp_path / "report.txt").read_text()
    assert "python -m foveate.benchmarks.backbones --models 'a b'" in report
    assert "a laptop" in report and "nat_mini" in report and "nat_mini" in capsys.readouterr().out
    assert max(map(len, report.splitlines())) <= max(Console().width, 120)
