"""Importance of single heads: mask one head at a time and compare the predictions.

The measures come from visual analytics of vision transformers: change of the loss, divergence of the predictions, and
change of the confidence in the class that the full model predicts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._modes import evaluating
from .criteria import Batches, check_has_data
from .errors import PruningError
from .structures import Structures, find_structures


@dataclass(frozen=True)
class HeadImportance:
    """Effect of masking one head; means over all images."""

    module: str
    head: int
    loss_change: float  # cross-entropy without the head minus cross-entropy with it
    divergence: float  # KL divergence between predictions with and without the head
    confidence_change: float  # in the class that the full model predicts


@torch.no_grad()
def head_importance(
    model: nn.Module, batches: Batches, structures: Sequence[Structures] | None = None
) -> list[HeadImportance]:
    """Measure every head that can be cut. Cost: one forward pass per batch, and one per head and batch.

    Args:
        batches: images and classes; kept in memory.
        structures: of kind "heads"; None: all heads of the model.

    Raises:
        PruningError: no batch, or no head that can be cut.
    """
    batches = list(batches)
    if not batches:
        raise PruningError("head_importance: wanted batches of images and classes, got none")
    structures = find_structures(model, ["heads"], {}) if structures is None else structures
    found = []
    with evaluating(model):
        full = [model(images).log_softmax(-1) for images, _ in batches]
        for layer in structures:
            for head in range(layer.size):
                with _masked(model, layer, head):
                    measures = [
                        _compare(logs, model(images).log_softmax(-1), targets)
                        for logs, (images, targets) in zip(full, batches, strict=True)
                    ]
                means = torch.cat(measures).double().mean(0).tolist()
                found.append(HeadImportance(layer.name, head, *means))
    return found


def head_scores(model: nn.Module, structures: Sequence[Structures], batches: Batches | None) -> list[Tensor]:
    """Return the divergence of every head, one tensor per layer."""
    check_has_data("head_importance", batches)
    assert batches is not None
    found = iter(head_importance(model, batches, structures))
    return [torch.tensor([next(found).divergence for _ in range(s.size)], dtype=torch.float64) for s in structures]


def _compare(full: Tensor, masked: Tensor, targets: Tensor) -> Tensor:
    """(B, classes) log probabilities -> (B, 3): loss change, divergence and confidence change of each image."""
    loss = F.nll_loss(masked, targets, reduction="none") - F.nll_loss(full, targets, reduction="none")
    divergence = F.kl_div(masked, full, log_target=True, reduction="none").sum(1)
    named = full.argmax(1, keepdim=True)
    confidence = (masked.gather(1, named).exp() - full.gather(1, named).exp())[:, 0]
    return torch.stack([loss, divergence, confidence], 1)


@contextmanager
def _masked(model: nn.Module, layer: Structures, head: int) -> Iterator[None]:
    """Zero the columns that read the head, and restore them afterwards."""
    readers = [part for part in layer.slices if part.axis == 1 and part.tensor.endswith(".weight")]
    before = [model.get_parameter(part.tensor).clone() for part in readers]
    try:
        for part in readers:
            model.get_parameter(part.tensor).index_fill_(1, part.index[head], 0)
        yield
    finally:
        for part, weight in zip(readers, before, strict=True):
            model.get_parameter(part.tensor).copy_(weight)
