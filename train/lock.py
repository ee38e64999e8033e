"""One run a folder: a lock that ends with its process, however that ends."""

import os
import socket
import sys
import time
from pathlib import Path

from .._files import why_not_writable
from .errors import TrainError

NAME = ".lock"
_BEYOND = 2**30  # offset of the locked byte: Windows does not let others read a locked part
_LONGEST = 500  # bytes of the holder's line

_held: set[Path] = set()  # POSIX locks belong to processes: they do not exclude threads


class FolderInUseError(TrainError):
    """Another process trains in the folder."""


class RunLock:
    """Hold work_dir for this process. Process 0 of a run calls `take`; leaving the context gives the folder back.

    A record lock (fcntl): the system releases it when the process ends, and loader workers do not inherit it. It works
    across machines where the file system supports it, as NFS does.
    """

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.path = work_dir / NAME
        self.handle: int | None = None
        self.made: list[Path] = []  # folders, innermost first

    def take(self) -> None:
        """Create the folder and lock it.

        Raises:
            FolderInUseError: another process holds it; the message gives its number, machine and start.
            TrainError: the folder cannot be written.
        """
        if (why := why_not_writable(self.work_dir)) is not None:
            raise TrainError(f"work_dir {self.work_dir} cannot be written: {why}")
        if self.path in _held:
            raise FolderInUseError(self._in_use(f"{os.getpid()} {socket.gethostname()}"))
        self._make_folders()
        while self.handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(handle)
            except (BlockingIOError, PermissionError):
                holder = os.read(handle, _LONGEST).decode(errors="replace")
                os.close(handle)
                raise FolderInUseError(self._in_use(holder)) from None
            except OSError as error:
                os.close(handle)
                raise TrainError(
                    f"work_dir {self.work_dir}: its file system has no locks ({error.strerror}), so two runs could "
                    "write there; use a folder on another file system"
                ) from error
            if self._is_current(handle):
                self.handle = handle
            else:  # its last holder removed the file between the two calls
                os.close(handle)
        _held.add(self.path)
        os.ftruncate(self.handle, 0)
        os.write(self.handle, f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error: object) -> None:
        if self.handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.handle)  # this releases the lock
            _held.discard(self.path)
            self.handle = None
        for folder in self.made:
            try:
                folder.rmdir()  # of a refused run: only empty folders
            except OSError:
                break

    def _make_folders(self) -> None:
        for folder in reversed([self.work_dir, *self.work_dir.parents]):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self.made.insert(0, folder)

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _in_use(self, holder: str) -> str:
        number, host, *start = holder.split() or ["unknown", "another machine"]
        since = f", since {' '.join(start)}" if start else ""
        return (
            f"work_dir {self.work_dir} is in use by process {number} on {host}{since}: wait for it, end it, or use "
            "another work_dir"
        )


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, _BEYOND, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _BEYOND)
