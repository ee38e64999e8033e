"""Pickles as an attacker writes them: opcodes by hand, and archives around them."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Call:
    """Pickles as a call of `what` with `args`."""

    def __init__(self, what: Any, *args: Any) -> None:
        self.what, self.args = what, args

    def __reduce__(self) -> tuple[Any, tuple]:
        return self.what, self.args


class Global:
    """Pickles as a bare name of the given module."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Steps):
            obj.write(self)
        else:
            super().save(obj, save_persistent_id)


class Steps:
    """Pickles as opcodes that a function writes."""

    def __init__(self, write: Callable[[_Pickler], None]) -> None:
        self.write = write


def reduce(what: Any, *args: Any) -> Steps:
    return Steps(lambda p: (p.save(what), p.save(args), p.write(pickle.REDUCE)))


def new(what: Any, *args: Any) -> Steps:
    return Steps(lambda p: (p.save(what), p.save(args), p.write(pickle.NEWOBJ)))


def build(what: Any, state: Any) -> Steps:
    return Steps(lambda p: (p.save(what), p.save(state), p.write(pickle.BUILD)))


def inst(module: str, name: str, *args: Any) -> Steps:
    def write(p: _Pickler) -> None:
        p.write(pickle.MARK)
        for arg in args:
            p.save(arg)
        p.write(f"i{module}\n{name}\n".encode())

    return Steps(write)


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def rewritten(source: Path, out: Path, change: Callable[[bytes], bytes], **options: Any) -> Path:
    """Copy a file of torch.save with another data.pkl, checksums right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", **options) as archive:
        for name in old.namelist():
            data = old.read(name)
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return out


def zipped(content: Any, out: Path) -> Path:
    """A file in torch.save's layout with a given pickle, without tensors."""
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", content if isinstance(content, bytes) else pickled(content))
        archive.writestr("archive/version", b"3\n")
    return out


def legacy(content: Any, out: Path) -> Path:
    """The same as torch wrote it before 1.6."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, content, []]
    out.write_bytes(b"".join(pickled(part) for part in parts))
    return out


def safetensors(header: bytes, out: Path, length: int | None = None, data: bytes = b"") -> Path:
    out.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return out


def plain_checkpoint(out: Path) -> Path:
    torch.save({"state_dict": {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.zeros(2)}}, out)
    return out
