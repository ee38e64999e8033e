"""Losses and metrics: of one class per image, and of any number of classes."""

import math

import torch
from mmengine.evaluator import BaseMetric
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention_ops.losses import commitment_loss, load_balance_loss
from .errors import TrainError
from .recipe import LossRecipe, Recipe

_COLUMNS = 3  # top-1 hit, top-5 hit, loss; then, with multi_label, scores and targets of all classes


def choose_loss(recipe: Recipe) -> nn.Module:
    """Return the loss of logits (B, classes) and targets: class indices (B,), or numbers per class (B, classes)."""
    smoothing, mixes, loss = recipe.augment.smoothing, recipe.augment.mixes, recipe.loss
    if loss.kind == "bce":
        own = loss.multi_label and not mixes  # Mixup smooths the targets
        return BinaryCrossEntropy(smoothing, target_threshold=loss.threshold, smooth_dense=own)
    if mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def loss_of_layers(net: nn.Module, loss: LossRecipe) -> Tensor | float:
    """Return what layers add to the loss of a training batch, after the forward pass; 0.0 without such keys.

    Raises:
        TrainError: no layer of the model has the loss that a key asks for.
    """
    total: Tensor | float = 0.0
    for key, find in (("load_balance", load_balance_loss), ("commitment", commitment_loss)):
        if factor := getattr(loss, key):
            value = find(net)
            if value is None:
                raise TrainError(f"loss.{key}: no layer of {type(net).__name__} has this loss")
            total = total + factor * value
    return total


class TopK(BaseMetric):
    """Metrics over the whole split and all processes, see `summarise`."""

    def process(self, data_batch: object, data_samples: list[list[float]]) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[list[float]]) -> dict[str, float]:
        return summarise(results)


def judge(logits: Tensor, targets: Tensor) -> Tensor:
    """Return one row per image, float32: top-1 hit, top-5 hit, cross-entropy (B, 3).

    For targets (B, classes) a hit is a class that the image has, the loss is the mean binary cross-entropy, and scores
    and targets of all classes follow: (B, 3 + 2 * classes).
    """
    best = logits.topk(min(5, logits.shape[1])).indices
    if targets.dim() == 1:
        hits = (best == targets[:, None]).float()
        return torch.stack([hits[:, 0], hits.sum(1), F.cross_entropy(logits, targets, reduction="none")], 1)
    targets = targets.float()
    hits = targets.gather(1, best)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return torch.cat([torch.stack([hits[:, 0], hits.amax(1), loss], 1), logits.sigmoid(), targets], 1)


def unread_row(row: list[float]) -> list[float]:
    """Return the row of an image that could not be read."""
    return [math.nan] * len(row)


def summarise(rows: list[list[float]]) -> dict[str, float]:
    """Average `judge`'s rows over the images that could be read: top1 and top5 in %, loss; map in % with multi_label.

    `unreadable` counts the others, if there are any.

    Raises:
        TrainError: no image could be read.
    """
    table = torch.tensor(rows, dtype=torch.float64)
    read = table[~table[:, 0].isnan()]
    if not len(read):
        raise TrainError(f"data: none of the {len(rows)} validation images can be read")
    top1, top5, loss = read[:, :_COLUMNS].mean(0).tolist()
    metrics = {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}
    if table.shape[1] > _COLUMNS:
        scores, targets = read[:, _COLUMNS:].chunk(2, 1)
        metrics["map"] = 100 * average_precision(scores, targets)
    return metrics | ({"unreadable": len(table) - len(read)} if len(read) < len(table) else {})


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Return the mean over classes of the average precision; classes without an image are left out.

    Args:
        scores, targets: (images, classes); targets are 0 or 1.
    """
    hits = targets.gather(0, scores.argsort(dim=0, descending=True, stable=True))
    places = torch.arange(1, len(hits) + 1, dtype=hits.dtype)[:, None]
    precision = (hits.cumsum(0) / places * hits).sum(0)
    images = hits.sum(0)
    return float((precision / images)[images > 0].mean()) if bool((images > 0).any()) else 0.0
