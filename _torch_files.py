"""Read weights from .pth, .bin and .safetensors files of unknown origin. No file runs code.

torch's zip format (checksums verified; what TorchScript and torch.export write is refused as a program) and the format
before torch 1.6, both through `_unpickle`. Sizes that a file declares are compared with its length before memory is
allocated, and special files (pipes, devices) are refused before they are opened.
"""

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import SEEK_SET, BufferedIOBase, BufferedReader, BytesIO, IOBase
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ._errors import first_line, printable
from ._files import UnreadableFileError, check_regular
from ._unpickle import PLACEHOLDER, BlockedError, StoredStorage, StoredTensor, Unpickler

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
_INFLATION = 16  # how many times its own length a file may declare; torch.save does not compress
_SLACK_BYTES = 2**20
_EXPANDED_BYTES = 2**26  # an expanded tensor may claim as much beyond its storage
_PROGRAMS = ("constants.pkl", "code/", "models/", "archive_format")  # entries of TorchScript and torch.export archives
_NODES = 2**22  # values in a file, parts that are shared counted each time


def read_weights(path: str | Path, select: Callable[[Any], Any] = lambda content: content) -> Any:
    """Return what a file holds: dicts, lists, numbers, texts and CPU tensors. Runs no code from the file.

    Args:
        path: .safetensors by its name; anything else is read as torch.save writes it.
        select: returns the part of the content to read; other tensors are skipped. Tensors are passed to it as
            `StoredTensor`.

    Raises:
        UnreadableFileError: no regular file, damaged, or it needs more than tensors and plain data.
    """
    path = Path(path)
    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            return select(_read_safetensors(path))
        with path.open("rb") as file:
            return _read_torch(file, path.stat().st_size, select)
    except UnreadableFileError:
        raise
    except BlockedError as error:
        name = printable(error.name)
        raise UnreadableFileError(
            f"needs more than tensors ({name}), which could run code; save its state_dict() and use that file"
        ) from error
    except Exception as error:  # zip, pickle and safetensors raise a type for each way to be damaged
        raise UnreadableFileError(
            f"is truncated or damaged, or not a checkpoint: {type(error).__name__}: {first_line(error)}"
        ) from error


def save_torch(content: Any, path: Path) -> None:
    """Write a file as torch.save does.

    Raises:
        OSError: the disk is full, or the file cannot be written. (Given a path, torch raises a RuntimeError then, or
            ends the process.)
    """
    with written(path) as file:
        torch.save(content, file)


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for torch's writers, which must not see an error: it is raised when they are done."""
    with path.open("wb") as file:
        sink = _Sink(file)
        try:
            yield sink  # type: ignore[misc]  # it has what the writers call
        finally:
            if sink.error is not None:
                raise sink.error


class _Sink(IOBase):
    """A file that remembers its first error, and takes everything after it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        return self._do(lambda: self.file.write(data), len(data))

    def flush(self) -> None:
        self._do(self.file.flush, None)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        return self._do(lambda: self.file.seek(offset, whence), offset)

    def _do(self, action: Callable[[], Any], otherwise: Any) -> Any:
        if self.error is None:
            try:
                return action()
            except OSError as error:
                self.error = error
        return otherwise


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device="cpu")


def _read_torch(file: BufferedReader, length: int, select: Callable[[Any], Any]) -> Any:
    start = file.read(512)
    file.seek(0)
    if start[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            return _read_zip(archive, length, select)
    if start[257:262] == b"ustar":
        raise UnreadableFileError("is a tar archive, as torch wrote them before 0.2; save it again with a newer torch")
    return _read_legacy(_Bounded(file, length), select)


def _read_zip(archive: zipfile.ZipFile, length: int, select: Callable[[Any], Any]) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    root = pickles[0].removesuffix("data.pkl") if pickles else ""
    if any(name.rpartition(f"/{part}")[1] or name.startswith(part) for name in entries for part in _PROGRAMS):
        raise UnreadableFileError("is a program (TorchScript or torch.export), which runs code; save its state_dict()")
    if len(pickles) != 1 or len(entries) != len(archive.infolist()):
        raise UnreadableFileError("cannot be read: a zip archive without one data.pkl is not a checkpoint")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries.values()):
        raise UnreadableFileError("cannot be read: it is compressed in a way that torch does not know")
    if sum(entry.file_size for entry in entries.values()) > _INFLATION * length + _SLACK_BYTES:
        raise UnreadableFileError(f"cannot be read: its {length} bytes declare more than {_INFLATION} times as many")
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise UnreadableFileError("cannot be read: it was written on a big-endian machine")
    pickled = archive.read(pickles[0])
    content = _small(Unpickler(_Bounded(BytesIO(pickled), len(pickled))).load())

    @contextmanager
    def data(storage: StoredStorage) -> Iterator[tuple[Any, int]]:
        entry = entries[f"{root}data/{storage.key}"]
        with archive.open(entry) as file:
            yield file, entry.file_size

    return _Tensors(data).fill(select(content))


def _read_legacy(file: "_Bounded", select: Callable[[Any], Any]) -> Any:
    if Unpickler(file).load() != _MAGIC or Unpickler(file).load() != _PROTOCOL:
        raise pickle.UnpicklingError("not a file of torch.save")
    if Unpickler(file).load().get("little_endian") is not True:
        raise UnreadableFileError("cannot be read: it was written on a big-endian machine")
    unpickler = Unpickler(file)
    content = _small(unpickler.load())
    places: dict[str, tuple[int, int]] = {}
    for key in Unpickler(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        size = count * unpickler.itemsizes[str(key)]
        places[str(key)] = file.skip(size), size

    @contextmanager
    def data(storage: StoredStorage) -> Iterator[tuple[Any, int]]:
        start, size = places[storage.key]
        file.go(start)
        yield file, size

    return _Tensors(data).fill(select(content))


def _small(content: Any) -> Any:
    """Refuse content that a few shared parts blow up when it is walked through or printed."""
    counts: dict[int, int] = {}

    def count(part: Any) -> int:
        if not isinstance(part, dict | list | tuple):
            return 1
        if id(part) not in counts:
            counts[id(part)] = 1 + sum(map(count, part.values() if isinstance(part, dict) else part))
        return counts[id(part)]

    if count(content) > _NODES:
        raise pickle.UnpicklingError("its parts repeat each other without end")
    return content


class _Bounded:
    """A file of known length that gives what it has: no request for more takes memory."""

    def __init__(self, file: BufferedIOBase, length: int) -> None:
        self.file = file
        self.left = length
        self.length = length

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise EOFError(f"{count} bytes wanted, {self.left} left")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError("the file ends early")
        return data

    def readline(self) -> bytes:
        line = self.file.readline(min(self.left, 4096))  # names and numbers in text: short
        self.left -= len(line)
        return line

    def readinto(self, buffer: memoryview) -> int:
        return self.file.readinto(buffer)

    def skip(self, count: int) -> int:
        """Pass over bytes, and return where they begin."""
        start = self.length - self.left
        if not 0 <= count <= self.left:
            raise EOFError(f"{count} bytes declared, {self.left} left")
        self.go(start + count)
        return start

    def go(self, place: int) -> None:
        self.file.seek(place)
        self.left = self.length - place


class _Tensors:
    """Puts tensors in the place of their descriptions; each storage is read once, and shared as it was."""

    def __init__(self, data: Callable[[StoredStorage], Any]) -> None:
        self.data = data
        self.storages: dict[str, Tensor] = {}
        self.done: dict[int, tuple[Any, Any]] = {}  # by id, with the object itself, so that an id stays its own

    def fill(self, content: Any) -> Any:
        """Return plain data with its tensors, without placeholders. Shared parts stay shared."""
        if isinstance(content, StoredTensor):
            return self.tensor(content)
        if not isinstance(content, dict | list | tuple):
            return content
        if id(content) not in self.done:
            self.done[id(content)] = content, self._filled(content)
        return self.done[id(content)][1]

    def _filled(self, content: dict | list | tuple) -> Any:
        if isinstance(content, dict):
            kept = {k: v for k, v in content.items() if v is not PLACEHOLDER and k is not PLACEHOLDER}
            return type(content)((key, self.fill(value)) for key, value in kept.items())
        return type(content)(self.fill(value) for value in content if value is not PLACEHOLDER)

    def tensor(self, stored: StoredTensor) -> Tensor:
        size = stored.numel * stored.dtype.itemsize
        if size > stored.storage.numel * stored.storage.dtype.itemsize + _EXPANDED_BYTES:
            raise pickle.UnpicklingError(f"a tensor of {stored.shape} claims more than its storage holds")
        key, start = stored.storage.key, stored.storage.start  # elements; untyped storages begin at 0
        if key not in self.storages:
            self.storages[key] = self.storage(stored.storage)
        raw = self.storages[key]
        elements = raw[: len(raw) // stored.dtype.itemsize * stored.dtype.itemsize].view(stored.dtype)
        return elements.as_strided(stored.shape, stored.stride, start + stored.offset)  # checks the bounds

    def storage(self, storage: StoredStorage) -> Tensor:
        """Return the bytes of a storage; the end of an entry in a zip archive verifies its checksum."""
        with self.data(storage) as (file, size):
            if size < (storage.start + storage.numel) * storage.dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {storage.key} is shorter than the tensors in it")
            raw = torch.empty(size, dtype=torch.uint8)
            view, got = memoryview(raw.numpy()), 0
            while got < size:
                count = file.readinto(view[got : got + 2**24])
                if not count:
                    raise EOFError(f"storage {storage.key} ends early")
                got += count
        return raw
