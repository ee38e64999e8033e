"""Which channels depend on each other, found by following the model's torch.fx graph layer by layer.

A channel that a layer writes stays the same channel in elementwise operations, in norms and depthwise convolutions that
treat channels separately, and in every layer that reads it. Adding two feature maps joins their channels. Norms over
channels, grouped convolutions, concatenation and modules that cannot be traced fix their channels: these are never cut,
and the reason is recorded.
"""

import operator
import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn

from .._modes import evaluating
from ..backbones._pruning import AttentionLayout
from .errors import PruningError
from .groups import declared

_LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
# Functions and methods that keep the order and number of channels.
_SAME_CHANNEL = {
    *(operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul, torch.flatten, torch.mean),
    *(F.relu, F.relu6, F.gelu, F.silu, F.sigmoid, F.hardtanh, F.hardswish, torch.relu, torch.sigmoid, torch.tanh),
    *(F.dropout, F.pad, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, torch.permute),
    *("add", "add_", "mul", "mul_", "mean", "permute", "transpose", "contiguous", "to", "float", "flatten"),
    *("sigmoid", "relu", "clone"),
}
OUTPUT = "these are the output channels of the model"
_NO_TENSOR = {"size", "dim", "numel", "is_contiguous"}


@dataclass(frozen=True)
class Place:
    """One axis of a parameter or buffer that has an entry for each channel."""

    tensor: str
    axis: int
    entries: int = 1  # of a channel: with two, the second half of the axis repeats the order of the first


@dataclass
class Channels:
    """Channels that are cut together: entry i of every place belongs to channel i."""

    size: int | None = None  # None: no layer says it
    places: list[Place] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)  # layers that produce the channels
    attention: str | None = None  # attention module without output projection that produces the channels
    fixed: str | None = None  # reason why the channels cannot be cut

    def absorb(self, other: "Channels") -> None:
        if self.size is not None and other.size is not None and self.size != other.size:
            self.fixed = self.fixed or other.fixed or f"{self.size} channels are added to {other.size}"
        if self.attention and other.attention:
            self.fixed = self.fixed or "heads of two attention modules are added"
        self.size = other.size if self.size is None else self.size
        self.places += [place for place in other.places if place not in self.places]
        self.writers += [writer for writer in other.writers if writer not in self.writers]
        self.attention = self.attention or other.attention
        self.fixed = self.fixed or other.fixed


def layouts_of(model: nn.Module) -> dict[str, list[AttentionLayout]]:
    """Return the attention modules of a model by name, each with the layouts that its family declares."""
    found = {}
    for name, module in model.named_modules():
        fitting = [a for a in declared(model).attentions if re.fullmatch(a.modules, name)]
        if fitting := [a for a in fitting if a.kind in (None, type(module).__name__)]:
            found[name] = fitting
    return found


def channel_graph(model: nn.Module) -> list[Channels]:
    """Return all sets of channels of a model, including fixed ones. Cost: one symbolic trace.

    Raises:
        PruningError: the model's family has no pruning declaration, or torch.fx cannot trace the model.
    """
    squares, glus = (_matching(model, pattern) for pattern in (declared(model).square, declared(model).glu))
    follower = _Follower(model, layouts_of(model), squares, glus)
    with evaluating(model):
        try:
            graph = _Tracer({*follower.attentions, *squares, *glus}).trace(model)
        except Exception as error:  # model code raises many types on proxies
            raise PruningError(f"{type(model).__name__} cannot be traced by torch.fx: {error}") from error
    for node in graph.nodes:
        follower.step(node)
    return list({id(follower.find(channels)): follower.find(channels) for channels in follower.made}.values())


class _Tracer(fx.Tracer):
    """Do not trace into layers, attention modules, and what timm's models declare untraceable."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = leaves
        self.untraceable = tuple(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*_LAYERS, *self.untraceable)) or module_qualified_name in self.leaves:
            return True
        return next(m.parameters(), None) is None or super().is_leaf_module(m, module_qualified_name)


class _Follower:
    """Walks the graph once; `carried[node]` is the set of channels of the node's tensor."""

    def __init__(
        self, model: nn.Module, attentions: dict[str, list[AttentionLayout]], squares: set[str], glus: set[str]
    ) -> None:
        self.model = model
        self.attentions = attentions
        self.squares = squares
        self.glus = glus
        self.made: list[Channels] = []
        self.carried: dict[fx.Node, Channels] = {}
        self.parent: dict[int, Channels] = {}

    def step(self, node: fx.Node) -> None:
        sets = [self.find(self.carried[source]) for source in node.all_input_nodes if source in self.carried]
        if node.op == "placeholder":
            self.carried[node] = self.new(fixed="these are the input channels of the model")
        elif node.op == "get_attr":
            self.attribute(node)
        elif node.op == "call_module" and sets:
            self.carried[node] = self.module(str(node.target), sets)
        elif node.op in ("call_function", "call_method") and sets:
            self.function(node, sets)
        elif node.op == "output":
            for channels in sets:
                self.fix(channels, OUTPUT)

    def new(self, **kwargs: Any) -> Channels:
        self.made.append(Channels(**kwargs))
        return self.made[-1]

    def find(self, channels: Channels) -> Channels:
        while id(channels) in self.parent:
            channels = self.parent[id(channels)]
        return channels

    def join(self, sets: list[Channels]) -> Channels:
        first = sets[0]
        for other in sets[1:]:
            if (other := self.find(other)) is not first:
                first.absorb(other)
                self.parent[id(other)] = first
        return first

    def fix(self, channels: Channels, why: str) -> Channels:
        channels.fixed = channels.fixed or why
        return channels

    def place(self, channels: Channels, layer: str, *parts: tuple[str, int], entries: int = 1) -> Channels:
        """Add axes of a layer's tensors, with so many entries a channel, to the set; missing biases are skipped."""
        module = self.model.get_submodule(layer)
        for name, axis in parts:
            tensor = getattr(module, name, None)
            if tensor is not None:
                places = [Place(f"{layer}.{name}" if layer else name, axis, entries)]
                channels.absorb(Channels(size=tensor.shape[axis] // entries, places=places))
        return channels

    def attribute(self, node: fx.Node) -> None:
        """Follow a parameter that the model uses directly: with one axis longer than 1, it has an entry per channel."""
        tensor = operator.attrgetter(str(node.target))(self.model)
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 1:
            return
        long = [axis for axis, size in enumerate(tensor.shape) if size > 1]
        if len(long) == 1:
            owner, _, name = str(node.target).rpartition(".")
            self.carried[node] = self.place(self.new(), owner, (name, long[0]))
        else:
            self.carried[node] = self.new(fixed=f"{node.target} has more than one axis")

    def function(self, node: fx.Node, sets: list[Channels]) -> None:
        target = node.target
        if target is getattr or target in _NO_TENSOR:
            return
        if (target is operator.getitem and _takes_all(node.args[1])) or target in _SAME_CHANNEL:
            self.carried[node] = self.join(sets)
            return
        why = f"{getattr(target, '__name__', target)} may mix or reorder these channels"
        for channels in sets:
            self.fix(channels, why)
        self.carried[node] = self.new(fixed=why)

    def module(self, name: str, sets: list[Channels]) -> Channels:
        module, channels = self.model.get_submodule(name), sets[0]
        if name in self.attentions:
            return self.attention(name, self.attentions[name], channels)
        if name in self.squares:
            return self.square(name, channels)
        if name in self.glus:
            return self.glu(name, channels)
        if isinstance(module, nn.Linear | nn.Conv2d):
            return self.linear(name, module, channels)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return self.place(
                channels, name, *((part, 0) for part in ("weight", "bias", "running_mean", "running_var"))
            )
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            return self.fix(channels, f"{name} normalizes over these channels")
        if next(module.parameters(), None) is None:
            return self.join(sets)
        for given in sets:
            self.fix(given, f"{name} is not traceable")
        return self.new(fixed=f"{name} is not traceable")

    def linear(self, name: str, layer: nn.Linear | nn.Conv2d, channels: Channels) -> Channels:
        groups = getattr(layer, "groups", 1)
        if groups > 1 and groups == layer.in_channels == layer.out_channels:
            return self.place(channels, name, ("weight", 0), ("bias", 0))
        if groups > 1:
            self.fix(channels, f"{name} is a grouped convolution")
            return self.place(self.new(fixed=f"{name} is a grouped convolution"), name, ("weight", 0), ("bias", 0))
        self.place(channels, name, ("weight", 1))
        return self.place(self.new(writers=[name]), name, ("weight", 0), ("bias", 0))

    def attention(self, name: str, layouts: list[AttentionLayout], channels: Channels) -> Channels:
        if len(layouts) > 1 or not layouts[0].cuts_heads:
            why = f"{name} has several branches" if len(layouts) > 1 else f"the heads of {name} cannot be cut"
            self.fix(channels, why)
            return self.new(fixed=why)
        (layout,) = layouts
        for projection in layout.projections:
            self.place(channels, f"{name}.{projection.layer}", ("weight", 1))
        if layout.out is None:
            return self.new(attention=name)
        out = f"{name}.{layout.out}"
        return self.place(self.new(writers=[out]), out, ("weight", 0), ("bias", 0))

    def glu(self, name: str, channels: Channels) -> Channels:
        self.place(channels, f"{name}.fc1", ("weight", 1))
        hidden = self.new(writers=[f"{name}.fc1"])
        self.place(hidden, f"{name}.fc1", ("weight", 0), ("bias", 0), entries=2)
        self.place(hidden, f"{name}.dwconv", ("weight", 0), ("bias", 0))
        self.place(hidden, f"{name}.fc2", ("weight", 1))
        return self.place(self.new(writers=[f"{name}.fc2"]), f"{name}.fc2", ("weight", 0), ("bias", 0))

    def square(self, name: str, channels: Channels) -> Channels:
        for path, layer in self.model.get_submodule(name).named_modules():
            if isinstance(layer, nn.Conv2d):
                axes = (("weight", 0), ("bias", 0)) if layer.groups > 1 else (("weight", 0), ("weight", 1), ("bias", 0))
                self.place(channels, f"{name}.{path}", *axes)
        return channels


def _matching(model: nn.Module, pattern: str | None) -> set[str]:
    """Return the names of the modules that a pattern matches."""
    names = (name for name, _ in model.named_modules())
    return {name for name in names if pattern is not None and re.fullmatch(pattern, name)}


def _takes_all(index: Any) -> bool:
    """Whether an index keeps every entry: full slices, new axes and ellipses only."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)
