"""Count the multiply-adds that a model needs, not those that a body computes.

torch's FlopCounterMode counts convolutions, matrix products and scaled_dot_product_attention as they are executed; 50 %
of its figure are multiply-adds. Neighborhood attention's tiled body computes 2.5 to 3.5 times the logits that a query
sees, and masks the rest; a fused kernel does work that torch cannot see. For our ops, the count of the body is replaced
by the cost of the definition, `macs` of the op's declaration. Elementwise work (norms, gates, softmax) is not counted,
as in papers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ._op import OPS, Op


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Return the multiply-adds of one forward pass on these images; the model should be in eval mode."""
    with torch.no_grad(), FlopCounterMode(display=False) as done, _UsefulWork() as useful:
        model(images)
    return done.get_total_flops() // 2 - useful.excess_macs


class _UsefulWork(TorchFunctionMode):
    """Sum what the bodies of our ops computed beyond the definition; negative where torch could not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.excess_macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        op = _our_op(func)
        if op is None or op.macs is None:
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as body:
            out = func(*args, **(kwargs or {}))
        self.excess_macs += body.get_total_flops() // 2 - op.useful_macs(*args, **(kwargs or {}))
        return out


def _our_op(func: Callable) -> Op | None:
    space, _, name = str(func).partition(".")
    return OPS.get(name.partition(".")[0]) if space == "foveate" else None
