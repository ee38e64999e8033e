"""What a new timm release can move, in one place: its private names, and the attributes that it sets on models."""

from typing import Any

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._input import update_model_args
from torch import nn

__all__ = [
    "DepthwiseSeparableConv",
    "FeatureGetterNet",
    "InvertedResidual",
    "SqueezeExcite",
    "decode_arch_def",
    "feature_info",
    "feature_take_indices",
    "pretrained_cfg",
    "set_pretrained_cfg",
    "update_model_args",
]


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return the model's pretrained_cfg, the dict itself; empty if it has none."""
    return getattr(model, "pretrained_cfg", None) or {}


def set_pretrained_cfg(model: nn.Module, cfg: dict[str, Any]) -> None:
    model.pretrained_cfg = cfg  # type: ignore[assignment]  # nn.Module declares all attributes Tensor | Module
    model.default_cfg = cfg  # type: ignore[assignment]


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """Return one dict per feature map, with num_chs, reduction and module."""
    return model.feature_info  # type: ignore[return-value]
