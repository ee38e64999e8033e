"""What fusion did to a model."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

_REASONS = {  # of operations that a reader may wonder about
    "linear": "few rows, or torch's own product is faster on this CPU (foveate.cpu_report())",
    "conv2d": "string padding, or weights that are no constants",
    "batch_norm": "statistics of the batch",
    "softmax.int": "not attention over tokens that torch's kernel takes",
    "layer_norm": "one pass already",
    "scaled_dot_product_attention": "one pass already",
}


@dataclass(frozen=True)
class FuseReport:
    """The rewrites of one plan.

    fused  rewrite -> how often
    left   operation -> how often it is still called
    """

    model: str
    fused: Counter[str]
    left: Counter[str]

    @classmethod
    def of(cls, plan: Plan, model: nn.Module) -> "FuseReport":
        """Return the report of a plan of `model`."""
        return cls(type(model).__name__, +plan.fused, +plan.left)

    @property
    def reasons(self) -> dict[str, str]:
        """Operation that was left -> why."""
        return {name: _REASONS[name] for name in self.left if name in _REASONS}

    def __str__(self) -> str:
        fused = ", ".join(f"{count} {name}" for name, count in self.fused.most_common())
        left = ", ".join(f"{count} {name}" for name, count in self.left.most_common())
        return f"{self.model}: fused {fused or 'nothing'}; calls {left}"

    def table(self) -> "Table":
        """Return what was fused, and what is still called, as a table of rich."""
        from rich.table import Table

        table = Table("what", "count", "note", title=f"fused {self.model}")
        for name, count in self.fused.most_common():
            table.add_row(name, str(count), "fused")
        for name, count in self.left.most_common():
            table.add_row(name, str(count), f"called; {self.reasons[name]}" if name in self.reasons else "called")
        return table
