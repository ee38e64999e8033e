"""Scores of single weights; the lowest are pruned first. float64, so that sums of millions of scores keep their order.

DIMAP      arXiv:2404.13648, equation 10: a weight's square over the sum of the squares of all weights of its layer that
           are not smaller, including its own. The largest weight of a layer scores 1.
LAMP       Lee et al. 2021, arXiv:2010.07611: the same score. The papers differ in what is ranked together: LAMP ranks
           the whole model, DIMAP each module group (QKV, PRJ, MLP).
Taylor     Molchanov et al. 2019, arXiv:1906.10771: (weight * gradient)^2, averaged over batches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import first_line
from .._modes import evaluating
from .errors import PruningError

Scope = Literal["layer", "group", "model"]
Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, C, H, W) and classes (B,)
Scores = dict[str, Tensor]  # parameter name -> float64, of the parameter's shape


def share_of_larger(weight: Tensor) -> Tensor:
    """Return w^2 / sum of the squares of all entries not smaller than w: the score of DIMAP and LAMP, for one layer.

    Equal weights score the same; zeros score 0. Cost: one sort.
    """
    descending, order = weight.detach().to(torch.float64).square().flatten().sort(descending=True)
    # equal entries are all included in the sum
    _, run, lengths = descending.unique_consecutive(return_inverse=True, return_counts=True)
    larger_sum = descending.cumsum(0)[lengths.cumsum(0) - 1][run]
    scores = torch.empty_like(descending)
    scores[order] = torch.where(descending > 0, descending / larger_sum, descending)
    return scores.view(weight.shape)


def magnitudes(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float64).abs()


def taylor_scores(model: nn.Module, names: Iterable[str], batches: Batches) -> Scores:
    """Return the mean over batches of (weight * gradient of the cross-entropy)^2; the model runs in eval mode.

    Frozen weights (requires_grad False) have no gradient and get no score: they are not pruned.

    Raises:
        PruningError: no batch, only frozen weights, or a model that does not run on the images.
    """
    weights = {name: weight for name in names if (weight := model.get_parameter(name)).requires_grad}
    if not weights:
        raise PruningError("taylor: all of the weights are frozen (requires_grad is False) and have no gradient")
    scores = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    count = 0
    with evaluating(model):
        for images, targets in batches:
            for (name, weight), grad in zip(weights.items(), _gradients(model, weights, images, targets), strict=True):
                if grad is not None:  # otherwise the weight was not used and scores 0
                    scores[name] += (weight.detach().double() * grad.double()).square()
            count += 1
    if count == 0:
        raise PruningError("taylor: wanted batches of images and classes, got none")
    return {name: score / count for name, score in scores.items()}


def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, targets: Tensor
) -> Sequence[Tensor | None]:
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), targets)
            return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    except Exception as error:  # models raise many types
        raise PruningError(f"taylor: no gradients of {type(model).__name__}: {first_line(error)}") from error


@dataclass(frozen=True)
class Criterion:
    """How weights are scored, and which weights are ranked together by default."""

    scope: Scope
    score: Callable[[Tensor], Tensor] | None = None  # of the weight of one layer; None: needs more than the weight
    needs_data: bool = False


CRITERIA: Mapping[str, Criterion] = {
    "dimap": Criterion("group", share_of_larger),
    "lamp": Criterion("model", share_of_larger),
    "magnitude": Criterion("model", magnitudes),
    "taylor": Criterion("model", needs_data=True),
    "random": Criterion("model"),
    "head_importance": Criterion("model", needs_data=True),
}
"""Methods by name: the group of weights that is ranked by default, and the score."""


def check_has_data(method: str, data: object | None) -> None:
    """Refuse a method that scores on data when there is no data.

    Raises:
        PruningError: `data` (batches, or the name of a data set) is None, and the method needs it.
    """
    if data is None and CRITERIA[method].needs_data:
        raise PruningError(f"{method} needs data: batches of images and classes (on the command line: --data)")


def weight_scores(
    model: nn.Module, names: Iterable[str], method: str, *, batches: Batches | None = None, seed: int = 0
) -> Scores:
    """Score the named weights of a model.

    Args:
        method: a key of CRITERIA other than head_importance, which does not score weights.
        batches: images and classes, for taylor only.
        seed: random seed of the method random.

    Raises:
        PruningError: batches are missing.
    """
    names = list(names)
    check_has_data(method, batches)
    if method == "taylor":
        assert batches is not None
        return taylor_scores(model, names, batches)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        shapes = {name: model.get_parameter(name).shape for name in names}
        return {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    score = CRITERIA[method].score
    assert score is not None
    return {name: score(model.get_parameter(name)) for name in names}
