"""Data loaders of a recipe: uint8 images (B, C, H, W) and class indices (B,).

Decoding, cropping, flips, color jitter and RandAugment run per image, in worker processes if there are any. What can
run per batch on the device is in augment.py.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import transforms

from .errors import TrainError
from .images import Collate, Images
from .interrupt import loader_context, outlive_signals
from .policies import black_at_0_bits
from .recipe import DataRecipe, Recipe
from .samplers import EpochSampler
from .sources import Transform, class_names, nested_folders, open_split
from .streams import stream_loader

_WORKERS_PER_CPU, _FEW_WORKERS = 4, 32


def build_loaders(
    recipe: Recipe, *, pin_memory: bool = False, keeps_workers: bool = False
) -> tuple[DataLoader, DataLoader, list[str] | None]:
    """Return the training loader, the validation loader, and the class names where the source has any.

    Args:
        pin_memory: of torch's loaders.
        keeps_workers: start workers once, not in each epoch; the caller ends them with `end_workers`. Streams start
            theirs in each epoch.

    Raises:
        TrainError: the data cannot be opened, or the number of classes is not model.num_classes.
    """
    _check_workers(recipe.data.workers)
    if recipe.data.streams:
        return _stream_loaders(recipe, pin_memory)
    train = open_split(recipe.data, recipe.data.train_split, train_transform(recipe), fixed=not _random(recipe))
    classes = class_names(train)
    _check_classes(recipe.data, recipe.data.train_split, train, recipe.model.num_classes)
    val = open_split(recipe.data, recipe.data.val_split, val_transform(recipe), fixed=True, classes=classes)
    images = Images(train, _shape(recipe), "skip", recipe.data.max_unreadable)
    sampler = EpochSampler(images, recipe.seed, recipe.batch_size, recipe.augment.repeats)
    loader = _loader(recipe, images, sampler, pin_memory, keeps_workers, drop_last=True)
    if not len(loader):
        raise TrainError(
            f"data: the training split gives each process {len(sampler)} images, fewer than one "
            f"batch_size {recipe.batch_size} (a partial batch is dropped)"
        )
    if recipe.accumulate > len(loader):
        raise TrainError(f"accumulate: {recipe.accumulate} batches per step, but an epoch has {len(loader)} batches")
    return loader, _val_loader(recipe, val, pin_memory, keeps_workers), classes


def end_workers(*loaders: DataLoader) -> None:
    """End the workers of loaders that keep them: at the end of Python nothing would tell them to stop."""
    for loader in loaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]  # an error's traceback may hold it
        loader._iterator = None


def build_val_loader(recipe: Recipe, classes: Sequence[str] | None, *, pin_memory: bool = False) -> DataLoader:
    """Return the validation loader alone; `classes` are the class names of the training split."""
    if recipe.data.streams:
        return _stream_loader(recipe, pin_memory, training=False)
    val = open_split(recipe.data, recipe.data.val_split, val_transform(recipe), fixed=True, classes=classes)
    _check_classes(recipe.data, recipe.data.val_split, val, recipe.model.num_classes)
    return _val_loader(recipe, val, pin_memory, keeps_workers=False)


def _stream_loaders(recipe: Recipe, pin_memory: bool) -> tuple[DataLoader, DataLoader, list[str] | None]:
    loader = _stream_loader(recipe, pin_memory, training=True)
    classes = class_names(loader.dataset)
    _check_classes(recipe.data, recipe.data.train_split, loader.dataset, recipe.model.num_classes)
    return loader, _stream_loader(recipe, pin_memory, training=False), classes


def _stream_loader(recipe: Recipe, pin_memory: bool, *, training: bool) -> DataLoader:
    transform, collate = (train_transform if training else val_transform)(recipe), Collate(recipe.model.num_classes)
    options = {"pin_memory": pin_memory, "worker_init_fn": outlive_signals}
    options |= {"multiprocessing_context": loader_context(recipe.data.workers)}
    return stream_loader(recipe, transform, collate, training=training, **options)


def draw_batches(
    data: DataRecipe, transform: Transform, num_classes: int, *, batches: int, batch_size: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Draw labeled batches from the training split, without repeated images: to measure a model, not to train it.

    Args:
        data: only its source, root and train_split are used.
        transform: PIL image -> (C, H, W), any dtype.
        num_classes: number of classes of the model.
        seed: random seed of the selection.

    Raises:
        TrainError: the data cannot be opened, it has another number of classes, too few images, or a file that cannot
            be read.
    """
    split = open_split(data, data.train_split, transform, fixed=False)
    _check_classes(data, data.train_split, split, num_classes)
    images = Images(split, (1, 1, 1))
    count = len(images)
    if count < batches * batch_size:
        raise TrainError(
            f"data: {data.root or data.source} has {count} images in {data.train_split!r}, fewer than {batches} "
            f"batches of {batch_size}"
        )
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: batches * batch_size]
    loader = DataLoader(Subset(images, drawn.tolist()), batch_size, collate_fn=Collate(num_classes))
    batches_drawn = []
    for batch in loader:
        if batch.error:
            raise TrainError(batch.error)
        batches_drawn.append((batch.images, batch.targets))
    return batches_drawn


def train_transform(recipe: Recipe) -> transforms.Compose:
    """Return PIL image -> (C, H, W) uint8, with the augmentation that runs per image."""
    data, augment = recipe.data, recipe.augment
    options: dict[str, Any] = {
        "scale": augment.scale or (1.0, 1.0),  # the largest center crop of the input's aspect ratio
        "ratio": (augment.ratio or (3 / 4, 4 / 3)) if augment.scale else _ratio(data),
        "hflip": augment.hflip,
        "color_jitter": augment.color_jitter or None,
        "auto_augment": augment.randaugment,
        "interpolation": data.train_interpolation or data.interpolation,
        "mean": data.mean,  # fill color of RandAugment
    }
    try:
        steps = create_transform(data.img_size, is_training=True, normalize=False, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise TrainError(f"augment.randaugment: timm cannot read {augment.randaugment!r}") from error
    black_at_0_bits(steps.transforms)
    return transforms.Compose([ToMode(recipe.model.in_chans), *steps.transforms])


def val_transform(recipe: Recipe) -> transforms.Compose:
    """Return PIL image -> (C, H, W) uint8: resize the short side to img_size / crop_pct, then center crop."""
    data = recipe.data
    steps = create_transform(data.img_size, interpolation=data.interpolation, crop_pct=data.crop_pct, normalize=False)
    return transforms.Compose([ToMode(recipe.model.in_chans), *steps.transforms])


class ToMode:
    """Convert to gray (1 channel) or RGB (3). A class, so that it can be pickled for worker processes."""

    def __init__(self, channels: int) -> None:
        self.mode = "L" if channels == 1 else "RGB"

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # as Pillow advises; the transparency is dropped below
        return image if image.mode == self.mode else image.convert(self.mode)


def _random(recipe: Recipe) -> bool:
    augment = recipe.augment
    per_image = augment.randaugment or augment.color_jitter or augment.hflip or augment.scale
    return bool(per_image) or recipe.data.train_interpolation == "random"


def _ratio(data: DataRecipe) -> tuple[float, float]:
    rows, columns = (data.img_size, data.img_size) if isinstance(data.img_size, int) else data.img_size
    return (columns / rows, columns / rows)


def _check_classes(data: DataRecipe, split: str, dataset: Dataset, num_classes: int) -> None:
    classes = class_names(dataset)
    if classes is None or len(classes) == num_classes:
        return
    nested = nested_folders(dataset)
    why = (
        f"; folders in folders are classes too: {', '.join(nested[:3])}{', ...' * (len(nested) > 3)}" if nested else ""
    )
    raise TrainError(
        f"data: {data.root or data.source} has {len(classes)} classes in {split!r}, but model.num_classes is "
        f"{num_classes}{why}"
    )


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    size = recipe.data.img_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return recipe.model.in_chans, rows, columns


def _check_workers(workers: int) -> None:
    """Refuse more loader processes than any machine like this one can use."""
    cpus = os.cpu_count() or 1
    if workers > max(_FEW_WORKERS, _WORKERS_PER_CPU * cpus):
        most = max(_FEW_WORKERS, _WORKERS_PER_CPU * cpus)
        raise TrainError(f"data.workers: wanted at most {most} loader processes on {cpus} CPUs, got {workers}")


def _val_loader(recipe: Recipe, dataset: Dataset, pin_memory: bool, keeps_workers: bool) -> DataLoader:
    images = Images(dataset, _shape(recipe), "mark")
    return _loader(recipe, images, DefaultSampler(images, shuffle=False), pin_memory, keeps_workers, drop_last=False)


def _loader(
    recipe: Recipe, dataset: Images, sampler: Sampler, pin_memory: bool, keeps_workers: bool, *, drop_last: bool
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=recipe.data.workers,
        collate_fn=Collate(recipe.model.num_classes, multi_label=recipe.loss.multi_label),
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
        multiprocessing_context=loader_context(recipe.data.workers),
        # In each epoch, a fork may hang while a thread of torch.distributed enters Python.
        persistent_workers=keeps_workers and recipe.data.workers > 0,
    )
