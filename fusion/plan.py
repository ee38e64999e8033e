"""All rewrites in order: from a model and one image batch to a function of images."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch import pytree
from .attention import fuse_attention, lay_out_biases, multiply_and_add
from .fold import fold_into_next, fold_norms, fold_scales, merge_shortcuts
from .graphs import Captured
from .lower import Chooser, lower
from .simplify import fold_constants, move_permutations_behind_sums, simplify


@dataclass(frozen=True)
class Plan:
    """A model's forward pass for one input, rewritten."""

    run: fx.GraphModule
    out_spec: Any  # of the model's output, for pytree
    fused: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __call__(self, x: Tensor) -> Any:
        return pytree.tree_unflatten(list(self.run.forward(x)), self.out_spec)


REWRITES: tuple[tuple[str, Callable[[Captured], int]], ...] = (
    ("norm", fold_norms),
    ("scale", fold_scales),
    ("scale", fold_into_next),
    ("shortcut of a norm", merge_shortcuts),
    ("attention", fuse_attention),
    ("constant", fold_constants),
    ("position bias", lay_out_biases),
    ("permutation", move_permutations_behind_sums),
)


@torch.no_grad()
def make_plan(model: nn.Module, x: Tensor, takes_product: Chooser) -> Plan:
    """Capture a model's forward pass for inputs like x and rewrite it.

    Args:
        takes_product: says for (rows, inputs, outputs, dtype) whether oneDNN multiplies.
    """
    captured = Captured(model, x)
    simplify(captured)
    fused: Counter[str] = Counter()
    for name, rewrite in REWRITES:
        captured.graph.eliminate_dead_code()  # what nobody reads any more would count as a reader
        fused[name] += rewrite(captured)
    captured.graph.eliminate_dead_code()
    fused += lower(captured, takes_product)
    fused["product and sum"] = multiply_and_add(captured)
    run = captured.compiled()
    left = Counter(_name(node.target) for node in run.graph.nodes if node.op == "call_function")
    return Plan(run, captured.out_spec, fused, left)


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target)).removesuffix(".default")
