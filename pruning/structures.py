"""Structures that can be cut: heads, channels of heads, hidden channels of MLPs and convolutional branches, widths.

heads      A head's rows of the projections, its columns of the output projection, and its own parameters.
channels   One channel of q and k and one of v in every head of a module, so that heads keep equal widths; the weakest
           of each head form one structure. If a module projects q/k and v separately (HaloNet), two sets.
mlp, conv  A hidden channel between two layers of the module group with this name.
width      A channel of a residual stream whose channels are not normalized together or reordered: ResNet and similar
           models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones._pruning import AttentionLayout
from .channel_graph import OUTPUT, Channels, channel_graph, layouts_of
from .criteria import Scores
from .errors import PruningError
from .groups import GROUPS, group_of_weights

KINDS = ("heads", "channels", "mlp", "conv", "width")
_HIDDEN = {"mlp": "mlp", "conv": "conv", "prj": "conv"}  # group of the layer that writes a hidden channel -> kind


@dataclass(frozen=True)
class Slices:
    """Entries of one axis of a parameter or buffer; row s of `index` belongs to structure s."""

    tensor: str
    axis: int
    index: Tensor  # (structures, entries of each)


@dataclass(frozen=True)
class Structures:
    """Interchangeable structures of one layer. At least one is kept."""

    kind: str
    name: str  # of the module or layer
    slices: tuple[Slices, ...]
    # attribute -> its increase per structure, one number for all or one for each
    numbers: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    lengths: dict[str, tuple[str, int]] = field(default_factory=dict)  # attribute -> the axis whose length it holds

    @property
    def size(self) -> int:
        return len(self.slices[0].index)

    def scored(self, weights: Scores) -> bool:
        """Whether any of the weights has a score; frozen weights may have none."""
        return any(part.tensor in weights for part in self.slices)

    def scores(self, weights: Scores) -> Tensor:
        """Sum the scores of the weights in each structure, (size,) float64."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for part in self.slices:
            if part.tensor in weights:
                score = weights[part.tensor]
                line = score.sum(dim=[axis for axis in range(score.dim()) if axis != part.axis])
                total += line[part.index.to(line.device)].sum(1).cpu()
        return total


def find_structures(model: nn.Module, kinds: Sequence[str], weights: Scores) -> list[Structures]:
    """Return the structures of the given kinds, layer by layer.

    Args:
        kinds: of KINDS.
        weights: scores of single weights, which pair the channels of different heads.

    Raises:
        PruningError: an unknown kind, or a kind of which nothing can be cut; the message gives the reason.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise PruningError(f"unknown structure {unknown[0]!r}; known: {', '.join(KINDS)}")
    sets = channel_graph(model)
    found: list[Structures] = []
    refused: dict[str, list[str]] = {kind: [] for kind in kinds}  # reasons
    of_heads: list[str] = [kind for kind in ("heads", "channels") if kind in refused]
    for name, layouts in layouts_of(model).items():
        after = next((channels for channels in sets if channels.attention == name), None)
        for heads in (_Heads(model, name, layout, after) for layout in layouts):
            for kind in of_heads:
                if (why := heads.why_not(kind)) is not None:
                    refused[kind].append(f"{name}: {why}")
                else:
                    found += [heads.heads()] if kind == "heads" else heads.channels(weights)
    for kind, group, channels in _by_kind(model, sets):
        if kind in refused and not channels.fixed:
            found.append(_whole(kind, channels))
        elif kind in refused and kind in ("width", group):
            refused[kind].append(f"{channels.writers[0]}: {channels.fixed}")
    for kind, reasons in refused.items():
        if not any(s.kind == kind for s in found):
            why = (*reasons, _why_none(model, sets, kind))[0]
            raise PruningError(f"structure {kind!r}: {type(model).__name__} has none that can be cut ({why})")
    return found


def _by_kind(model: nn.Module, sets: list[Channels]) -> Iterator[tuple[str, str | None, Channels]]:
    """Yield kind and module group of hidden channels and widths, and the channels; those that cannot be cut too."""
    group_of = group_of_weights(model, GROUPS, strict=False)
    for channels in sets:
        groups = [group_of.get(f"{writer}.weight") for writer in channels.writers]
        main = [group for group in groups if group != "gate"]
        hidden = [_HIDDEN[group] for group in main if group in _HIDDEN]
        if channels.size and not channels.attention and hidden:
            yield ("width" if len(main) > 1 else hidden[0]), main[0], channels


def _whole(kind: str, channels: Channels) -> Structures:
    assert channels.size is not None
    every = {n: torch.arange(n * channels.size).view(n, -1).T for n in {p.entries for p in channels.places}}
    slices = tuple(Slices(p.tensor, p.axis, every[p.entries]) for p in channels.places)
    return Structures(kind, channels.writers[0], slices)


def _why_none(model: nn.Module, sets: list[Channels], kind: str) -> str:
    """Explain why the model has nothing of this kind, not even something that cannot be cut."""
    if kind in ("heads", "channels"):
        return "it declares no attention heads"
    if kind == "width":  # a residual stream begins with a layer of no group: a stem, a merging layer
        grouped = set(group_of_weights(model, GROUPS, strict=False))
        fixed = [s for s in sets if s.writers and s.fixed and s.fixed != OUTPUT]
        fixed.sort(key=lambda s: f"{s.writers[0]}.weight" in grouped)
        return f"{fixed[0].writers[0]}: {fixed[0].fixed}" if fixed else "it has no residual stream"
    return f"it has no hidden channels in the module group {kind}"


class _Heads:
    """Applies a declared layout to one attention module."""

    def __init__(self, model: nn.Module, name: str, layout: AttentionLayout, after: Channels | None) -> None:
        self.name = name
        self.layout = layout
        self.module = model.get_submodule(name)
        self.count = getattr(self.module, layout.heads)
        self.after = after
        present = [p for p in layout.projections if getattr(self.module, p.layer, None) is not None]
        self.present = len(present) == len(layout.projections) and self.count > 0
        self.width = self._widths() if self.present and self._unless() is None else {}

    def why_not(self, kind: str) -> str | None:
        """Return the reason why structures of this kind cannot be cut here, or None."""
        if not self.present:
            return "it has no heads in this branch"
        if self.layout.out is None and (self.after is None or self.after.fixed):
            return "the layers that read its output cannot be cut"
        if (reason := self._unless()) is not None:
            return reason
        allowed = self.layout.cuts_heads if kind == "heads" else self.layout.cuts_channels
        return None if allowed else f"the family declares that its {kind} cannot be cut"

    def _unless(self) -> str | None:
        for attribute, reason in self.layout.unless:
            value: Any = self.module
            for name in attribute.split("."):
                value = getattr(value, name, None)
            if value is not None:
                return reason
        return None

    def heads(self) -> Structures:
        slices = [s for role in self.width for s in self._rows(role)] + self._after_values()
        slices += [(name, axis, torch.arange(self.count).view(-1, 1, 1)) for name, axis in self.layout.per_head]
        return Structures(
            "heads",
            self.name,
            tuple(Slices(self._full(t), axis, index.flatten(1)) for t, axis, index in slices),
            {f"{self.name}.{self.layout.heads}": 1} | self._bits(),
            self._lengths(),
        )

    def _bits(self) -> dict[str, int | tuple[int, ...]]:
        """What every head adds to the number that tells which heads are left."""
        if self.layout.kept is None:
            return {}
        kept = getattr(self.module, self.layout.kept)
        return {f"{self.name}.{self.layout.kept}": tuple(1 << i for i in range(kept.bit_length()) if kept >> i & 1)}

    def channels(self, weights: Scores) -> list[Structures]:
        shared = [
            (name, axis, torch.arange(self.width["q"]).view(1, -1, 1).expand(self.count, -1, -1))
            for name, axis in self.layout.per_query
        ]
        queries = self._slots([*self._rows("q"), *self._rows("k"), *shared], weights, tied=bool(shared))
        values = self._slots([*self._rows("v"), *self._after_values()], weights, tied=False)
        steps = {role: {f"{self.name}.{a}": 1 for a, of in self.layout.widths if of == role} for role in ("q", "v")}
        if any({"q", "v"} <= set(p.roles) for p in self.layout.projections):
            numbers = steps["q"] | steps["v"]
            return [Structures("channels", self.name, (*queries, *values), numbers, self._lengths())]
        return [
            Structures("channels", f"{self.name}.{self.layout.projections[0].layer}", tuple(queries), steps["q"]),
            Structures("channels", f"{self.name} values", tuple(values), steps["v"], self._lengths()),
        ]

    def _lengths(self) -> dict[str, tuple[str, int]]:
        return {f"{self.name}.{a}": (f"{self.name}.{self.layout.out}.weight", 1) for a in self.layout.value_widths}

    def _widths(self) -> dict[str, int]:
        """Channels of one head, by role."""
        width: dict[str, int] = {}
        for p in sorted(self.layout.projections, key=lambda p: p.head_major):
            rows = getattr(self.module, p.layer).weight.shape[0] // self.count
            if p.head_major:  # (k, v): k is as wide as q
                width |= {"k": width["q"], "v": rows - width["q"]}
            else:
                width |= dict.fromkeys(p.roles, rows // len(p.roles))
        return width

    def _rows(self, role: str) -> list[tuple[str, int, Tensor]]:
        """(tensor, axis, index (heads, channels, 1)) of the rows that hold a role."""
        found = []
        for p in self.layout.projections:
            if role not in p.roles:
                continue
            layer = getattr(self.module, p.layer)
            before = p.roles.index(role)
            every = torch.arange(layer.weight.shape[0])
            if p.head_major:
                start = sum(self.width[r] for r in p.roles[:before])
                index = every.view(self.count, -1)[:, start : start + self.width[role]]
            else:
                index = every.view(len(p.roles), self.count, -1)[before]
            found += [(f"{p.layer}.{t}", 0, index[..., None]) for t in ("weight", "bias") if _has(layer, t)]
        return found

    def _after_values(self) -> list[tuple[str, int, Tensor]]:
        """(tensor, axis, index) of everything that has an entry for each channel of the heads' outputs."""
        index = torch.arange(self.count * self.width["v"]).view(self.count, -1, 1)
        found = []
        for name in self.layout.per_value:
            if getattr(self.module, name, None) is not None:
                found += [(f"{name}.{t}", 0, index) for t in ("weight", "bias") if _has(getattr(self.module, name), t)]
        if self.layout.out is not None:
            return [*found, (f"{self.layout.out}.weight", 1, index)]
        assert self.after is not None
        return [*found, *((f"/{place.tensor}", place.axis, index) for place in self.after.places)]

    def _slots(self, parts: list[tuple[str, int, Tensor]], weights: Scores, tied: bool) -> list[Slices]:
        """Slot s is the s-th weakest channel of every head; with `tied`, the same in all heads (shared table)."""
        total = torch.zeros(parts[0][2].shape[:2], dtype=torch.float64)
        for tensor, axis, index in parts:
            if (score := weights.get(self._full(tensor))) is not None:
                line = score.sum(dim=[a for a in range(score.dim()) if a != axis]).cpu()
                total += line[index].sum(2)
        if tied:
            total = total.sum(0, keepdim=True).expand_as(total)
        order = total.argsort(dim=1, stable=True)[..., None]
        sorted_parts = [(t, a, i.gather(1, order.expand(-1, -1, i.shape[2]))) for t, a, i in parts]
        return [Slices(self._full(t), a, i.transpose(0, 1).flatten(1)) for t, a, i in sorted_parts]

    def _full(self, tensor: str) -> str:
        return tensor[1:] if tensor.startswith("/") else f"{self.name}.{tensor}"


def _has(layer: nn.Module, tensor: str) -> bool:
    return getattr(layer, tensor, None) is not None
