"""Which library multiplies: measured once per CPU, instruction set, torch release and number of threads, and kept.

`fuse` measures every product of a model that it does not know yet (`takes_product`). The op `dense` never measures
more than the calibration: it goes by the nearest known shape. Training never asks. FOVEATE_PRODUCTS=onednn or torch
decides without measuring, and then nothing is read or written.
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
SHAPES = (  # rows, inputs, outputs
    *((64, 192, 768), (64, 768, 768), (784, 192, 192), (784, 384, 1536)),
    *((6272, 64, 256), (6272, 96, 96), (6272, 192, 768)),
)
DTYPES = (torch.float32, torch.bfloat16)
_ROUNDS = 7
_LONGEST = 0.3  # seconds, after which three rounds are enough
_LARGEST_BYTES = 2**20


Rates = dict[tuple[str, int, int, int], tuple[float, float]]
_SECTIONS = ("calibration", "products")


@dataclass(frozen=True)
class CpuReport:
    """How fast the two libraries multiply on this CPU, in 10^9 multiply-adds a second.

    rates     (dtype, rows, inputs, outputs) -> (torch, oneDNN), a few shapes; empty where FOVEATE_PRODUCTS decides
    products  the same of the products in models that were fused on this CPU
    """

    key: str
    setting: str
    file: Path
    rates: Rates
    products: Rates

    def takes_product(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
        """Say whether oneDNN multiplies: it does where it was no slower at this shape, else at the nearest one."""
        if not self._may_take(rows, dtype):
            return False
        if self.setting == "onednn":
            return True
        shape = (name_of(dtype), rows, inputs, outputs)
        plain, ours = self.products.get(shape) or self._nearest(shape)
        return ours >= plain

    def _may_take(self, rows: int, dtype: torch.dtype) -> bool:
        return rows >= LEAST_ROWS and self.setting != "torch" and onednn.works(dtype)

    def _nearest(self, shape: tuple[str, int, int, int]) -> tuple[float, float]:
        def distance(other: tuple[str, int, int, int]) -> float:
            return sum(abs(log(a / b)) for a, b in zip(shape[1:], other[1:], strict=True))

        known = [other for other in self.rates if other[0] == shape[0]]
        return self.rates[min(known, key=distance)] if known else (1.0, 0.0)

    def table(self) -> "Table":
        """Return the measured rates as a table of rich."""
        from rich.table import Table

        table = Table("dtype", "rows", "inputs", "outputs", "torch, GMAC/s", "oneDNN, GMAC/s", title=self.key)
        for (dtype, *sizes), (plain, ours) in (*self.rates.items(), *self.products.items()):
            table.add_row(dtype, *map(str, sizes), f"{plain:.0f}", f"{ours:.0f}")
        return table

    def __str__(self) -> str:
        lines = [f"{self.key}; {SETTING}={self.setting}; {self.file}"]
        for (dtype, *sizes), (plain, ours) in self.rates.items():
            lines.append(f"{dtype} {sizes}: torch {plain:.0f}, oneDNN {ours:.0f} GMAC/s")
        if self.products:
            taken = sum(ours >= plain for plain, ours in self.products.values())
            lines.append(f"products of fused models: {len(self.products)} measured, oneDNN multiplies {taken}")
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
    `fuse` adds the products of the models that it is given. Cost: about a second where nothing is known yet.

    Raises:
        RequestError: FOVEATE_PRODUCTS is none of auto, onednn and torch.
    """
    setting = os.environ.get(SETTING, "auto")
    if setting not in SETTINGS:
        raise RequestError(f"{SETTING} must be one of {', '.join(SETTINGS)}, got {setting!r}")
    if measure_again:
        _known.cache_clear()
    key = cpu_key()
    rates, products = _known(key, measure_again) if setting == "auto" else ({}, {})
    return CpuReport(key, setting, calibration_file(), rates, products)


def takes_product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """As `CpuReport.takes_product`, after measuring this very product where it is not known; 0.01 to 0.3 s each.

    A shape that lies between those of the calibration may be 1.5 times as fast in one library as in the other.
    """
    report, shape = cpu_report(), (name_of(dtype), rows, inputs, outputs)
    if report.setting == "auto" and report._may_take(rows, dtype) and shape not in report.products:
        report.products[shape] = _rate(rows, inputs, outputs, dtype)
        _write(report.file, report.key, (report.rates, report.products))
    return report.takes_product(rows, inputs, outputs, dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
def _known(key: str, measure_again: bool) -> tuple[Rates, Rates]:
    file = calibration_file()
    known = _read(file)
    if key in known and known[key][0] and not measure_again:
        return known[key]
    found: tuple[Rates, Rates] = (_measure(), {})
    _write(file, key, found)
    return found


def _read(file: Path) -> dict[str, tuple[Rates, Rates]]:
    """What is known; nothing where the file is missing or damaged: it is then measured and written again."""
    try:
        data = read_json(file, _LARGEST_BYTES)
        return {
            str(key): (_rates(entry[_SECTIONS[0]]), _rates(entry[_SECTIONS[1]]))
            for key, entry in data.items()
        }  # fmt: skip
    except (OSError, UnreadableFileError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def _rates(rows: list[dict]) -> Rates:
    return {
        (str(r["dtype"]), int(r["rows"]), int(r["inputs"]), int(r["outputs"])): (float(r["torch"]), float(r["onednn"]))
        for r in rows
    }


def _write(file: Path, key: str, found: tuple[Rates, Rates]) -> None:
    """Keep it for the next process; a folder that cannot be written costs a measurement in each process."""
    names = ("dtype", "rows", "inputs", "outputs")
    data = {
        name: {
            section: [
                dict(zip(names, shape, strict=True)) | {"torch": plain, "onednn": ours}
                for shape, (plain, ours) in rates.items()
            ]
            for section, rates in zip(_SECTIONS, both, strict=True)
        }
        for name, both in (_read(file) | {key: found}).items()
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as part:
            part.write_text(json.dumps(data, indent=1) + "\n")
    except OSError:
        pass


def _measure() -> Rates:
    dtypes = [dtype for dtype in DTYPES if onednn.works(dtype)]
    return {(name_of(dtype), *shape): _rate(*shape, dtype) for dtype in dtypes for shape in SHAPES}


@torch.no_grad()
def _rate(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[float, float]:
    plain, ours = _fastest(product_calls(rows, inputs, outputs, dtype))
    work = rows * inputs * outputs / 1e9
    return round(work / plain, 1), round(work / ours, 1)


def product_calls(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return calls of torch's product and of oneDNN's, with a packed weight, of the same random numbers."""
    numbers = torch.Generator().manual_seed(0)  # the caller's random numbers stay
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=numbers).to(dtype) for shape in shapes)
    packed = onednn.pack(weight[:, :, None, None], POINT, (1, inputs, 1, rows))
    return lambda: F.linear(x, weight, bias), lambda: onednn.multiply(x, packed, bias, NONE)


def _fastest(calls: tuple[Callable[[], object], ...]) -> list[float]:
    """The least seconds of each call, in turns."""
    least, began = [float("inf")] * len(calls), time.perf_counter()
    for turn in range(_ROUNDS):
        if turn >= 3 and time.perf_counter() - began > _LONGEST:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            least[i] = min(least[i], time.perf_counter() - start)
    return least
