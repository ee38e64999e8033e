"""What pruning asks of a backbone: a declaration of its weights and heads, and a model built narrower.

A family declares which weights do what and how its attention lays out the heads (`Prunable`). All patterns are regular
expressions that must match a whole parameter or module name of the timm model.

A model whose layers lost channels or heads is built again from `widths`, plain data that lies in a saved model's
`model_args`:
    shapes     parameter or buffer name -> its shape, of all that differ from the full model; None: as the model has it
               (the rows of a classifier follow num_classes)
    numbers    attribute -> its value, such as "stages.0.blocks.1.attn.heads": 1
    features   channels of each map in `feature_info`; only where they differ
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._timm import feature_info

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Projection:
    """A linear layer or 1x1 convolution whose rows belong to heads."""

    layer: str  # inside the attention module
    roles: tuple[str, ...] = ("q", "k", "v")  # what the rows hold
    head_major: bool = False  # rows lie (heads, roles, channels) instead of (roles, heads, channels)


@dataclass(frozen=True)
class AttentionLayout:
    """Where an attention module keeps its heads."""

    modules: str
    kind: str | None = None  # only modules of the class with this name
    projections: tuple[Projection, ...] = (Projection("qkv"),)
    out: str | None = "proj"  # the layer that reads the heads' outputs; None: whoever reads the module
    heads: str = "heads"  # the attribute that counts them
    per_head: tuple[tuple[str, int], ...] = ()  # (parameter, axis) with one entry a head
    per_value: tuple[str, ...] = ()  # depthwise convolutions of v
    per_query: tuple[tuple[str, int], ...] = ()  # (parameter, axis) along the q and k channels, shared by the heads
    widths: tuple[tuple[str, str], ...] = ()  # (attribute, role): channels of a head that the module keeps as a number
    value_widths: tuple[str, ...] = ()  # attributes that keep heads * channels of v
    cuts_heads: bool = True  # False: something else reads or adds to the heads' outputs channel by channel
    kept: str | None = None  # the attribute that tells which heads of the full model are left: bit i for head i
    unless: tuple[tuple[str, str], ...] = ()  # (attribute, reason): where it is set, nothing is cut
    cuts_channels: bool = True  # False: channels of q, k, v are normalized or mixed with each other


@dataclass(frozen=True)
class Prunable:
    """The module groups of a family (weights by what they do; None: has none), and its attention modules."""

    qkv: str | None = None  # projections to queries, keys and values
    prj: str | None = None  # output projections of attention
    mlp: str | None = None  # both layers of the MLPs
    conv: str | None = None  # convolutions that mix channels inside residual branches
    depthwise: str | None = None
    gate: str | None = None  # channel and spatial gates, such as squeeze-and-excitation
    attentions: tuple[AttentionLayout, ...] = ()
    glu: str | None = None  # gated units: fc1 writes gates, then values; dwconv reads gates; fc2 reads their products
    square: str | None = None  # modules all of whose convolutions map one width to itself, channel i to a gate of i


KEYS = ("shapes", "numbers", "features")


def narrow(model: M, widths: Mapping[str, Any]) -> M:
    """Cut the model's tensors to `widths`, in place: the leading entries of each axis stay.

    Layers keep their promise: in_features, out_channels, groups and the like follow the new shapes.

    Raises:
        ValueError: `widths` names what the model does not have, or is wider than it.
    """
    if strange := [key for key in widths if key not in KEYS]:
        raise ValueError(f"widths: unknown {strange[0]!r}; known: {', '.join(KEYS)}")
    before = ends(model)
    for name, shape in widths.get("shapes", {}).items():
        _shrink(model, name, shape)
    for name, number in widths.get("numbers", {}).items():
        module, attribute = _owner(model, name)
        if not isinstance(getattr(module, attribute, None), int):
            raise ValueError(f"widths: the model has no number {name}")
        setattr(module, attribute, int(number))
    set_features(model, widths.get("features", ()), before)
    kept = {key: dict(v) if isinstance(v, Mapping) else list(v) for key, v in widths.items()}
    model.widths = kept  # type: ignore[assignment]  # nn.Module declares all attributes Tensor | Module
    return model


def _shrink(model: nn.Module, name: str, shape: Sequence[int | None]) -> None:
    module, attribute = _owner(model, name)
    tensor = getattr(module, attribute, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"widths: the model has no tensor {name}")
    sizes = [old if new is None else new for new, old in zip(shape, tensor.shape, strict=False)]
    if len(shape) != tensor.dim() or any(not 0 < new <= old for new, old in zip(sizes, tensor.shape, strict=True)):
        raise ValueError(f"widths: {name} is {tuple(tensor.shape)}, which cannot be cut to {tuple(shape)}")
    part = tensor.detach()[tuple(slice(size) for size in sizes)].clone()
    if isinstance(tensor, nn.Parameter):
        setattr(module, attribute, nn.Parameter(part, requires_grad=tensor.requires_grad))
    else:
        setattr(module, attribute, part)
    if attribute in ("weight", "running_mean"):
        _restate(module)


def _restate(module: nn.Module) -> None:
    """Let a layer's numbers say what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:  # depthwise: the only grouped convolution that is ever cut
            module.groups = module.in_channels = module.out_channels = module.weight.shape[0]
        else:
            module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)


def ends(model: nn.Module) -> tuple[int, int]:
    """Channels of the last map, and of what the classifier reads (the same in most nets)."""
    classifier = model.get_classifier()  # type: ignore[operator]
    last = feature_info(model)[-1]["num_chs"]
    return last, classifier.in_features if isinstance(classifier, nn.Linear) else last


def set_features(model: nn.Module, features: Sequence[int], before: tuple[int, int]) -> None:
    if not features:
        return
    maps = feature_info(model)
    if len(features) != len(maps):
        raise ValueError(f"widths: features must hold {len(maps)} numbers, got {len(features)}")
    for info, channels in zip(maps, features, strict=True):
        info["num_chs"] = int(channels)
    renamed = dict(zip(before, ends(model), strict=True))
    for owner in (model, getattr(model, "head", None)):
        for attribute in ("num_features", "head_hidden_size", "in_features"):
            number = None if isinstance(owner, nn.Linear) else getattr(owner, attribute, None)
            if number in renamed and attribute in vars(owner):
                setattr(owner, attribute, renamed[number])


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    try:
        return model.get_submodule(path), attribute
    except AttributeError as error:
        raise ValueError(f"widths: the model has no module {path}") from error


@torch.no_grad()
def feature_channels(model: nn.Module, image: Tensor) -> list[int]:
    """Return the channels of each map in `feature_info`, measured on an image; maps are (B, C, H, W)."""
    seen: dict[str, int] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        return model.get_submodule(name).register_forward_hook(
            lambda _, __, out: (
                seen.__setitem__(name, out.shape[1]) if isinstance(out, Tensor) and out.dim() == 4 else None
            )
        )

    handles = [watch(info["module"]) for info in feature_info(model)]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return [seen.get(info["module"], info["num_chs"]) for info in feature_info(model)]
