"""Write a file or a folder in one step: readers see the old state or the new one, never half of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PART = ".part"  # how the hidden folders end in which files are written; a killed process may leave one


@contextmanager
def atomic_path(out: Path) -> Iterator[Path]:
    """Yield a path beside `out`; what the body writes there is forced to the disk and then takes the name `out`.

    On an error it vanishes, and what `out` was before stays.
    """
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=PART, dir=out.parent) as folder:
        part = Path(folder) / out.name
        yield part
        for path in (*part.rglob("*"), part):
            _sync(path)
        os.replace(part, out)
        _sync(out.parent)


def _sync(path: Path) -> None:
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # it cannot open folders
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
