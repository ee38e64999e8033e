"""Sparsifiner's two training phases in a run, by the key `distill.phase`: what trains, and the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import first_line
from .._modes import keeping_modes
from ..backbones.sparsifiner import Sparsifiner
from ..backbones.sparsifiner_phases import distillation_loss, reconstruction_loss, train_phase
from .errors import TrainError
from .recipe import Recipe


def start_phase(net: nn.Module, recipe: Recipe) -> None:
    """Turn off the gradients of what the recipe's phase does not train; what was frozen before stays frozen.

    Raises:
        TrainError: the model is no Sparsifiner, or nothing is left to train.
    """
    if recipe.distill is None or recipe.distill.phase is None:
        return
    if not isinstance(net, Sparsifiner):
        raise TrainError(f"distill.phase: wants a model sparsifiner_deit_*, got {recipe.model.name}")
    frozen = [parameter for parameter in net.parameters() if not parameter.requires_grad]
    train_phase(net, recipe.distill.phase)
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise TrainError(f"distill.phase {recipe.distill.phase}: model.freeze leaves nothing to train")


def phase_loss(
    teacher: Any, net: Any, images: Tensor, targets: Tensor | None, criterion: Callable[..., Tensor]
) -> Tensor:
    """Return the loss of the teacher's phase.

    Args:
        teacher: a `teacher.Teacher` with a phase; net: the Sparsifiner.
        images: (B, C, H, W), normalized for the trained model.
        targets: what `criterion` takes beside logits; phase 1 does not use them.
    """
    seen = teacher.normalized(images)
    if teacher.phase == 1:
        return reconstruction_loss(net, teacher.model, images, teacher_images=seen)
    options: dict[str, Any] = {"criterion": criterion, "teacher_images": seen}
    return distillation_loss(net, teacher.model, images, targets, **options).total  # type: ignore[arg-type]


def check_phase(model: Any, recipe: Recipe) -> None:
    """Compute the loss of the recipe's phase for one zero image.

    Args:
        model: a `model.Classifier`.

    Raises:
        TrainError: teacher and model do not fit together.
    """
    if model.phase is None:
        return
    size = recipe.data.img_size
    rows, columns = (size, size) if isinstance(size, int) else size
    image = torch.zeros(1, recipe.model.in_chans, rows, columns, device=next(model.parameters()).device)
    try:
        with keeping_modes(model), torch.no_grad(), torch.random.fork_rng():
            model.train().trial(image)
    except ValueError as error:
        assert recipe.distill is not None
        raise TrainError(f"distill.teacher: {recipe.distill.teacher} cannot teach: {first_line(error)}") from error
