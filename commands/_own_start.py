"""What `foveate demo --images` fine-tunes: a model with weights, its preprocessing, and the recipe of the run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, is_model, resolve_model_input_args
from torch import Tensor

from .._errors import RequestError, did_you_mean, first_line
from .._files import atomic_path
from .._timm import pretrained_cfg
from ..attention_ops.macs import count_macs
from ..backbones import list_models
from ..train import Recipe, load_net, load_recipe
from ..train.checkpoints import from_scratch
from ..train.loading import trained_meta
from ..train.model import build_net, input_size

LUMA = (0.299, 0.587, 0.114)  # shares of red, green and blue in a gray value, as Pillow converts
DIGITS_PX = 96  # of own images, where the weights saw digits of 28 px
RATES = {True: 1e-3, False: 3e-4}  # for weights that saw no photographs, and for others
BATCHES = ((512, 32), (0, 16))  # from so many training images on: images of a batch
MOST_VIEWS, MOST_GMACS = 4000, 3000.0  # of training images in a run, forward passes; about a minute on two cores
MOST_EPOCHS, LEAST_EPOCHS = 60, 3


@dataclass(frozen=True)
class Start:
    """A model, the weights that it starts from, and how its images are preprocessed."""

    model: str
    keywords: Mapping[str, Any]
    checkpoint: Path | None
    pretrained: bool
    px: int | tuple[int, int]  # height and width
    in_chans: int
    preprocessing: Mapping[str, Any]  # mean, std, interpolation, crop_pct of a recipe's data
    far: bool  # the weights are random, or saw gray images only
    widens: bool = False  # the weights are for gray images, and the model takes RGB

    @property
    def weights(self) -> str:
        """Where the weights come from, for a report."""
        named = "published" if self.pretrained else "random: neither --checkpoint nor --pretrained given"
        return named if self.checkpoint is None else str(self.checkpoint)


def start_from_run(checkpoint: Path, img_size: int | tuple[int, int] | None) -> Start:
    """Start from a checkpoint of `foveate train`, whose recipe says the rest. Gray models become RGB models.

    Raises:
        RequestError: `checkpoint` was not written by `foveate train`.
    """
    meta = trained_meta(checkpoint)
    if meta is None:
        raise RequestError(f"{checkpoint} does not say which model it holds: name the model with --model")
    recipe = load_recipe(meta["recipe"])
    gray, size = recipe.model.in_chans == 1, recipe.data.img_size
    own = size if isinstance(size, int) else max(size)
    px = img_size or (DIGITS_PX if gray else own)
    keywords = dict(recipe.model.keywords)
    if "img_size" in keywords:
        keywords["img_size"] = px
    data = recipe.data
    mean, std = (tuple(values) * (3 if gray else 1) for values in (data.mean, data.std))
    preprocessing = {"mean": mean, "std": std, "interpolation": data.interpolation, "crop_pct": data.crop_pct}
    return Start(recipe.model.name, keywords, checkpoint, False, px, 3, preprocessing, far=gray, widens=gray)


def start_from_name(
    model: str, checkpoint: Path | None, pretrained: bool, img_size: int | tuple[int, int] | None
) -> Start:
    """Start from a timm model, with the weights of a file or of its authors, or with random ones.

    Raises:
        RequestError: timm has no such model.
    """
    if not is_model(model):
        raise RequestError(f"--model: unknown model {model!r}" + did_you_mean(model, list_models()))
    cfg = get_pretrained_cfg(model)
    px = img_size or (cfg.input_size[-1] if cfg else 224)
    arguments = resolve_model_input_args(model, {"img_size": px})
    keywords = {name: arguments[name] for name in ("img_size",) if name in arguments}
    names = ("mean", "std", "interpolation", "crop_pct")
    preprocessing = {name: getattr(cfg, name) for name in names} if cfg else {}
    far = checkpoint is None and not pretrained
    return Start(model, keywords, checkpoint, pretrained, px, 3, preprocessing, far=far)


def widened(start: Start, folder: Path) -> Start:
    """Return a start whose weights take RGB: they compute of an image what the old ones computed of its gray values.

    Writes start.safetensors to the folder.
    """
    assert start.checkpoint is not None
    net = load_net(start.checkpoint)
    weights: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    name = f"{pretrained_cfg(net)['first_conv']}.weight"
    weights[name] = torch.cat([share * weights[name] for share in LUMA], 1)
    with atomic_path(folder / "start.safetensors") as part:
        save_file(weights, part)
    return replace(start, checkpoint=folder / "start.safetensors", widens=False)


def check_start(start: Start, classes: int) -> None:
    """Build the model, load its weights, and run it on one image of zeros, before any file is written.

    Raises:
        TrainError: the model cannot be built, or the weights are another model's.
        RequestError: it does not take images of this size.
    """
    recipe = load_recipe(_recipe(start, Path(), classes, classes, 0, 1))
    net = build_net(recipe).eval()
    try:
        with torch.inference_mode():
            net(torch.zeros(1, *input_size(recipe)))
    except Exception as error:  # models raise many types
        raise RequestError(f"{start.model} refuses images of {_describe(start.px)} px: {first_line(error)}") from error


def _describe(px: int | tuple[int, int]) -> str:
    return str(px) if isinstance(px, int) else f"{px[0]}x{px[1]}"


def fine_tuning(start: Start, root: Path, classes: int, images: int, seed: int, epochs: int | None) -> Recipe:
    """Return the recipe of a run on `root`/train and `root`/val.

    Args:
        images: for training.
        epochs: None: so many that the run takes about a minute on two cores, between 3 and 60.

    Raises:
        TrainError: the model cannot be built.
    """
    recipe = load_recipe(_recipe(start, root, classes, images, seed, epochs or MOST_EPOCHS))
    if epochs is not None:
        return recipe
    views = min(MOST_VIEWS, MOST_GMACS / (3 * _gmacs(recipe)))
    return load_recipe(recipe, {"schedule.epochs": max(LEAST_EPOCHS, min(MOST_EPOCHS, round(views / images)))})


def _recipe(start: Start, root: Path, classes: int, images: int, seed: int, epochs: int) -> dict[str, Any]:
    batch = min(images, next(size for least, size in BATCHES if images >= least))
    checkpoint = None if start.checkpoint is None else str(start.checkpoint)
    return {
        "model": {
            **start.keywords,
            **{"name": start.model, "num_classes": classes, "in_chans": start.in_chans},
            **{"checkpoint": checkpoint, "pretrained": start.pretrained},
        },
        "data": {"root": str(root), "val_split": "val", "img_size": start.px, "workers": 0, **start.preprocessing},
        "augment": {"hflip": 0.5, "scale": (0.5, 1.0), "color_jitter": 0.2, "smoothing": 0.1},
        "optimizer": {"opt": "adamw", "lr": RATES[start.far], "weight_decay": 0.05, "clip_grad": 1.0},
        "schedule": {"kind": "cosine", "epochs": epochs, "warmup_epochs": 0.1 * epochs, "min_lr": 1e-5},
        "checkpoint": {"interval": epochs, "keep": 1},
        "batch_size": batch,
        "global_batch": batch,
        "seed": seed,
    }


def _gmacs(recipe: Recipe) -> float:
    with torch.device("meta"):
        net = build_net(from_scratch(recipe)).eval()
        return count_macs(net, torch.zeros(1, *input_size(recipe))) / 1e9
