"""Which library multiplies: measured once per CPU, instruction set, torch release and number of threads, and kept.

`fuse` and the op `dense` ask; training never does. FOVEATE_PRODUCTS=onednn or torch decides without measuring, and
then nothing is read or written.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .._errors import RequestError
from .._files import UnreadableFileError, atomic_path, read_json
from . import _onednn as onednn
from ._onednn import NONE, POINT

if TYPE_CHECKING:
    from rich.table import Table

SETTING = "FOVEATE_PRODUCTS"
SETTINGS = ("auto", "onednn", "torch")
LEAST_ROWS = 16  # fewer rows are a product of a matrix and little more: torch's own is used
SHAPES = ((64, 768, 768), (784, 384, 1536), (6272, 192, 768))  # rows, inputs, outputs
DTYPES = (torch.float32, torch.bfloat16)
_ROUNDS = 7
_LARGEST_BYTES = 2**20


@dataclass(frozen=True)
class CpuReport:
    """How fast the two libraries multiply on this CPU, in 10^9 multiply-adds a second.

    rates  (dtype, rows, inputs, outputs) -> (torch, oneDNN); empty where FOVEATE_PRODUCTS decides
    """

    key: str
    setting: str
    file: Path
    rates: dict[tuple[str, int, int, int], tuple[float, float]]

    def takes_product(self, rows: int, dtype: torch.dtype) -> bool:
        """Say whether oneDNN multiplies this many rows: it does where it was no slower at the nearest shape."""
        if rows < LEAST_ROWS or self.setting == "torch" or not onednn.works(dtype):
            return False
        name = str(dtype).removeprefix("torch.")
        known = [(key[1], rate) for key, rate in self.rates.items() if key[0] == name]
        if self.setting == "onednn" or not known:
            return self.setting == "onednn"
        _, (plain, ours) = min(known, key=lambda entry: abs(log(entry[0]) - log(rows)))
        return ours >= plain

    def table(self) -> "Table":
        from rich.table import Table

        table = Table("dtype", "rows", "inputs", "outputs", "torch, GMAC/s", "oneDNN, GMAC/s", title=self.key)
        for (dtype, *sizes), (plain, ours) in self.rates.items():
            table.add_row(dtype, *map(str, sizes), f"{plain:.0f}", f"{ours:.0f}")
        return table

    def __str__(self) -> str:
        lines = [f"{self.key}; {SETTING}={self.setting}; {self.file}"]
        for (dtype, *sizes), (plain, ours) in self.rates.items():
            lines.append(f"{dtype} {sizes}: torch {plain:.0f}, oneDNN {ours:.0f} GMAC/s")
        if self.rates and not self.bfloat16_pays:
            lines.append("bfloat16 products are not faster than float32 on this CPU")
        return "\n".join(lines)

    @property
    def bfloat16_pays(self) -> bool:
        """Whether the fastest bfloat16 product was faster than the fastest float32 one; false where not measured."""
        best = {
            dtype: max((max(rate) for (name, *_), rate in self.rates.items() if name == dtype), default=0.0)
            for dtype in ("float32", "bfloat16")
        }
        return best["bfloat16"] > best["float32"]


def cpu_report(*, measure_again: bool = False) -> CpuReport:
    """Return how fast torch and oneDNN multiply on this CPU, measured at the first call and kept in a file.

    The file is foveate/cpu.json in the user's cache folder (XDG_CACHE_HOME, else ~/.cache; %LOCALAPPDATA% on Windows).
    Cost: about a second where it is not known yet.

    Raises:
        RequestError: FOVEATE_PRODUCTS is none of auto, onednn and torch.
    """
    setting = os.environ.get(SETTING, "auto")
    if setting not in SETTINGS:
        raise RequestError(f"{SETTING} must be one of {', '.join(SETTINGS)}, got {setting!r}")
    if measure_again:
        _rates.cache_clear()
    key = cpu_key()
    rates = _rates(key, measure_again) if setting == "auto" else {}
    return CpuReport(key, setting, calibration_file(), rates)


def cpu_key() -> str:
    """What the answer depends on: the CPU, the instruction sets in use, torch's release, the threads."""
    limits = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")]
    parts = (_cpu_name(), torch.backends.cpu.get_cpu_capability(), *limits, torch.__version__)
    return ", ".join((*filter(None, parts), f"{torch.get_num_threads()} threads"))


@lru_cache(maxsize=1)  # `dense` asks at every call
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    numbers = [found[name] for name in ("cpu family", "model", "stepping") if name in found]
    return " ".join((found.get("model name", platform.machine()), *numbers))


def calibration_file() -> Path:
    windows = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    folder = windows or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "foveate" / "cpu.json"


@lru_cache(maxsize=8)
def _rates(key: str, measure_again: bool) -> dict[tuple[str, int, int, int], tuple[float, float]]:
    file = calibration_file()
    known = _read(file)
    if key in known and not measure_again:
        return known[key]
    known[key] = _measure()
    _write(file, known)
    return known[key]


def _read(file: Path) -> dict[str, dict[tuple[str, int, int, int], tuple[float, float]]]:
    """What is known; nothing where the file is missing or damaged: it is then measured and written again."""
    try:
        data = read_json(file, _LARGEST_BYTES)
        return {
            str(key): {
                (str(r["dtype"]), int(r["rows"]), int(r["inputs"]), int(r["outputs"])): (
                    float(r["torch"]),
                    float(r["onednn"]),
                )
                for r in rows
            }
            for key, rows in data.items()
        }
    except (OSError, UnreadableFileError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def _write(file: Path, known: dict) -> None:
    """Keep it for the next process; a folder that cannot be written costs a measurement in each process."""
    names = ("dtype", "rows", "inputs", "outputs")
    data = {
        key: [dict(zip(names, shape, strict=True)) | {"torch": t, "onednn": o} for shape, (t, o) in rates.items()]
        for key, rates in known.items()
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as part:
            part.write_text(json.dumps(data, indent=1) + "\n")
    except OSError:
        pass


@torch.no_grad()
def _measure() -> dict[tuple[str, int, int, int], tuple[float, float]]:
    rates = {}
    for dtype in DTYPES:
        if not onednn.works(dtype):
            continue
        for rows, inputs, outputs in SHAPES:
            seconds = _fastest(product_calls(rows, inputs, outputs, dtype))
            work = rows * inputs * outputs / 1e9
            name = str(dtype).removeprefix("torch.")
            rates[name, rows, inputs, outputs] = (round(work / seconds[0], 1), round(work / seconds[1], 1))
    return rates


def product_calls(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return calls of torch's product and of oneDNN's, with a packed weight, of the same random numbers."""
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    packed = onednn.pack(weight[:, :, None, None], POINT, (1, inputs, 1, rows))
    return lambda: F.linear(x, weight, bias), lambda: onednn.multiply(x, packed, bias, NONE)


def _fastest(calls: tuple[Callable[[], object], ...]) -> list[float]:
    """The least seconds of each call, in turns."""
    least = [float("inf")] * len(calls)
    for _ in range(_ROUNDS):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            least[i] = min(least[i], time.perf_counter() - start)
    return least
