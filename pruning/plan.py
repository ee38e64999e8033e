"""A plan: which weights or structures are removed, and why. It is data that can be printed, saved and applied."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from .counts import Counts, example_image, share
from .criteria import Scope
from .errors import PruningError
from .plan_file import read_fields, write_fields
from .surgery import cut
from .unstructured import stage_of

Cuts = Mapping[str, Mapping[int, Tensor]]  # parameter or buffer name -> axis -> indices that are kept, ascending


@dataclass(frozen=True)
class Plan:
    """What to remove from one model.

    `masks` says which weights are zeroed. A structured plan also has `cuts`: whole slices, whose removal gives smaller
    tensors. Its masks zero the same slices.
    """

    architecture: str  # the class of the model
    method: str
    ratio: float  # as requested
    scope: Scope  # what was ranked together
    masks: Mapping[str, Tensor]  # parameter name -> bool, of the parameter's shape; True: kept
    groups: Mapping[str, str]  # parameter name -> module group, or "dependent": cut along with a group
    thresholds: Mapping[str, float]  # what was ranked together -> the lowest score that is kept
    counts: Counts  # by non-zero weights
    structure: tuple[str, ...] = ()  # kinds of structures; empty: single weights
    pattern: str | None = None  # "2:4": two of every four neighbors are kept
    cuts: Cuts = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)  # attribute -> its value after the cut
    removed: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # kind -> structures removed, all structures

    def __str__(self) -> str:
        c = self.counts
        what = "+".join(self.structure) or self.pattern or "weights"
        return (
            f"{self.architecture}: {self.method}, {self.ratio:.0%} of {what}, parameters {c.params_before:,} -> "
            f"{c.params_after:,} ({share(c.params_after, c.params_before):.1%}), multiply-adds {c.macs_before:,} -> "
            f"{c.macs_after:,} ({share(c.macs_after, c.macs_before):.1%}) at {c.input_size[1]}x{c.input_size[2]}"
        )

    def table(self) -> Table:
        """Return a table of the parameters that are kept, per stage and module group."""
        table = Table(title=str(self))
        for name in ("stage", "group"):
            table.add_column(name, no_wrap=True)
        for name in ("parameters", "kept", "share"):
            table.add_column(name, justify="right", no_wrap=True)
        rows: dict[tuple[str, str], list[int]] = {}
        for name, mask in self.masks.items():
            row = rows.setdefault((stage_of(name), self.groups[name]), [0, 0])
            row[0] += mask.numel()
            row[1] += int(mask.sum())
        for (stage, group), (total, kept) in rows.items():
            table.add_row(stage, group, f"{total:,}", f"{kept:,}", f"{share(kept, total):.1%}")
        return table

    def apply(self, model: nn.Module) -> nn.Module:
        """Zero the removed weights in place, and return the model.

        Raises:
            PruningError: the plan belongs to another model; nothing was changed.
        """
        parameters = dict(model.named_parameters())
        self.check_fits({name: parameter.shape for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
        return model

    def cut(self, model: nn.Module) -> nn.Module:
        """Return a smaller copy of the model, without the removed structures; `model` is left unchanged.

        Raises:
            PruningError: the plan removes single weights, or belongs to another model.
        """
        if not self.structure:
            raise PruningError("a plan of single weights cannot be cut; use apply, which zeroes them")
        self.check_fits({name: parameter.shape for name, parameter in model.named_parameters()})
        return cut(model, self.cuts, self.widths, example_image(model, self.counts.input_size[1:]))

    def masked(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with zeros for the removed weights; the tensors given are left unchanged.

        Raises:
            PruningError: the state dict belongs to another model.
        """
        self.check_fits({name: tensor.shape for name, tensor in state_dict.items()})
        masks = {name: ~mask for name, mask in self.masks.items()}
        return {
            name: tensor.masked_fill(masks[name].to(tensor.device), 0) if name in masks else tensor
            for name, tensor in state_dict.items()
        }

    def check_fits(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse shapes of another model than the planned one."""
        for name, mask in self.masks.items():
            if name not in shapes:
                raise PruningError(f"the plan is for {self.architecture}: the model has no {name}")
            if shapes[name] != mask.shape:
                raise PruningError(
                    f"the plan is for {self.architecture}: {name} is {tuple(mask.shape)} there, "
                    f"{tuple(shapes[name])} in the model"
                )

    def save(self, path: str | Path) -> Path:
        """Write the plan atomically as one JSON file, masks as packed bits."""
        return write_fields({f.name: getattr(self, f.name) for f in fields(self)}, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a file that `save` wrote. It is JSON, checked before memory is allocated; it runs nothing.

        Raises:
            PruningError: the file is missing, damaged or not a plan.
        """
        return cls(**read_fields(Path(path)))
