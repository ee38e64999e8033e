"""Watch a model's calls of attention: our ops, torch's scaled_dot_product_attention, and softmax over keys.

A TorchFunctionMode sees the calls; hooks on all modules say which module makes them. The model must run in eager mode.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention_ops._op import OPS

SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax"


@dataclass(frozen=True)
class Frame:
    """A module whose forward is running."""

    name: str
    module: nn.Module
    first_shape: tuple[int, ...]  # of its first tensor
    size: tuple[int, int] | None = None  # of a map, if it is given one: (rows, columns)


@dataclass(frozen=True)
class Part:
    """Heads and keys of one call: all of them, one branch of HiLo, or one kind of keys of aggregated attention.

    Attributes:
        branch: "high" or "low" for HiLo, "local" or "pooled" where aggregated attention has both, else "".
        q, k, v: (B, H, W, heads, d) of our ops on maps, (B, N, heads, d) of our ops on tokens; pooled keys are tokens.
        heads: slice of the heads of the op's output.
        with_values: the arguments of the call with other values in this part, without gates and without weights of
            values that are no probabilities.
        key_size: (rows, columns) of keys that are tokens of a map.
    """

    branch: str
    q: Tensor
    k: Tensor
    v: Tensor
    heads: slice
    with_values: Callable[[Tensor], dict[str, Any]]
    key_size: tuple[int, int] | None = None


@dataclass
class Call:
    """One call of attention.

    Attributes:
        layer: name of the module that makes it.
        op: name of our op, SDPA or SOFTMAX.
        arguments: of the call, by name.
        frames: the modules around it, outermost first; the last is the layer.
    """

    layer: str
    op: str
    arguments: dict[str, Any]
    frames: list[Frame] = field(repr=False)


Replace = Callable[[Call, Any], Any]  # the call and its result -> the result that the model gets


class _Watch(TorchFunctionMode):
    def __init__(self, frames: list[Frame], see: Replace) -> None:
        super().__init__()
        self.frames, self.see = frames, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        found = self._call_of(func, args, kwargs, out) if self.frames else None
        return out if found is None else self.see(found, out)

    def _call_of(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Call | None:
        space, _, rest = str(func).partition(".")
        name = rest.partition(".")[0]
        if space == "foveate" and name in OPS and attends(name):
            return self._made(name, OPS[name].bind(*args, **kwargs))
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            return self._made(SDPA, dict(zip(names, args, strict=False)) | kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            return self._of_softmax(kwargs.get("dim", args[1] if len(args) > 1 else None), out)
        return None

    def _made(self, op: str, arguments: dict[str, Any], depth: int | None = None) -> Call:
        frames = self.frames[:depth]
        return Call(frames[-1].name, op, arguments, frames)

    def _of_softmax(self, axis: int | None, out: Tensor) -> Call | None:
        """A softmax over the last axis of (B, heads, queries, keys), in a module with so many heads or in its child."""
        if out.dim() != 4 or axis not in (-1, 3):
            return None
        for depth in (len(self.frames), len(self.frames) - 1):
            if depth and _spells_out(self.frames[depth - 1].module, out.shape[1]):
                return self._made(SOFTMAX, {"probabilities": out}, depth)
        return None


def _spells_out(module: nn.Module, heads: int) -> bool:
    """Whether a softmax with such heads is a module's attention; our modules attend by ops, not by softmaxes."""
    ours = type(module).__module__.startswith(__package__.partition(".")[0] + ".")
    return getattr(module, "num_heads", None) == heads and not ours


def attends(op: str) -> bool:
    """Say whether one of our ops is attention of queries to keys."""
    names = OPS[op].defaults
    return any(wanted <= names.keys() for wanted in ({"q", "k", "v"}, {"high", "low"}, {"pooled_k", "pooled_v"}))


def folded_heads(call: Call) -> int | None:
    """Return the number of heads of a call of scaled_dot_product_attention on (B * heads, N, d), as in timm's SAM.

    None where heads have an axis of their own.
    """
    if call.op != SDPA or call.arguments["query"].dim() != 3:
        return None
    counts = (getattr(frame.module, "num_heads", None) for frame in reversed(call.frames))
    heads = next((count for count in counts if isinstance(count, int)), 1)
    return heads if len(call.arguments["query"]) % heads == 0 else 1


@contextlib.contextmanager
def watching(model: nn.Module, see: Replace) -> Iterator[None]:
    """Inside, `see` gets every call of attention that the model makes, and returns what the model goes on with."""
    frames: list[Frame] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())
            first = next((tuple(a.shape) for a in given if isinstance(a, Tensor)), ())
            frames.append(Frame(name, module, first, next(filter(None, map(_as_size, given)), None)))

        return hook

    def leave(module: nn.Module, args: tuple, out: Any) -> None:
        frames.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with _Watch(frames, see), _spelled_by_sdpa(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _as_size(value: Any) -> tuple[int, int] | None:
    """(rows, columns) of a map, if the argument of a module is such a pair."""
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    return None


@contextlib.contextmanager
def _spelled_by_sdpa(model: nn.Module) -> Iterator[None]:
    """Let timm's layers call scaled_dot_product_attention where they were made to spell it out."""
    spelled = [module for module in model.modules() if getattr(module, "fused_attn", None) is False]
    for module in spelled:
        module.fused_attn = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in spelled:
            module.fused_attn = False  # type: ignore[assignment]


def parts_of(call: Call) -> list[Part]:
    """Return the parts of a call of one of our ops."""
    arguments = call.arguments
    if "pooled_k" in arguments:
        return _parts_of_aggregated(arguments)
    if "q" in arguments:
        plain = arguments | ({"gate": None} if "gate" in arguments else {})
        q, k, v = (arguments[name].detach() for name in "qkv")
        return [Part("", q, k, v, slice(0, q.shape[-2]), lambda values: {**plain, "v": values})]
    found, start = [], 0
    for branch in ("high", "low"):
        q, k, v = (t.detach() for t in arguments[branch])
        end = start + q.shape[-2]

        def with_values(values: Tensor, branch: str = branch, q: Tensor = q, k: Tensor = k) -> dict[str, Any]:
            return {**arguments, branch: [q, k, values]}

        if end > start:
            found.append(Part(branch, q, k, v, slice(start, end), with_values))
        start = end
    return found


def _parts_of_aggregated(arguments: dict[str, Any]) -> list[Part]:
    q, local = arguments["q"].detach(), arguments["local_k"] is not None
    heads, plain = slice(0, q.shape[-2]), arguments | {"gates": None}
    key_size = arguments["bias_rows"].shape[1], arguments["bias_cols"].shape[1]
    k, v = arguments["pooled_k"].detach(), arguments["pooled_v"].detach()
    found = []
    if local:
        plain |= {name: torch.zeros_like(arguments[name]) for name in ("tokens", "token_bias")}
        near = arguments["local_k"].detach(), arguments["local_v"].detach()
        found.append(Part("local", q, *near, heads, lambda values: {**plain, "local_v": values}))
    branch = "pooled" if local else ""
    found.append(Part(branch, q, k, v, heads, lambda values: {**plain, "pooled_v": values}, key_size))
    return found


def branches_of(call: Call) -> dict[str, slice]:
    """Return the heads of the output of a call of one of our ops, by branch; parts that share heads are one, ""."""
    found: dict[tuple[int, int], list[str]] = {}
    for part in parts_of(call):
        found.setdefault((part.heads.start, part.heads.stop), []).append(part.branch)
    return {names[0] if len(names) == 1 else "": slice(*place) for place, names in found.items()}
