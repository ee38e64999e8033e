"""Average the weights of checkpoints of one model (a "soup", Wortsman et al. 2022, arXiv:2203.05482).

Means are computed in float64. Statistics of BatchNorm are averaged too, which is not the statistics of the averaged
network: `update_statistics` measures them again on training images.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from .._files import UnreadableFileError, atomic_path
from .._torch_files import read_weights, save_torch
from .._weights import read_state_dict
from ..export.weights import write_weights
from .augment import BatchTransform
from .checkpoints import build_with_weights, net_weights, recipe_of
from .data import build_loaders
from .errors import TrainError
from .launch import choose_device
from .loading import NET, read_meta
from .recipe import Recipe
from .recipe_files import load_recipe

SUFFIXES = (".pth", ".safetensors")


def average_checkpoints(files: Sequence[Path]) -> dict[str, Any]:
    """Return the average of checkpoints as one: {"meta", "state_dict"}, or {"state_dict"} for files of weights.

    Checkpoints of `foveate train` must be of one model; the result has the recipe and the class names of the first.

    Raises:
        TrainError: fewer than two files, files of different kinds or models, or weights that are not finite.
    """
    if len(files) < 2:
        raise TrainError(f"wanted at least two checkpoints to average, got {len(files)}")
    metas = [_meta(path) for path in files]
    if len({meta is None for meta in metas}) > 1:
        raise TrainError("wanted checkpoints of foveate train or files of weights, got both")
    first = _weights(files[0], metas[0])
    total = {key: value.double() if value.is_floating_point() else value for key, value in first.items()}
    dtypes = {key: value.dtype for key, value in first.items()}
    for path, meta in zip(files[1:], metas[1:], strict=True):
        weights = _weights(path, meta)
        _check_same(files[0], total, path, weights)
        for key, value in weights.items():
            total[key] = total[key] + value.double() if value.is_floating_point() else value
    state = {
        key: (value / len(files)).to(dtypes[key]) if value.is_floating_point() else value
        for key, value in total.items()
    }
    if metas[0] is None:
        return {"state_dict": state}
    return {"meta": _meta_of_all(files, metas), "state_dict": {f"{NET}{key}": value for key, value in state.items()}}


def write_soup(soup: dict[str, Any], out: Path) -> Path:
    """Write an average: as a checkpoint where it has a recipe and `out` ends in .pth, as weights otherwise.

    Raises:
        TrainError: another suffix, or no such folder.
        OSError: the disk is full.
    """
    check_soup_target(out)
    if "meta" in soup and out.suffix == ".pth":
        with atomic_path(out) as part:
            save_torch(soup, part)
        return out
    name = load_recipe(soup["meta"]["recipe"]).model.name if "meta" in soup else ""
    write_weights(net_weights(soup) if "meta" in soup else soup["state_dict"], out, name)
    return out


def check_soup_target(out: Path) -> None:
    """Refuse a path that cannot be written, before any work."""
    if out.suffix not in SUFFIXES:
        raise TrainError(f"{out}: wanted a name that ends in {' or '.join(SUFFIXES)}")
    if not out.absolute().parent.is_dir():
        raise TrainError(f"{out}: the folder {out.parent} does not exist")


def has_statistics(soup: dict[str, Any]) -> bool:
    """Say whether the weights hold statistics of BatchNorm."""
    return any(key.endswith(".running_mean") for key in soup["state_dict"])


def update_statistics(
    soup: dict[str, Any], data: str | Path | None, *, batches: int = 100, device: str | None = None
) -> dict[str, Any]:
    """Measure the statistics of BatchNorm again, on training batches with the recipe's augmentation.

    Args:
        soup: of checkpoints of `foveate train`.
        data: folder of the data set; None: the recipe's.
        batches: at most so many batches are used.

    Raises:
        TrainError: the files are weights without a recipe, or the data cannot be opened.
    """
    if "meta" not in soup:
        raise TrainError("statistics of BatchNorm: wanted checkpoints of foveate train, which know their data")
    recipe = recipe_of(soup)
    recipe = recipe if data is None else load_recipe(recipe, {"data.root": str(data)})
    place = choose_device(device)
    net = build_with_weights(recipe, soup).to(place)
    loader, _, _ = build_loaders(recipe)
    transform = BatchTransform(_without_mixing(recipe)).to(place)
    torch.manual_seed(recipe.seed)
    seen = (transform(batch, training=True)[0] for batch, _ in zip(loader, range(batches), strict=False))
    update_bn(seen, net)
    state = {f"{NET}{key}": value.cpu() for key, value in net.state_dict().items()}
    return {**soup, "state_dict": state}


def _without_mixing(recipe: Recipe) -> Recipe:
    """Return the recipe without mixup and cutmix: they change what BatchNorm sees, but not in evaluation."""
    unmixed = replace(recipe.augment, mixup=0.0, cutmix=0.0, mix_prob=None, switch_prob=None)
    return replace(recipe, augment=unmixed)


def _meta(path: Path) -> dict[str, Any] | None:
    try:
        return read_meta(path)
    except UnreadableFileError as error:
        raise TrainError(f"{path} {error}") from error


def _weights(path: Path, meta: dict[str, Any] | None) -> dict[str, Tensor]:
    try:
        if meta is None:
            return read_state_dict(path)
        state = read_weights(path, lambda content: content["state_dict"])
    except UnreadableFileError as error:
        raise TrainError(f"{path} {error}") from error
    if any(".lora_" in key for key in state):
        raise TrainError(
            f"{path} holds LoRA adapters, whose products do not average: convert it to merged weights first"
        )
    return net_weights({"state_dict": state})


def _check_same(first: Path, total: dict[str, Tensor], path: Path, weights: dict[str, Tensor]) -> None:
    if wrong := sorted(total.keys() ^ weights.keys()):
        raise TrainError(f"{path} and {first} are of different models: only one of them has {wrong[0]}")
    for key, value in weights.items():
        if value.shape != total[key].shape:
            shapes = f"{tuple(value.shape)} and {tuple(total[key].shape)}"
            raise TrainError(f"{path} and {first} are of different models: {key} is {shapes}")
        if not value.isfinite().all():
            raise TrainError(f"{path}: {key} has values that are not finite")


def _meta_of_all(files: Sequence[Path], metas: Sequence[Any]) -> dict[str, Any]:
    classes = {tuple(meta.get("classes") or ()) for meta in metas}
    if len(classes) > 1:
        raise TrainError(f"{files[0]} and the others were trained on different classes")
    return {**metas[0], "best": None, "soup": [str(path) for path in files]}
