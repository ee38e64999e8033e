"""The teacher of distillation (Hinton et al. 2015, arXiv:1503.02531), and of Sparsifiner's training phases."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn
from torch.nn import functional as F

from .._errors import RequestError, did_you_mean, first_line
from .._timm import pretrained_cfg
from ..export.load import load_model
from .checkpoints import load_net
from .errors import TrainError
from .recipe import DistillRecipe, Recipe


class Teacher:
    """A frozen model whose logits the trained model learns. It is neither averaged nor saved, and not a submodule."""

    def __init__(self, recipe: Recipe, distill: DistillRecipe, device: torch.device) -> None:
        """Load the teacher.

        Raises:
            TrainError: unknown model, weights that do not fit, other classes, or a size that it does not take.
        """
        self.weight, self.temperature, self.phase = distill.weight, distill.temperature, distill.phase
        net = _load(recipe, distill)
        self.net = DistillationTeacher(net).requires_grad_(False).to(device).eval()
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (recipe.data.mean, recipe.data.std)
        )
        _check(self, recipe, distill, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # the averaged copy of the trained model has the same teacher

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images that are normalized for the trained model."""
        return self.net(self.normalized(images)).float()

    @property
    def model(self) -> nn.Module:
        """The timm model itself."""
        return self.net.model

    def normalized(self, images: Tensor) -> Tensor:
        """Return images that are normalized for the trained model as the teacher takes them."""
        return self.net.normalize_input(images, self.mean, self.std)

    def loss(self, own: Tensor, logits: Tensor, teachers: Tensor) -> Tensor:
        """Return (1 - weight) * own + weight * temperature**2 * KL(teacher, model)."""
        log_p, log_q = (F.log_softmax(values / self.temperature, 1) for values in (logits, teachers))
        kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.weight) * own + self.weight * kl


def _load(recipe: Recipe, distill: DistillRecipe) -> nn.Module:
    name, model = distill.teacher, recipe.model
    if not is_model(name):
        near = did_you_mean(name.partition(".")[0], timm.list_models())
        raise TrainError(f"distill.teacher: unknown model {name!r}{near}")
    arguments: dict[str, Any] = {"num_classes": model.num_classes, "in_chans": model.in_chans}
    try:
        if distill.checkpoint is None:
            _check_published(name, model.num_classes)
            return load_model(name, pretrained=True, **arguments)
        return _from_file(name, Path(distill.checkpoint), arguments)
    except RequestError as error:
        raise TrainError(f"distill: {first_line(error)}") from error


def _from_file(name: str, path: Path, arguments: dict[str, Any]) -> nn.Module:
    try:
        net = load_net(path)
    except TrainError:  # not a checkpoint of a run: weights alone
        return load_model(name, path, **arguments)
    if (found := pretrained_cfg(net).get("architecture")) not in (None, name.partition(".")[0]):
        raise TrainError(f"{path} holds {found}, not {name}")
    return net


def _check_published(name: str, num_classes: int) -> None:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.num_classes != num_classes:
        raise TrainError(f"the published {name} has {cfg.num_classes} classes, but model.num_classes is {num_classes}")


def _check(teacher: Teacher, recipe: Recipe, distill: DistillRecipe, device: torch.device) -> None:
    size = recipe.data.img_size
    rows, columns = (size, size) if isinstance(size, int) else size
    images = torch.zeros(2, recipe.model.in_chans, rows, columns, device=device)
    try:
        shape = tuple(teacher.logits(images).shape)
    except Exception as error:  # models raise many types
        raise TrainError(
            f"distill.teacher: {distill.teacher} does not run on images of {rows}x{columns}: {first_line(error)}"
        ) from error
    if shape != (2, recipe.model.num_classes):
        raise TrainError(
            f"distill.teacher: {distill.teacher} returns {shape[1:]} logits, model.num_classes is "
            f"{recipe.model.num_classes}"
        )
