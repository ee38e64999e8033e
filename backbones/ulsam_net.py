"""ULSAM: MobileNets with ultra-lightweight subspace attention between, or in place of, some blocks.

Paper      Saini, Jha, Das, Mittal, Mohan 2020, arXiv:2006.15102.
Official   https://github.com/Nandan91/ULSAM (no license file): the layer; no networks, no weights, no recipe.
Layers     are counted from 1, the stem; every depthwise-separable or inverted-residual block is one more: 2 to 14 in
           MobileNetV1, 2 to 18 in MobileNetV2. `insert=(12,)` puts a gate behind layer 12, `replace=(14, 17)` puts
           gates in place of layers 14 and 17. Which layers the paper chose was derived from its counts of parameters
           and FLOPs.
Reuse      the networks are timm's EfficientNet with the layer in it; the keys of the other layers are timm's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._timm import DepthwiseSeparableConv, InvertedResidual
from .._weights import unwrap
from ..attention_ops import SubspaceAttention
from ..attention_ops.subspace_gate import merge_subspaces
from ._build import M, StateDict, build, cfg, check_fits
from ._pruning import Prunable
from ._timm_classes import MobileNetV1, MobileNetV2

register_notrace_module(SubspaceAttention)
FIRST_BLOCK = 2  # layer 1 is the stem


@dataclass(frozen=True)
class UlsamConfig:
    """What makes one variant differ from another. If one of insert and replace is given, the other is empty."""

    depths: tuple[int, ...] = (1, 2, 2, 6, 2)  # blocks, per stage
    groups: int = 4  # subspaces; must divide the channels of every layer that is named
    insert: tuple[int, ...] | None = None  # layers that a gate follows; None: as published for the variant
    replace: tuple[int, ...] | None = None  # layers that a gate replaces; None: as published for the variant


class GatedSeparable(DepthwiseSeparableConv):
    """timm's depthwise-separable block with a gate on its output."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        shortcut = x
        x = self.se(self.aa(self.bn1(self.conv_dw(x))))  # type: ignore[misc]
        x = self.bn2(self.conv_pw(x))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return self.ulsam(x)  # type: ignore[operator]


class GatedResidual(InvertedResidual):
    """timm's inverted residual with a gate on its output."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        shortcut = x
        x = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        x = self.bn3(self.conv_pwl(self.se(self.aa(x))))  # type: ignore[misc]
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return self.ulsam(x)  # type: ignore[operator]


GATED: dict[type, type] = {DepthwiseSeparableConv: GatedSeparable, InvertedResidual: GatedResidual}


@register_notrace_module
class GateInPlace(SubspaceAttention):
    """A gate that stands where a block was, with what timm asks of a block."""

    def __init__(self, channels: int, groups: int, **dd) -> None:
        super().__init__(channels, groups, **dd)
        self.channels = channels

    def feature_info(self, location: str) -> dict[str, Any]:
        """Return the channels of the map at a place that timm names: all places have the same here."""
        return {"module": "", "num_chs": self.channels, "hook_type": "forward_pre" if location == "expansion" else ""}


def place_gates(blocks: nn.Sequential, config: UlsamConfig, **dd) -> None:
    """Put the gates of a config into the stages of a MobileNet, in place.

    Raises:
        ValueError: a layer is not there, is named twice, cannot be replaced, or its channels have no such groups.
    """
    places: list[tuple[Any, int]] = [
        (stage, int(name)) for stage in blocks.children() for name, _ in stage.named_children()
    ]
    last = FIRST_BLOCK + len(places) - 1
    named = (*(config.insert or ()), *(config.replace or ()))
    if wrong := [layer for layer in named if not FIRST_BLOCK <= layer <= last]:
        raise ValueError(f"ulsam: insert, replace take layers {FIRST_BLOCK} to {last} (1: the stem), got {wrong[0]}")
    if twice := [layer for layer in named if named.count(layer) > 1]:
        raise ValueError(f"ulsam: layer {twice[0]} is named twice in insert and replace")
    for layer in named:
        stage, i = places[layer - FIRST_BLOCK]
        if layer in (config.replace or ()):
            stage[i] = _in_place_of(stage[i], layer, config.groups, **dd)
        else:
            stage[i].ulsam = SubspaceAttention(_channels(stage[i]), config.groups, **dd)
            stage[i].__class__ = GATED[type(stage[i])]


def _channels(block: Any) -> int:
    return block.conv_pw.out_channels if isinstance(block, DepthwiseSeparableConv) else block.conv_pwl.out_channels


def _in_place_of(block: Any, layer: int, groups: int, **dd) -> GateInPlace:
    of_input = block.conv_dw.in_channels if isinstance(block, DepthwiseSeparableConv) else block.conv_pw.in_channels
    channels, stride = _channels(block), block.conv_dw.stride[0]
    if stride != 1 or of_input != channels:
        changes = f"{of_input} channels into {channels} with stride {stride}"
        raise ValueError(f"ulsam: layer {layer} cannot be replaced, it turns {changes}")
    return GateInPlace(channels, groups, **dd)


class UlsamMobileNetV1(MobileNetV1):
    """MobileNetV1 with subspace attention.

    Args:
        config: depths, and where the gates are.
        drop_path_rate: must be 0: the network has no residual branches.
        kwargs: as in timm's EfficientNet.
    """

    prunable = Prunable(
        conv=r"blocks\..+\.conv_pw\.weight", depthwise=r".+\.conv_dws?\.weight", gate=r".+\.conv_point\.weight"
    )

    def __init__(self, config: UlsamConfig, drop_path_rate: float = 0.0, device=None, dtype=None, **kwargs) -> None:
        if drop_path_rate:
            raise ValueError(f"ulsam_mobilenetv1: no residual branches; drop_path_rate must be 0, got {drop_path_rate}")
        super().__init__(config.depths, device=device, dtype=dtype, **kwargs)
        place_gates(self.blocks, config, device=device, dtype=dtype)


class UlsamMobileNetV2(MobileNetV2):
    """MobileNetV2 with subspace attention.

    Args:
        config: depths, and where the gates are.
        kwargs: as in timm's EfficientNet.
    """

    prunable = Prunable(
        conv=r"blocks\..+\.conv_pwl?\.weight", depthwise=r".+\.conv_dws?\.weight", gate=r".+\.conv_point\.weight"
    )

    def __init__(self, config: UlsamConfig, device=None, dtype=None, **kwargs) -> None:
        super().__init__(config.depths, device=device, dtype=dtype, **kwargs)
        place_gates(self.blocks, config, device=device, dtype=dtype)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Join the authors' layers of one group each; ours pass through.

    Raises:
        ValueError: the weights are another model's.
    """
    return check_fits(merge_subspaces(unwrap(checkpoint)), model)


ULSAM: dict[str, Any] = {
    "first_conv": "conv_stem",
    "classifier": "classifier",
    "paper_ids": "arXiv:2006.15102",
    "paper_name": "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
    "origin_url": "https://github.com/Nandan91/ULSAM",
    "interpolation": "bilinear",
}
default_cfgs = generate_default_cfgs(
    {"ulsam_mobilenetv1.untrained": cfg(**ULSAM), "ulsam_mobilenetv2.untrained": cfg(**ULSAM)}
)

V1 = UlsamConfig(insert=(12,))
V2 = UlsamConfig(depths=(1, 2, 3, 4, 3, 3, 1), replace=(14, 17))


def _create(cls: type[M], variant: str, config: UlsamConfig, pretrained: bool, **kwargs) -> M:
    if kwargs.get("insert") is not None or kwargs.get("replace") is not None:
        config = replace(config, insert=None, replace=None)
    else:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("insert", "replace")}
    return build(cls, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def ulsam_mobilenetv1(pretrained: bool = False, **kwargs) -> UlsamMobileNetV1:
    """MobileNetV1 with a gate behind layer 12, 4 groups; 4.2 M parameters, 0.57 GMACs at 224."""
    return _create(UlsamMobileNetV1, "ulsam_mobilenetv1", V1, pretrained, **kwargs)


@register_model
def ulsam_mobilenetv2(pretrained: bool = False, **kwargs) -> UlsamMobileNetV2:
    """MobileNetV2 with gates in place of layers 14 and 17, 4 groups; 3.1 M parameters, 0.26 GMACs at 224."""
    return _create(UlsamMobileNetV2, "ulsam_mobilenetv2", V2, pretrained, **kwargs)
