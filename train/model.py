"""A timm model for MMEngine: the loss in training, hits and loss per image in validation.

Autocast is entered here and not in the optimizer wrapper, so that validation runs at the precision of training.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_type_hints

import timm
import torch
from mmengine.model import BaseModel
from timm.models import is_model
from torch import Tensor, nn

from .._errors import did_you_mean, first_line
from .._memory import check_images_fit
from .._modes import keeping_modes
from .._timm import pretrained_cfg, set_pretrained_cfg
from ..export.adapters import add_lora
from ..export.errors import ExportError
from .augment import BatchTransform
from .errors import TrainError
from .loading import Say, start_net
from .losses import choose_loss, judge, loss_of_layers, unread_row
from .parallel import frozen_norms
from .phases import phase_loss
from .recipe import LoraRecipe, ModelRecipe, Precision, Recipe

DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


class Classifier(BaseModel):
    def __init__(self, recipe: Recipe, net: nn.Module, teacher: Any = None) -> None:
        """Args:
        teacher: a `teacher.Teacher`, if recipe.distill is set; it is no submodule.
        """
        super().__init__(data_preprocessor=BatchTransform(recipe))
        self.net = net
        self.loss, self.loss_recipe = choose_loss(recipe), recipe.loss
        self.teacher = teacher
        self.autocast_dtype = DTYPES[recipe.precision]
        self.channels_last = recipe.engine.channels_last
        self.freezes = bool(recipe.model.freeze)

    def forward(self, images: Tensor, targets: Tensor, mode: Literal["tensor", "loss", "predict"] = "tensor") -> Any:
        """Return logits, {"loss": scalar}, or `judge`'s row per image."""
        if mode == "loss":
            return {"loss": self._loss(images, targets)}
        logits = self.logits(images)
        return judge(logits, targets).tolist() if mode == "predict" else logits

    def logits(self, images: Tensor) -> Tensor:
        """Return float32 logits (B, classes)."""
        with self._autocast(images):
            logits = self.net(self._in_layout(images))
        return logits.float()

    def trial(self, images: Tensor) -> Tensor:
        """Return a scalar for the backward pass of a training step whose images have no targets."""
        if self.phase is None:
            return self(images, None).mean()
        return self._phase_loss(images, None, lambda logits, targets: logits.mean())

    @property
    def phase(self) -> int | None:
        """The training phase of Sparsifiner, if the recipe names one."""
        return None if self.teacher is None else self.teacher.phase

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.phase is not None:
            return self._phase_loss(images, targets, self.loss)
        logits = self.logits(images)
        loss = self.loss(logits, targets) + loss_of_layers(self.net, self.loss_recipe)
        if self.teacher is None:
            return loss
        with self._autocast(images):
            teachers = self.teacher.logits(images)
        return self.teacher.loss(loss, logits, teachers)

    def _phase_loss(self, images: Tensor, targets: Tensor | None, criterion: Callable[..., Tensor]) -> Tensor:
        with self._autocast(images):
            return phase_loss(self.teacher, self.net, self._in_layout(images), targets, criterion)

    def _in_layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def val_step(self, data: Any) -> list[list[float]]:
        """Return `judge`'s row per image; that of an image that could not be read holds NaN."""
        rows = super().val_step(data)
        for place in getattr(data, "unread", ()):
            rows[place] = unread_row(rows[place])
        return rows

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for norm in frozen_norms(self.net) if self.freezes else ():
            norm.eval()
        return self

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def init_weights(self) -> None:
        """Keep timm's weights: MMEngine's init_weights would initialize pretrained weights again."""


def build_net(recipe: Recipe, say: Say = lambda line: None) -> nn.Module:
    """Create the timm model. Its pretrained_cfg holds the recipe's preprocessing.

    Args:
        say: called with what was dropped or resized on loading `model.checkpoint`, one line at a time.

    Raises:
        TrainError: unknown model or keyword, invalid value, or weights that do not fit.
    """
    model = recipe.model
    if not is_model(model.name):
        known = timm.list_models()
        raise TrainError(
            f"model.name: unknown model {model.name!r}" + did_you_mean(model.name.partition(".")[0], known)
        )
    own: dict[str, Any] = {"in_chans": model.in_chans, "drop_path_rate": model.drop_path_rate, **model.keywords}

    def make(num_classes: int, overlay: dict[str, Any] | None, pretrained: bool = False) -> nn.Module:
        wants_weights = pretrained or overlay is not None
        return timm.create_model(
            model.name, wants_weights, pretrained_cfg_overlay=overlay, num_classes=num_classes, **own
        )

    try:
        if model.checkpoint is not None:
            net = start_net(model, make, build_net, say)
        else:
            net = make(model.num_classes, None, model.pretrained)
    except TrainError:
        raise
    except Exception as error:  # models and checkpoint filters raise many types
        raise _why_not_built(model, error) from error
    if model.pretrained:
        _describe_published(pretrained_cfg(net), model, say)
    kept = {key: value for key, value in pretrained_cfg(net).items() if key != "state_dict"}
    set_pretrained_cfg(net, {**kept, **_input_cfg(recipe)})
    if model.lora is not None:
        _add_lora(net, model.lora)
    return net


def _describe_published(cfg: Mapping[str, Any], model: ModelRecipe, say: Say) -> None:
    say(f"published weights {cfg.get('architecture')}.{cfg.get('tag')}")
    if cfg.get("num_classes") != model.num_classes:
        say(
            f"their classifier of {cfg.get('num_classes')} classes is dropped, that of {model.num_classes} classes "
            "starts at random"
        )


def check_lora(recipe: Recipe) -> None:
    """Refuse adapters for random weights, which would never train.

    Raises:
        TrainError: model.lora without model.checkpoint and model.pretrained.
    """
    model = recipe.model
    if model.lora is not None and model.checkpoint is None and not model.pretrained:
        raise TrainError("model.lora: adapters change given weights; give model.checkpoint or model.pretrained")


def _add_lora(net: nn.Module, lora: LoraRecipe) -> None:
    classifier = pretrained_cfg(net).get("classifier") or ()
    trained = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    try:
        add_lora(net, lora.rank, lora.alpha, lora.dropout, lora.targets, trained)
    except ExportError as error:
        raise TrainError(f"model.lora: {first_line(error)}") from error


def check_runs(model: Classifier, recipe: Recipe) -> None:
    """Run one training batch of two zero images at the recipe's size. Parameters and buffers are left unchanged.

    Raises:
        TrainError: the model does not support the size, or does not return logits of its classes.
    """
    size, classes = input_size(recipe), recipe.model.num_classes
    device = next(model.parameters()).device
    try:
        if device.type == "cpu":
            check_images_fit(min(2, recipe.batch_size), *size)
    except ValueError as error:
        raise TrainError(f"data.img_size: {error}") from error
    images = torch.zeros(min(2, recipe.batch_size), *size, device=device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with keeping_modes(model), torch.no_grad(), torch.random.fork_rng():
            shape = tuple(model.train()(images, None).shape)
    except Exception as error:  # models raise many types
        raise TrainError(
            f"data.img_size: {recipe.model.name} does not run on images of {size[1]}x{size[2]}: {first_line(error)}"
        ) from error
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if shape != (len(images), classes):
        raise TrainError(f"model: {recipe.model.name} returns {shape}, wanted {(len(images), classes)}")


def input_size(recipe: Recipe) -> tuple[int, int, int]:
    """Return (C, H, W) of the recipe's images, px."""
    size = recipe.data.img_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return recipe.model.in_chans, rows, columns


def _input_cfg(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    return {
        "input_size": input_size(recipe),
        "num_classes": recipe.model.num_classes,
        "mean": data.mean,
        "std": data.std,
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
    }


def _why_not_built(model: ModelRecipe, error: Exception) -> TrainError:
    if (unexpected := _UNEXPECTED.search(str(error))) and unexpected[1] in model.keywords | {"drop_path_rate": 0}:
        name = unexpected[1]
        known = {f.name for f in fields(ModelRecipe)} - {"keywords"} | _keywords(model.name)
        near = did_you_mean(f"model.{name}", [f"model.{keyword}" for keyword in known])
        return TrainError(f"unknown key model.{name}: {model.name} does not have this argument{near}")
    return TrainError(f"model: timm cannot build {model.name}: {first_line(error)}")


def _keywords(name: str) -> set[str]:
    """Return the keywords of a model's class, and the fields of its config if it has one."""
    with torch.device("meta"):
        cls = type(timm.create_model(name))
    names = set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}
    for hint in get_type_hints(cls.__init__).values():
        names |= {f.name for f in fields(hint)} if is_dataclass(hint) else set()
    return names
