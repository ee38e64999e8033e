"""Refuse images that cannot fit into memory before any is taken."""

import os
from math import prod
from pathlib import Path

# Maps that a backbone holds at once, in bytes of its input: 20 to 60 for those with stems of stride 4 and 2.
_MAPS = 32
_FLOAT_BYTES = 4


def check_images_fit(images: int, channels: int, height: int, width: int) -> None:
    """Refuse a batch whose maps would need more memory than is free, by a rough estimate.

    Raises:
        ValueError: the message gives both figures.
    """
    needed, free = _MAPS * _FLOAT_BYTES * prod((images, channels, height, width)), free_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"{images} images of {height}x{width} px need about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; take a smaller size"
        )


def free_bytes() -> int | None:
    """Memory that this process may still take: Linux's estimate or all there is, less where a container limits it."""
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
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
