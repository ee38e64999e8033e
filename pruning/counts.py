"""Parameters and multiply-adds counted by non-zero weights, as in DIMAP's tables.

A masked weight saves one multiply-add at every position where its layer is applied; attention's own products, norms and
biases are not reduced. Only smaller layers make a model faster; zeroed weights do not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timm.models import get_model_traits
from torch import Tensor, nn

from .._errors import first_line
from .._memory import check_images_fit
from .._modes import evaluating
from ..attention_ops.macs import count_macs
from .errors import PruningError


@dataclass(frozen=True)
class Counts:
    """Parameters and multiply-adds of one image, before and after pruning."""

    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    input_size: tuple[int, int, int]  # (C, H, W) of the image


@torch.no_grad()
def count_masked(model: nn.Module, masks: Mapping[str, Tensor], images: Tensor) -> Counts:
    """Count the model with and without the weights that the masks (True: kept) remove."""
    with evaluating(model):
        macs = count_macs(model, images)
        positions = count_positions(model, set(masks), images)
    gone = {name: int((~mask).sum()) for name, mask in masks.items()}
    params = sum(p.numel() for p in model.parameters())
    saved = sum(count * positions[name] for name, count in gone.items())
    return Counts(params, params - sum(gone.values()), macs, macs - saved, size_of_one(images))


def size_of_one(images: Tensor) -> tuple[int, int, int]:
    """(B, C, H, W) -> (C, H, W)"""
    _, channels, height, width = images.shape
    return channels, height, width


def count_positions(model: nn.Module, names: set[str], images: Tensor) -> dict[str, int]:
    """Return how many times each weight is applied to one image; 0 if it does not belong to a linear layer.

    A layer whose weight its parent uses directly (as channel attention does) is applied at each token of the parent.
    """
    owners = {name: name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    seen: dict[str, int] = {}

    def watch(path: str, channels: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tensor = output if channels < 0 else inputs[0]
            seen[path] = seen.get(path, 0) + tensor.numel() // (len(images) * abs(channels))

        return hook

    handles = []
    for owner in owners.values():
        layer = model.get_submodule(owner)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parent = owner.rpartition(".")[0]
            width = layer.weight.shape[0]
            fan_in = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            handles.append(layer.register_forward_hook(watch(owner, -width)))
            handles.append(model.get_submodule(parent).register_forward_hook(watch(f"{owner} in {parent}", fan_in)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    counts = dict.fromkeys(names, 0)
    for name, owner in owners.items():
        counts[name] = seen.get(owner) or seen.get(f"{owner} in {owner.rpartition('.')[0]}", 0)
    return counts


def example_image(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Tensor:
    """Return one image of zeros, (1, C, H, W), of the model's own size unless another is given.

    Raises:
        PruningError: the image does not fit into memory.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *own = config.get("input_size", (3, 224, 224))
    channels = getattr(model, "in_chans", channels)
    parameter = next(model.parameters())
    size = img_size or get_model_traits(model).get("img_size") or own
    size = (size, size) if isinstance(size, int) else size
    try:
        check_images_fit(1, channels, *size)
    except ValueError as error:
        raise PruningError(str(error)) from error
    return torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)


@torch.no_grad()
def check_runs(model: nn.Module, image: Tensor) -> None:
    """Run the model once, in eval mode.

    Raises:
        PruningError: the model does not support the size, or there is not enough memory.
    """
    height, width = image.shape[2:]
    try:
        with evaluating(model):
            model(image)
    except Exception as error:  # models raise many types
        raise PruningError(
            f"{type(model).__name__} does not run on an image of {height}x{width}: {first_line(error)}"
        ) from error


def share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
