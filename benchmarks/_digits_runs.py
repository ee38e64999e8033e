"""Small models trained on mnist5k by the recipes of the package, for benchmarks that measure accuracy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from ..train import list_recipes, load_net, load_recipe, train
from ..train.data import val_transform
from ..train.mnist5k import load_digits

MEAN, STD = 0.1307, 0.3081
SUFFIX = "_micro_1xb64_mnist5k"


def digits_recipes() -> list[str]:
    """Return the recipes of micro models that train on mnist5k."""
    return [name for name in list_recipes() if name.endswith(SUFFIX)]


def trained(
    recipe: str, folder: Path, options: Mapping[str, Any] | None = None, epochs: int | None = None
) -> nn.Module:
    """Return the best model of a run in `folder`, which is trained, or resumed, if it is not complete."""
    changes = {**(options or {}), **({} if epochs is None else {"schedule.epochs": epochs})}
    return load_net(train(recipe, work_dir=folder, resume=True, cfg_options=changes).best_checkpoint)


def digits(split: Literal["train", "validation"], recipe: str | None = None) -> tuple[Tensor, Tensor]:
    """Return the images (N, 1, H, W), normalized, and the classes of "train" or "validation".

    Images are of 28 px, or of the size that a recipe is validated at.
    """
    images, targets = load_digits(split)
    images = images[:, None]
    if recipe is not None and (read := load_recipe(recipe)).data.img_size != images.shape[-1]:
        transform = val_transform(read)
        images = torch.stack([torch.as_tensor(transform(Image.fromarray(image[0].numpy()))) for image in images])
    return (images.float() / 255 - MEAN) / STD, targets


def observed_digits(count: int, recipe: str | None = None) -> Tensor:
    """Return training images of all classes in a mixed order; the data set has one class after the other."""
    images, _ = digits("train", recipe)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return images[torch.linspace(0, len(images) - 1, count).long()[order]]


@torch.inference_mode()
def top1(run: Any, images: Tensor, targets: Tensor) -> float:
    """Return the top-1 accuracy of what maps a batch to logits, in %."""
    hits = sum(int((run(x).argmax(1) == y).sum()) for x, y in zip(images.split(100), targets.split(100), strict=True))
    return 100 * hits / len(targets)
