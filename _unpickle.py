"""Unpickle tensors and plain data without importing or calling anything that the pickle names.

A pickle is a program: it names functions and calls them. Here a name stands for one of a fixed set of constructors of
this file, or for a placeholder that ignores arguments and state (log buffers of MMEngine, NumPy's reconstructors,
argparse's Namespace), or the file is refused. A tensor becomes a `StoredTensor`, a description that the caller checks
before it reads any data.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol

import torch

# Objects that checkpoints may hold besides weights. They are dropped; their names are neither imported nor called.
_IGNORED = ("mmengine.logging.", "numpy.", "builtins.getattr", "argparse.Namespace", "torch.device")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))  # no quantized ones
}
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip


class Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class BlockedError(pickle.UnpicklingError):
    """The pickle names something outside the fixed set; `name` says what."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Placeholder:
    """Replaces every object that is dropped: ignores items, arguments and state."""

    __slots__ = ()

    def append(self, item: object) -> None: ...

    def add(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


PLACEHOLDER = _Placeholder()


@dataclass(frozen=True)
class StoredStorage:
    """Raw elements in the file: under a key, so many of a dtype, from an element on."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's elements are; offset, shape and stride count elements of `dtype` in the storage."""

    storage: StoredStorage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


class _Constructor:
    """A function of this file; pickles call it by the name of the function that it replaces."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


class _Storage:
    """A storage class as a pickle names it; dtype None is untyped, bytes."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


class Unpickler(pickle._Unpickler):  # the Python one: its steps can be replaced, and its memo grows with the file
    """Read one pickle of `file`; `load` returns plain data, `StoredTensor` and `PLACEHOLDER`.

    Raises:
        BlockedError: a name outside the fixed set.
        Exception: damaged pickles fail in many ways.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # of the base class, like the next two
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Readable) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")  # as torch decodes strings of Python 2
        self.itemsizes: dict[str, int] = {}  # of the elements of each storage

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if full in _CONSTRUCTORS:
            return _CONSTRUCTORS[full]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            kind = name.removesuffix("Storage")
            if kind in _STORAGES or kind == "Untyped":
                return _Storage(_STORAGES.get(kind))
        if full.startswith(_IGNORED):
            return PLACEHOLDER
        raise BlockedError(full)

    def get_extension(self, code: int) -> None:
        raise BlockedError(f"extension {code}")

    def persistent_load(self, pid: Any) -> StoredStorage:
        if pid[0] == "module":  # whole modules, saved by old torch with their source
            raise BlockedError(f"{getattr(pid[1], '__name__', 'module')} as a whole module")
        kind, storage, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(key, str | int):
            raise pickle.UnpicklingError("a storage reference is malformed")
        dtype = torch.uint8 if storage.dtype is None else storage.dtype
        whole = StoredStorage(str(key), dtype, _count(numel))
        self.itemsizes[whole.key] = dtype.itemsize
        if not view or view[0] is None:
            return whole
        _, start, size = view[0]  # a part of another storage, in files of torch before 0.4
        if _count(start) + _count(size) > whole.numel:
            raise pickle.UnpicklingError("a storage reference is malformed")
        return StoredStorage(whole.key, dtype, size, start)

    def _call(self, what: Any, args: Any) -> Any:
        if what is PLACEHOLDER:
            return PLACEHOLDER
        if not isinstance(what, _Constructor):
            raise pickle.UnpicklingError(f"the pickle calls a {type(what).__name__}")
        return what.make(*args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        if keywords and self.stack[-2] is not PLACEHOLDER:
            raise pickle.UnpicklingError("the pickle passes keywords")
        self.load_reduce()

    def _instantiate(self, klass: Any, args: Any) -> None:  # the opcodes INST and OBJ of protocol 0
        self.append(self._call(klass, args))

    def load_build(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict) and self.stack[-1] is not PLACEHOLDER:
            raise pickle.UnpicklingError(f"the pickle sets the state of a {type(self.stack[-1]).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def load_additems(self) -> None:
        for item in self.pop_mark():
            self.stack[-1].add(_key(item))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
    }
    for opcode in (pickle.LONG4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.DICT, pickle.FROZENSET):
        del dispatch[opcode[0]]  # sizes without a bound, buffers from outside, unchecked keys


def _key(key: Any) -> Any:
    """Refuse a key that nests: tuples that share their parts take exponential time to hash."""
    if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
        raise pickle.UnpicklingError("a key is a nested tuple")
    return key


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**62:
        raise pickle.UnpicklingError(f"a size is not a count: {type(number).__name__}")
    return number


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, StoredStorage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _checked(StoredTensor(storage, storage.dtype, offset, shape, stride))


def _tensor_of_bytes(storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any):
    if not isinstance(storage, StoredStorage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _checked(StoredTensor(storage, dtype, offset, shape, stride))


def _checked(tensor: StoredTensor) -> StoredTensor:
    """Refuse a tensor that reaches past its storage."""
    if not isinstance(tensor.shape, tuple) or len(tensor.shape) != len(tensor.stride) or len(tensor.shape) > 64:
        raise pickle.UnpicklingError("a tensor's shape and stride disagree")
    sizes, steps = [_count(n) for n in tensor.shape], [_count(n) for n in tensor.stride]
    last = _count(tensor.offset) + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if prod(sizes) and (last + 1) * tensor.dtype.itemsize > tensor.storage.numel * tensor.storage.dtype.itemsize:
        raise pickle.UnpicklingError(f"a tensor of {tuple(sizes)} reaches past its storage")
    return tensor


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise pickle.UnpicklingError("a parameter holds no tensor")
    return data


def _with_attributes(make: Any, kind: Any, args: Any, state: Any) -> StoredTensor:
    """A tensor that carries Python attributes, which are dropped."""
    if not isinstance(make, _Constructor) or make.make not in (_tensor, _tensor_of_bytes, _parameter):
        raise pickle.UnpicklingError("a tensor is rebuilt by a function that is not torch's")
    return make.make(*args)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes are malformed")
    return text.encode("latin1")


def _ordered(items: Any = ()) -> OrderedDict:
    return OrderedDict((_key(key), value) for key, value in items)


_CONSTRUCTORS = {
    "collections.OrderedDict": _Constructor(_ordered),
    "torch._utils._rebuild_tensor": _Constructor(_tensor),
    "torch._utils._rebuild_tensor_v2": _Constructor(_tensor),
    "torch._utils._rebuild_tensor_v3": _Constructor(_tensor_of_bytes),
    "torch._utils._rebuild_parameter": _Constructor(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Constructor(_parameter),
    "torch._tensor._rebuild_from_type_v2": _Constructor(_with_attributes),
    "torch.Tensor": _Constructor(_parameter),  # named as a type only
    "torch.nn.parameter.Parameter": _Constructor(_parameter),
    "torch.Size": _Constructor(lambda sizes=(): tuple(_count(n) for n in sizes)),
    "_codecs.encode": _Constructor(_encoded),
    "builtins.set": _Constructor(lambda items=(): {_key(item) for item in items}),
    "builtins.complex": _Constructor(lambda real, imag=0.0: complex(float(real), float(imag))),
}
