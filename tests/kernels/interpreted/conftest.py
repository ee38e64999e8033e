"""Triton's interpreter, with bfloat16 made right, and without two things that take most of its time.

Without the remedies tl.dot multiplies the bit patterns of bfloat16 tiles, and casts to bfloat16 truncate. Integer
overflow checks are off. At each call of a helper the interpreter replaces the functions of triton.language again,
although they are replaced until the kernel ends; here it does so once in a launch.

A load or store outside the memory of the tensors that a kernel was given is an error: on a GPU it would read or change
what lies beside them.
"""

import math
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns (uint16), to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def replace_once_in_a_launch(interpreter, patch: pytest.MonkeyPatch) -> None:
    """Let a call of a helper replace only what no call in the same launch has replaced."""
    plain_replace, plain_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[ModuleType] = set()
    languages = (interpreter.tl, interpreter.tl.core)

    def replace(function):
        found = {m for m in function.__globals__.values() if m is languages[0] or m is languages[1]}
        if found <= replaced:
            return None
        replaced.update(found)
        return plain_replace(function)

    def launch(self, *args, **kwargs):
        replaced.clear()
        return plain_launch(self, *args, **kwargs)

    patch.setattr(interpreter, "_patch_lang", replace)
    patch.setattr(interpreter.GridExecutor, "__call__", launch)


class Memory:
    """The memory of the tensors of the launch that runs now: addresses in bytes, in order."""

    def __init__(self) -> None:
        self.starts, self.ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def take(self, arguments: Iterable[Any]) -> None:
        """Allow what lies in the storages of these arguments."""
        found = {}
        for t in flat(arguments):
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
        self.starts, self.ends = (np.array(sorted(side), np.uint64) for side in (found.keys(), found.values()))

    def check(self, pointers: Any, mask: np.ndarray) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        read = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        storage = np.searchsorted(self.starts, read, side="right") - 1
        if read.size and ((storage < 0) | (read + np.uint64(size) > self.ends[storage])).any():
            raise IndexError("a kernel reads or writes outside the tensors that it was given")


def flat(arguments: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The tensors among arguments and tuples of them."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from flat(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


def stay_in_memory(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Let loads and stores that no tensor of the launch holds raise an error."""
    builder, memory = interpreter.InterpreterBuilder, Memory()
    plain_arguments = interpreter.GridExecutor._init_args_hst
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def arguments(self, args, kwargs):
        found = plain_arguments(self, args, kwargs)
        memory.take((*found[0], *found[1].values()))
        return found

    def load(self, ptrs, mask, *rest):
        memory.check(ptrs, mask.data)
        return plain_load(self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest):
        memory.check(ptrs, mask.data)
        return plain_store(self, ptrs, value, mask, *rest)

    patch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)
    patch.setattr(builder, "create_masked_load", load)
    patch.setattr(builder, "create_masked_store", store)


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle, interpreter_builder

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(widen(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(narrow(src.data), target)
        return plain_cast(self, src, dst_type)

    def dot(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widen(x.data), tl.float32) for x in (a, b))
        return plain_dot(self, a, b, d, *rest)

    with pytest.MonkeyPatch.context() as patch:
        replace_once_in_a_launch(interpreter, patch)
        stay_in_memory(interpreter, patch)
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        patch.setattr(interpreter_builder, "options", InterpreterOptions(sanitize_overflow=False))
        yield


@pytest.fixture(autouse=True)
def empty_memory_is_nan():
    """Fill what torch.empty returns with NaN, so that a result that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fenced():
    """A function that moves a tensor into a buffer of NaN, and one that says whether the fence still stands."""
    buffers = []

    def fence(x: torch.Tensor, margin: int = 512) -> torch.Tensor:
        buffer = x.new_full((x.numel() + 2 * margin,), torch.nan)
        inner = buffer[margin : margin + x.numel()].view(x.shape)
        inner.copy_(x)
        buffers.append((buffer, margin))
        return inner

    yield fence
    for buffer, margin in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all(), "a kernel wrote outside a tensor"


@pytest.fixture
def fenced_allocations(monkeypatch, fenced):
    """Let torch make uninitialized tensors between fences; return the list of those."""
    made: list[torch.Tensor] = []
    plain, plain_strided = torch.Tensor.new_empty, torch.empty_strided

    def new_empty(self, *shape, **options):
        out = plain(self, *shape, **options)
        if out.is_floating_point() and out.numel() > 0:
            made.append(out := fenced(out))
        return out

    def empty_strided(shape, strides, **options):  # a dense one
        numbers = new_empty(plain_strided((), (), **options), math.prod(shape))
        return numbers.as_strided(shape, strides, numbers.storage_offset())

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: new_empty(x, x.shape))
    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    return made
