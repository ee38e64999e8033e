"""Refuse images that do not fit into memory, before memory is allocated."""

import os
from math import prod
from pathlib import Path

# Memory of all feature maps that a backbone holds at once, relative to its input: 20 (stem of stride 4) to 60 (2).
_MAPS = 32
_FLOAT_BYTES = 4


def check_images_fit(images: int, channels: int, height: int, width: int) -> None:
    """Refuse a batch whose feature maps need more memory than is free, by a rough estimate.

    Raises:
        ValueError: the batch does not fit; the message gives both sizes.
    """
    needed, free = _MAPS * _FLOAT_BYTES * prod((images, channels, height, width)), free_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"{images} images of {height}x{width} px need about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; use a smaller size"
        )


def free_bytes() -> int | None:
    """Return the memory that this process can allocate: available or physical memory, or the limit of a container."""
    found = [_available(), _physical(), _number(Path("/sys/fs/cgroup/memory.max"))]
    return min((number for number in found if number is not None), default=None)


def _available() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
