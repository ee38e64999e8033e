"""Write a file or a folder atomically, and read files of unknown origin safely."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ._errors import RequestError, first_line

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space on the disk, for the user, or for a file
PART = ".part"  # suffix of the temporary folders; a killed process may leave one

IS_FOLDER = "is a folder"
_DEEPEST = 64


class UnreadableFileError(RequestError):
    """A file cannot be read, or holds unexpected content. The message says why, without the path."""


def check_regular(path: Path) -> None:
    """Refuse anything but a regular file before it is opened: a pipe would block, a device would never end.

    Raises:
        UnreadableFileError: missing, a folder, a pipe, a device, or not accessible.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UnreadableFileError("does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UnreadableFileError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise UnreadableFileError(IS_FOLDER)
    if not stat.S_ISREG(mode):
        raise UnreadableFileError("is not a regular file")


def read_text(path: Path, limit_bytes: int) -> str:
    """Return the text of a regular UTF-8 file of at most `limit_bytes`. Runs nothing.

    Raises:
        UnreadableFileError: not a regular file, larger, or not UTF-8.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise UnreadableFileError(f"is larger than {limit_bytes} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise UnreadableFileError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UnreadableFileError("is not UTF-8 text") from error


def text_lines(text: str) -> list[str]:
    """Return the lines of a text, which end as on Unix, Windows or old Macs, without a byte order mark.

    str.splitlines ends lines at characters that may be part of a name too, such as U+2028.
    """
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_json(path: Path, limit_bytes: int) -> Any:
    """Return the content of a JSON file: plain data, without NaN and infinities, nested at most 64 deep. Runs nothing.

    Raises:
        UnreadableFileError: not a regular file, larger, not UTF-8, or not JSON.
    """
    text = read_text(path, limit_bytes)
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        check_plain(data)
        return data
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"is not JSON: {first_line(error)}") from error


def check_plain(data: Any, most: int = 2**24) -> None:
    """Refuse plain data with more than `most` values, or nested deeper than 64. Shared parts are counted each time.

    Raises:
        ValueError: there are more values, or deeper nesting.
    """
    if _left(data, most, _DEEPEST) < 0:
        raise ValueError(f"it has more than {most} values")


def _left(data: Any, left: int, depth: int) -> int:
    """Return how many more values are allowed after those in `data`; negative when there are too many."""
    if depth == 0:
        raise ValueError(f"it is nested deeper than {_DEEPEST}")
    left -= 1
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else ()
    for part in parts:
        if left < 0:
            break
        left = _left(part, left, depth - 1)
    return left


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def why_not_writable(path: Path) -> str | None:
    """Return why nothing can be written at `path`, which need not exist, or None."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        return f"{there} is not a folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"no write permission for {there}"


@contextmanager
def atomic_path(out: Path, *, beside: str | None = None) -> Iterator[Path]:
    """Yield a temporary path; what the body writes there is flushed to disk and then renamed to `out`.

    On error the temporary file is removed and `out` is left unchanged.

    Args:
        beside: suffix of a second file that the body may write beside the first, and that gets the name of `out` with
            this suffix. The two are never those of different calls: other processes wait, an error puts both older
            files back, and a process that is killed between the renames leaves no `out`.
    """
    with TemporaryDirectory(prefix=f".{out.name[:40]}.", suffix=PART, dir=out.parent) as folder:
        part = Path(folder) / out.name
        try:
            yield part
        except OSError as error:
            inner = out.parent.suffix == PART  # of another file or folder that is being written
            if error.errno not in _FULL or error.filename is not None or inner:
                raise
            raise OSError(error.errno, error.strerror, str(out)) from error  # of a write to an open file
        second = None if beside is None else part.with_suffix(beside)
        if second is not None and not second.exists():  # the body wrote one file
            second = None
        for path in (*part.rglob("*"), part, *([] if second is None else [second])):
            _sync(path)
        if second is None:
            os.replace(part, out)
        else:
            _replace_both(part, second, out)
        _sync(out.parent)


def _replace_both(part: Path, second: Path, out: Path) -> None:
    """Rename two files to `out` and to the same name with the second's suffix, which must be there first."""
    moves = {second: out.with_suffix(second.suffix), part: out}
    older = part.parent / "older"
    older.mkdir()
    with _locked(out.parent):
        try:
            for place in reversed(moves.values()):
                if place.exists():
                    os.replace(place, older / place.name)
            for path, place in moves.items():
                os.replace(path, place)
        except BaseException:
            for path, place in moves.items():
                if not path.exists():  # it is at its place
                    place.unlink()
                if (older / place.name).exists():
                    os.rename(older / place.name, place)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which ends with the process. Windows, and some file systems, have none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
