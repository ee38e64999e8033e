"""One declaration for each op: schema, autocast, checks, default scale and choice of body, in this order.

An op's file holds the public function (signature and docstring), a check, the bodies, and one call of `declare`. All of
them name their arguments as the public signature does: a new keyword changes the signature and the bodies, and nothing
else. Bodies receive sizes as tuples (rows, columns) and `scale` as a number. Where several bodies would repeat a long
signature, arguments that belong together are a NamedTuple, a bundle: bodies take it as one parameter, and a new keyword
changes the bundle instead.

    reference  the definition: plain torch, float32 inside at least, slow
    tiled      torch on real tensors, fast on CPUs; may have its own backward pass and use cached tables
    graph      plain differentiable torch, for tracers, compilers, exporters, torch.func and forward-mode AD: replaces
               `tiled` there, and cannot be requested by name; `tiled` itself where that is plain already
    fused      Triton, on a GPU; an op without kernels says so in `why_not_fused`

torch.compile gets `tiled` too, on a CPU and without gradients, as one operator `foveate::_NAME` that it does not look
into: its own loops over the graph body are slower.

The op is CompositeImplicitAutograd: tracers see the torch operations of the body, so that backward, export and ONNX
need no registration.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch import calls_are_seen, compiles, forward_ad_is_on, is_faked_or_recorded, script_as, transforms_are_on
from ..kernels._launch import PLAIN_TENSORS, autocasts, is_recorded, no_autocast
from ._checks import pair
from ._graph.exporting import is_exported
from ._schema import Impl, plain_types, schema_of, schema_types

Size = Annotated[int | Sequence[int], "int[2]"]  # tokens, one number or (rows, columns); a constant under tracers
SymSize = Annotated[int | Sequence[int], "SymInt[2]"]  # tokens; may depend on a traced size
Flags = Annotated[bool | Sequence[bool], "bool[2]"]
Count = Annotated[int, "SymInt"]
Tensors = Annotated[Sequence[Tensor], "Tensor[]"]
Pair = tuple[int, int]  # (rows, columns), as bodies receive sizes
Body = Callable[..., Any]  # returns what the public function returns: one tensor, or a tuple of them
Bundles = Mapping[str, Callable[..., Any]]  # by name, NamedTuples whose fields are arguments


@dataclass(frozen=True)
class Op:
    """An op as `declare` received it, and the steps of a call."""

    name: str
    defaults: Mapping[str, Any]  # of all arguments of the public signature; `Parameter.empty` where there is none
    types: tuple[tuple[type, ...], ...]  # of each argument, as a call without the dispatcher takes it
    tensors: tuple[str, ...]  # arguments that are tensors, lists of them, or None
    pairs: tuple[str, ...]  # arguments that are (rows, columns)
    check: Callable[..., None]
    bodies: Mapping[Impl, Body]
    graph: Body
    opaque: Body
    why_not_fused: Callable[..., str | None]
    cast: tuple[str, ...]
    macs: Callable[..., int] | None
    bundles: Bundles

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.bind(*args, **kwargs))

    def is_plain_call(self, values: tuple[Any, ...]) -> bool:
        """Say whether a call with these values, one an argument, is the same without the dispatcher: 10 us shorter."""
        if is_recorded() or calls_are_seen() or len(values) != len(self.types):
            return False
        return all(map(_is_one_of, values, self.types))

    def run(self, arguments: dict[str, Any]) -> Any:
        """Run the body for all arguments by name, pairs as tuples, without the dispatcher."""
        impl, tensors = arguments.pop("impl"), self._tensors(arguments)
        first = tensors[0]
        if autocast := autocasts(first):
            for name in self.cast:
                arguments[name] = _cast(arguments[name])
            tensors = self._tensors(arguments)
            first = tensors[0]
        self._bundle(arguments)
        _call(self.check, arguments)
        if "scale" in arguments and arguments["scale"] is None:
            arguments["scale"] = first.shape[-1] ** -0.5
        transformed = under_transform(tensors)
        body = self._choose(impl, arguments, tensors, transformed)
        if not (autocast or transformed):  # entering two empty contexts takes 1 us
            return _call(body, arguments)
        place = sdpa_kernel(SDPBackend.MATH) if transformed else nullcontext()  # the other kernels differentiate once
        with place, no_autocast(first):
            return _call(body, arguments)

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return all arguments by name, pairs as tuples, from what torch hands over: the schema has checked it.

        Torch leaves out arguments that have their default value. Sizes may be nodes of a graph.
        """
        given = dict(zip(self.defaults, args, strict=False)) | kwargs
        arguments = {name: given[name] if name in given else default for name, default in self.defaults.items()}
        for name in self.pairs:
            if (value := arguments[name]) is not None and type(value) is not tuple:
                arguments[name] = tuple(value if len(value) == 2 else pair(self.name, name, value))
        return arguments

    def useful_macs(self, *args: Any, **kwargs: Any) -> int:
        """Return the multiply-adds that the definition needs for a call, where the op counts its own."""
        assert self.macs is not None
        return _call(self.macs, self._bundle(self.bind(*args, **kwargs)))

    def calling(self, body: Body) -> Body:
        """Return a body with the signature and defaults of the public function, for ops composed of this one."""
        return lambda *args, **kwargs: _call(body, self._bundle(self.bind(*args, **kwargs)))

    def _tensors(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        found = []
        for name in self.tensors:
            value = arguments[name]
            if isinstance(value, (list, tuple)):
                found += value
            elif value is not None:
                found.append(value)
        return found

    def _bundle(self, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, kind in self.bundles.items():
            arguments[name] = _call(kind, arguments)
        return arguments

    def _choose(self, impl: str, arguments: Mapping[str, Any], tensors: list[Tensor], transformed: bool) -> Body:
        """Return the body to run."""
        reason = None
        if impl not in (Impl.TILED.value, Impl.REFERENCE.value):
            reason = _call(self.why_not_fused, arguments)
            if reason is None and transformed:
                reason = "the kernels support neither torch.func nor forward-mode AD; use impl='tiled'"
        run = choose(self.name, impl, reason)
        tiled = self.bodies[Impl.TILED]
        if run is not Impl.TILED or self.graph is tiled or not (transformed or is_traced(tensors)):
            return self.bodies[run]
        return self.opaque if not transformed and _is_compiled_for_inference(tensors) else self.graph


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    return type(value) in types


def _pair_of(op: str, name: str, value: Any) -> Any:
    kind = type(value)
    if value is None or (kind is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int):
        return value
    return (value, value) if kind is int or kind is bool else tuple(pair(op, name, value))


@lru_cache(maxsize=256)
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function with those of the arguments that it names."""
    return function(*_values_of(function)(arguments))


@lru_cache(maxsize=256)
def _values_of(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    names = _names(function)
    return itemgetter(*names) if len(names) > 1 else lambda arguments: tuple(arguments[name] for name in names)


_IMPLS = {impl.value: impl for impl in Impl}


def choose(op: str, impl: str, why_not_fused: str | None) -> Impl:
    """Return the body to run, never `AUTO`: the requested one, or the fused one where no reason is given against it.

    Raises:
        ValueError: `impl` is not one of the four names.
        NotImplementedError: `impl` is "fused" and there is a reason against it.
    """
    wanted = _IMPLS.get(impl)
    if wanted is None:
        raise ValueError(f"{op}: impl must be one of {list(_IMPLS)}, got {impl!r}")
    if wanted is Impl.FUSED and why_not_fused is not None:
        raise NotImplementedError(f"{op}: impl='fused' cannot run here: {why_not_fused}")
    if wanted is Impl.AUTO:
        return Impl.TILED if why_not_fused is not None else Impl.FUSED
    return wanted


OPS: dict[str, Op] = {}
REGISTERED: dict[str, Body] = {}  # what each op of the library foveate is made of, by name


def declare(
    promise: Callable[..., Any],
    *,
    check: Callable[..., None],
    reference: Body,
    tiled: Body,
    graph: Body | None = None,
    fused: Body | None = None,
    why_not_fused: Callable[..., str | None],
    cast: tuple[str, ...] = ("q", "k", "v"),
    macs: Callable[..., int] | None = None,
    bundles: Bundles | None = None,
) -> None:
    """Make the op `foveate::NAME` of a public function and its bodies.

    All functions take arguments by the names of the public signature, or a bundle in place of the arguments in it.

    Args:
        promise: the public function; the schema is that of its signature, with the same names, order and defaults.
            It returns a Tensor, or tuple[Tensor, Tensor].
        check: raises ValueError for arguments that do not fit; takes those that it names.
        reference, tiled, graph, fused: the bodies, described in the module's docstring; each takes all arguments.
        why_not_fused: returns the reason why the kernel cannot run, or None; takes those that it names.
        cast: arguments that autocast casts together.
        macs: returns the multiply-adds that the definition needs, where a body computes others; takes what it names.
        bundles: NamedTuples whose fields are arguments, by the parameter name that stands for those arguments.

    Raises:
        TypeError: a body does not take exactly the arguments of the public signature.
    """
    kinds, parameters, bundles = schema_types(promise), inspect.signature(promise).parameters, bundles or {}
    bodies = {Impl.REFERENCE: reference, Impl.TILED: tiled} | ({Impl.FUSED: fused} if fused else {})
    wanted = sorted(set(parameters) - {"impl"})
    for body in (*bodies.values(), graph or tiled):
        taken = [n for name in _names(body) for n in (_names(bundles[name]) if name in bundles else (name,))]
        if sorted(taken) != wanted:
            called = getattr(body, "__name__", body)
            raise TypeError(f"{called} must take the arguments of {promise.__name__}: {', '.join(wanted)}")
    pairs = tuple(name for name, kind in kinds.items() if kind.rstrip("?").endswith("[2]"))
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    defaults |= {name: (defaults[name],) * 2 for name in pairs if isinstance(defaults[name], int)}
    op = Op(
        name=promise.__name__,
        defaults=defaults,
        types=tuple(map(plain_types, kinds.values())),
        tensors=tuple(name for name, kind in kinds.items() if kind.startswith("Tensor")),
        pairs=pairs,
        check=check,
        bodies=bodies,
        graph=graph or tiled,
        opaque=_opaque_body(promise.__name__, tuple(name for name in parameters if name != "impl")),
        why_not_fused=why_not_fused,
        cast=cast,
        macs=macs,
        bundles=bundles,
    )
    OPS[op.name] = op
    register(promise, op)
    if op.graph is not tiled:
        _register_opaque(promise, op)


def register(promise: Callable[..., Any], body: Body) -> None:
    """Define `foveate::NAME` with the schema of a public function, made of the operations of `body`."""
    qualified = f"foveate::{promise.__name__}"
    REGISTERED[promise.__name__] = body
    torch.library.define(qualified, schema_of(promise))
    for key in (
        "CompositeImplicitAutograd",
        "FuncTorchBatched",
        "Tracer",
    ):  # vmap and torch.jit.trace see the operations
        torch.library.impl(qualified, key, body)
    script_as(promise, qualified)


def _opaque_body(name: str, names: tuple[str, ...]) -> Body:
    def call(*values: Any) -> Tensor:
        return getattr(torch.ops.foveate, f"_{name}")(**dict(zip(names, values, strict=True)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    taken = inspect.Signature([inspect.Parameter(n, kind) for n in names])
    vars(call)["__signature__"] = taken  # what `_call` asks for
    return call


def _register_opaque(promise: Callable[..., Any], op: Op) -> None:
    """Define `foveate::_NAME`: the tiled body on a CPU, without gradients; the graph body tells compilers its shape."""
    qualified, tiled = f"foveate::_{op.name}", op.calling(op.bodies[Impl.TILED])

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):  # its arguments are cast; autocast may be on where the graph runs
            return _contiguous(tiled(*args, **kwargs))

    torch.library.define(qualified, schema_of(promise, without=("impl",)))
    torch.library.impl(qualified, "CPU", on_cpu)
    graph = op.calling(op.graph)
    torch.library.register_fake(qualified, lambda *args, **kwargs: _contiguous(graph(*args, **kwargs)))


def _contiguous(out: Any) -> Any:
    return tuple(t.contiguous() for t in out) if isinstance(out, tuple) else out.contiguous()


def run(name: str, *values: Any) -> Any:
    """Call the op `name` with all arguments of its public function, in the order of its signature."""
    op = OPS[name]
    arguments = dict(zip(op.defaults, values, strict=True))
    for key in op.pairs:
        arguments[key] = _pair_of(name, key, arguments[key])
    if isinstance(arguments["impl"], Impl):
        arguments["impl"] = arguments["impl"].value
    if not torch.compiler.is_compiling() and op.is_plain_call(values):
        return op.run(arguments)
    for (key, value), types in zip(arguments.items(), op.types, strict=True):
        if value is None and types == PLAIN_TENSORS:  # the dispatcher would take it
            raise TypeError(f"{name}: {key} must be a tensor, got None")
    return call(name, arguments)


def call(name: str, arguments: dict[str, Any]) -> Any:
    """Call what `register` registered; exporters see what it consists of, and no op of ours."""
    if is_exported():
        return _spell_out(name, arguments)
    return getattr(torch.ops.foveate, name)(**arguments)


@torch.compiler.allow_in_graph
def _spell_out(name: str, arguments: dict[str, Any]) -> Any:
    """Record the operations that an op consists of. torch.compile's tracer does not look into this function."""
    return REGISTERED[name](**arguments)


# Autocast, torch.func and tracers


def _cast(value: Any) -> Any:
    """Cast to the autocast dtype where autocast is on; float64 and integers stay, as under torch's own autocast."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [_cast(v) for v in value]
    eligible = value.is_floating_point() and value.dtype != torch.float64
    return value.to(torch.get_autocast_dtype(value.device.type)) if eligible and autocasts(value) else value


def under_transform(tensors: Sequence[Tensor]) -> bool:
    """Say whether torch.func transforms these tensors, or one of them has a tangent."""
    if transforms_are_on():
        return True
    return forward_ad_is_on() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """Say whether no numbers may be looked at: under a tracer, a compiler or FakeTensorMode, or on the meta device."""
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter) or t.is_meta:
            return True
    if torch.jit.is_tracing():
        return True
    return is_faked_or_recorded()


def _is_compiled_for_inference(tensors: Sequence[Tensor]) -> bool:
    """Say whether torch.compile is at work on CPU tensors that need no gradients."""
    if not compiles() or any(t.device.type != "cpu" for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
