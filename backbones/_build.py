"""From a variant's config and keyword overrides to a timm model; from an official checkpoint to its weights."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer, build_model_with_cfg
from torch import Tensor, nn

from .._timm import FeatureGetterNet, feature_info
from ._pruning import narrow
from ._staged import check_indices

StateDict = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def cfg(url: str = "", **kwargs) -> dict[str, Any]:
    """A timm pretrained_cfg with the defaults that our families share."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **kwargs,
    }


def last_three(maps: int) -> int:
    """Default `out_indices` of a model whose feature maps, so many, all have one size."""
    return min(3, maps)


def frozen(value: Any) -> Any:
    """Lists (from JSON or a config file) as tuples, all the way down."""
    return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


class FeatureGetter(FeatureGetterNet):
    """timm's wrapper around a model that gives feature maps, with gradient checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]


def build_features(make: Callable[..., M], variant: str, pretrained: bool, **kwargs) -> M:
    """Build a model through timm, and with `features_only` the wrapper around it that gives feature maps.

    As in timm, the annotated type is that of the bare model.

    Args:
        make: builds the bare model.
        kwargs: as in timm's build_model_with_cfg. `out_indices` chooses the maps, all of them when None. `feature_cls`
            names timm's wrapper: "getter", the default, gives (B, C, H, W), the others the model's own layout.

    Raises:
        ValueError: `out_indices` chooses a map that the model does not have, or `feature_cls` takes maps from the
            modules of a ViT.
    """
    out_indices = kwargs.pop("out_indices", None)
    if not kwargs.get("features_only"):
        return build_model_with_cfg(make, variant, pretrained, **kwargs)
    wrapper = kwargs.pop("feature_cls", "getter")
    feature_cfg: dict[str, Any] = {"feature_cls": FeatureGetter if wrapper == "getter" else wrapper}

    def checked(**arguments: Any) -> M:
        model = make(**arguments)
        maps = [info["module"] for info in feature_info(model)]
        check_indices("out_indices", out_indices, len(maps))
        if wrapper != "getter" and isinstance(model, VisionTransformer):
            raise ValueError(
                f"feature_cls of {type(model).__name__} must be 'getter', got {wrapper!r}: blocks give tokens"
            )
        feature_cfg["out_indices"] = tuple(range(len(maps))) if out_indices is None else out_indices
        feature_cfg["flatten_sequential"] = any("." in module for module in maps)  # stages.0: inside a child
        return model  # timm reads feature_cfg after this

    return build_model_with_cfg(checked, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def build(
    cls: type[M],
    config: Any,
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[Mapping[str, Any], nn.Module], StateDict],
    **kwargs,
) -> M:
    """Build one variant through timm, with `features_only` giving NCHW maps.

    Args:
        config: the variant's frozen config; keyword arguments that name its fields replace them.
        filter_fn: turns a checkpoint's keys into ours.
        kwargs: what the model's constructor and timm know; anything else is a TypeError there. `widths` builds the
            model narrower, see _pruning.py. `out_indices`, `feature_cls`: see `build_features`.

    Raises:
        ValueError: the config contradicts itself, or `out_indices` chooses a map that the model does not have.
    """
    names = {f.name for f in fields(config)}
    changed = {name: frozen(kwargs.pop(name)) for name in names & kwargs.keys()}
    config = replace(config, **changed)
    widths = kwargs.pop("widths", None)

    def make(**arguments: Any) -> M:
        return cls(**arguments) if widths is None else narrow(cls(**arguments), widths)

    return build_features(make, variant, pretrained, config=config, pretrained_filter_fn=filter_fn, **kwargs)


SOURCES = ("file", "url", "state_dict", "hf_hub_id")


def names_weights(kwargs: Mapping[str, Any]) -> bool:
    """Say whether a builder's keywords name weights of the whole model: a file, a hub folder, or tensors."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay"):
        given = kwargs.get(name) or {}
        values = given if isinstance(given, Mapping) else vars(given) if hasattr(given, "__dict__") else {}
        if any(values.get(source) for source in SOURCES):
            return True
    return False


def check_fits(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Return `state_dict` if it is this model's, less a classifier that the model does not have.

    timm loads without strictness as soon as the number of classes differs; another model's weights must not pass.

    Raises:
        ValueError: keys are missing or unknown, or shapes differ (other than a classifier or input channels that timm
            adapts).
    """
    pretrained_cfg = getattr(model, "pretrained_cfg", None)
    names = (pretrained_cfg or {}).get("classifier", "head.fc")
    classifiers = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    if model.num_classes == 0:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(classifiers)}
    adapted = (pretrained_cfg or {}).get("first_conv", "") or "-"
    other_classes = pretrained_cfg is not None and model.num_classes != pretrained_cfg.get("num_classes")
    free = {k for k in (*state_dict, *model.state_dict()) if other_classes and k.startswith(classifiers)}
    want = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in free}
    have = {k: tuple(v.shape) for k, v in state_dict.items() if k not in free}
    wrong = [f"misses {k}" for k in want.keys() - have.keys() if not k.endswith("num_batches_tracked")]
    wrong += [f"has an unknown {k}" for k in have.keys() - want.keys()]
    for key in want.keys() & have.keys():
        shape = want[key][:1] + have[key][1:2] + want[key][2:] if key == f"{adapted}.weight" else want[key]
        if have[key] != shape:
            wrong.append(f"has {key} {have[key]}, not {want[key]}")
    if wrong:
        some = "; ".join(sorted(wrong)[:3])
        raise ValueError(f"{type(model).__name__}: not a checkpoint of this model: it {some} ({len(wrong)} in all)")
    return state_dict


def resize_rpb(table: Tensor, size: tuple[int, int]) -> Tensor:
    """(heads, rows, columns) -> (heads, *size), bicubic: how the authors made 11x11 kernels from 7x7 ones."""
    if tuple(table.shape[-2:]) == tuple(size):
        return table
    return F.interpolate(table[None].float(), size=size, mode="bicubic", align_corners=False)[0].to(table.dtype)
