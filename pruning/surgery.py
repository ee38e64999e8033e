"""Apply the cuts of a plan: smaller tensors in a copy of the model."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from .._modes import evaluating
from .._timm import feature_info, set_pretrained_cfg, update_model_args
from ..backbones._pruning import Prunable, ends, feature_channels, narrow, set_features
from ..backbones.narrowed import narrowed
from .errors import PruningError


def cut(
    model: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]], numbers: Mapping[str, int], image: Tensor
) -> nn.Module:
    """Return a smaller copy of the model; `model` is left unchanged.

    `widths` of the copy is the argument of `timm.create_model(name, widths=...)` that builds the same model.

    Raises:
        PruningError: the cuts belong to another model.
    """
    tensors = model.state_dict()
    for name, axes in cuts.items():
        if name not in tensors or any(int(kept[-1]) >= tensors[name].shape[axis] for axis, kept in axes.items()):
            raise PruningError(f"the cuts do not fit {type(model).__name__}: {name} is missing or smaller")
    smaller = {name: _select(tensor, cuts.get(name, {})) for name, tensor in tensors.items()}
    before: dict[str, Any] = getattr(model, "widths", {})
    shapes = {name: [n if a in cuts[name] else None for a, n in enumerate(smaller[name].shape)] for name in cuts}
    widths = {
        "shapes": before.get("shapes", {}) | {name: _merged(before, name, shape) for name, shape in shapes.items()},
        "numbers": before.get("numbers", {}) | dict(numbers),
    }
    copy = narrow(deepcopy(model), {"shapes": shapes, "numbers": numbers})
    copy.load_state_dict(smaller)
    if getattr(model, "output_fmt", "NCHW") == "NCHW":
        with evaluating(copy):
            features = feature_channels(copy, image)
        if before.get("features") or features != [info["num_chs"] for info in feature_info(model)]:
            widths["features"] = features
            set_features(copy, features, ends(model))
    copy.widths = widths  # type: ignore[assignment]  # nn.Module declares all attributes Tensor | Module
    _remember(copy)
    return copy


def _remember(model: nn.Module) -> None:
    """Record what timm needs to build the model again; timm's own families have no argument `widths`."""
    update_model_args(model, widths=model.widths)
    made_from = getattr(model, "pretrained_cfg", None)
    if made_from is None or isinstance(getattr(type(model), "prunable", None), Prunable):
        return
    if made_from["architecture"] != narrowed.__name__:
        update_model_args(model, of=made_from["architecture"])
        set_pretrained_cfg(model, {**made_from, "architecture": narrowed.__name__})


def _merged(before: Mapping[str, Any], name: str, shape: list[int | None]) -> list[int | None]:
    """Keep the sizes of an earlier cut on axes that this cut does not change."""
    earlier = before.get("shapes", {}).get(name, [None] * len(shape))
    return [old if new is None else new for new, old in zip(shape, earlier, strict=True)]


def _select(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    for axis, kept in axes.items():
        tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor
