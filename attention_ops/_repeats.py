"""Running state of layers under gradient checkpointing.

torch.utils.checkpoint repeats forward passes inside the backward pass. A repeated pass must read the state that the
first pass read, or its gradients are those of another function, and it must not change the state once more.
"""

from collections import deque

import torch
from torch import Tensor

from .._torch import backward_number, next_number

KEPT = 32  # forward passes whose state is remembered


def is_repeated() -> bool:
    """Say whether this forward pass runs inside a backward pass. Programs of torch.compile repeat nothing."""
    return not torch.compiler.is_compiling() and backward_number() is not None


class Earlier:
    """What a layer's running state was when its last forward passes began; neither copied nor saved with the layer.

    Autograd numbers operations in the order of the forward pass. The backward pass repeats a pass for an operation of
    its own, which comes after the beginning of this pass and before that of the next.
    """

    def __init__(self) -> None:
        self.passes: deque[tuple[int, tuple[Tensor, ...]]] = deque(maxlen=KEPT)

    def read(self, *state: Tensor) -> tuple[tuple[Tensor, ...], bool]:
        """Return the state that this forward pass must use, and whether it may change it.

        Args:
            state: what the layer has now; a copy of it is kept.

        Raises:
            RuntimeError: a pass is repeated that is not among the last 32 of this layer.
        """
        if torch.compiler.is_compiling():
            return state, True
        number = backward_number()
        if number is None or not self.passes:
            self.passes.append((next_number(), tuple(t.detach().clone() for t in state)))
            return state, True
        for begin, then in reversed(self.passes):
            if begin <= number + 1:  # a reentrant checkpoint is one operation, whose number comes before its parts
                return then, False
        raise RuntimeError(
            f"gradient checkpointing repeats a forward pass with running state that is not among the last {KEPT}: "
            "call backward() earlier"
        )

    def __deepcopy__(self, memo: dict) -> "Earlier":
        return Earlier()

    def __getstate__(self) -> dict:
        return {"passes": deque(maxlen=KEPT)}
