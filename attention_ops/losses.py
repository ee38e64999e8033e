"""Losses that layers leave behind in training, for the loop that trains: read them after the forward pass."""

import torch
from torch import Tensor, nn

from ._repeats import is_repeated


class Loss:
    """The loss of a layer's last forward pass in training; it is neither copied nor saved with the layer."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def keep(self, value: Tensor | None) -> None:
        """Replace the loss; a pass that gradient checkpointing repeats leaves that of the first pass."""
        if not is_repeated():
            self.value = value

    def __deepcopy__(self, memo: dict) -> "Loss":
        return Loss()

    def __getstate__(self) -> dict:
        return {"value": None}


def load_balance_loss(model: nn.Module) -> Tensor | None:
    """Return how unevenly the heads of MoH are used: the mean over the layers that route.

    It is the number of routed heads of a token where all heads are used alike. The authors add 0.01 times it to the
    loss.

    Returns:
        A scalar with a graph; None where no layer routes, or the last forward pass was none of training.
    """
    found = _values(model, "load_balance")
    return torch.stack(found).mean() if found else None


def commitment_loss(model: nn.Module) -> Tensor | None:
    """Return the distance of tokens from the centroids of routing attention: the sum over layers, to add to the loss.

    Returns:
        A scalar with a graph; None where no layer has centroids, or the last forward pass was none of training.
    """
    found = _values(model, "commitment")
    return torch.stack(found).sum() if found else None


def _values(model: nn.Module, name: str) -> list[Tensor]:
    holders = (getattr(module, name, None) for module in model.modules())
    return [holder.value for holder in holders if isinstance(holder, Loss) and holder.value is not None]
