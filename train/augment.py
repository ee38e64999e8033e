"""Augmentation of a batch on its device: small rotations and shifts, normalization, random erasing, mixup and cutmix.

Parameters are drawn per image; mixup and cutmix draw once per batch, as in timm's batch mode. Pixels from outside the
image are black, which suits digits and other bright shapes on black.
"""

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from .recipe import AugmentRecipe, Recipe


class BatchTransform(BaseDataPreprocessor):
    """(images uint8 (B, C, H, W), classes (B,)) -> (images float32, classes (B,) or soft targets (B, classes))."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(non_blocking=True)
        augment = recipe.augment
        self.augment = augment
        self.register_buffer("mean", _per_channel(recipe.data.mean), persistent=False)
        self.register_buffer("std", _per_channel(recipe.data.std), persistent=False)
        self.mix = _mix(recipe) if augment.mixes else None

    def forward(self, data: Sequence[Tensor], training: bool = False) -> tuple[Tensor, Tensor]:
        images, targets = self.cast_data(tuple(data))
        images = images.float() / 255
        if training:
            images = random_affine(images, self.augment)
        images = (images - self.mean) / self.std
        if training and self.augment.erasing:
            erase = RandomErasing(self.augment.erasing, mode=self.augment.erasing_mode or "pixel", device=images.device)
            images = erase(images)
        if training and self.mix is not None:
            images, targets = self.mix(images, targets)
        return images, targets


def random_affine(images: Tensor, augment: AugmentRecipe) -> Tensor:
    """Rotate, zoom and shift each image of (B, C, H, W) by its own random amount, around its center."""
    if not (augment.rotate or augment.zoom or augment.shift):
        return images
    B, _, H, W = images.shape

    def draw(limit: float) -> Tensor:
        return (torch.rand(B, device=images.device) * 2 - 1) * limit

    angle, zoom = draw(math.radians(augment.rotate)), 1 + draw(augment.zoom)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    shift_x, shift_y = draw(2 * augment.shift), draw(2 * augment.shift)  # in grid_sample's units a side has length 2
    rows = [torch.stack([cos, -sin * H / W, shift_x], 1), torch.stack([sin * W / H, cos, shift_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _mix(recipe: Recipe) -> Mixup:
    augment = recipe.augment
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=1.0 if augment.mix_prob is None else augment.mix_prob,
        switch_prob=0.5 if augment.switch_prob is None else augment.switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=recipe.model.num_classes,
        multi_label=recipe.loss.multi_label,
    )
