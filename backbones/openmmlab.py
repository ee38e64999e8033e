"""Backbones for mmdet, mmseg, mmpose and other packages of OpenMMLab, through MMEngine's registry.

A config imports this file and names the class; nothing else of those packages, and no compiled mmcv, is needed here:

    custom_imports = dict(imports=["foveate.backbones.openmmlab"])
    model = dict(backbone=dict(type="FoveateBackbone", name="nat_mini", pretrained=True), neck=dict(in_channels=[...]))
"""

from collections.abc import Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from .._timm import FeatureGetterNet, feature_info


@MODELS.register_module()
class FoveateBackbone(BaseModule):
    """The feature maps of any timm model, ours or timm's.

    Args:
        name: timm model name.
        out_indices: stages whose maps are returned, from fine to coarse.
        pretrained: load the weights that timm knows for the name; `pretrained_cfg_overlay=dict(file=...)` names a file.
        frozen_stages: stages whose parameters do not train, with the stem; 0: none.
        norm_eval: BatchNorms use their running statistics in training too.
        keywords: arguments of the model.

    Raises:
        ValueError: more frozen stages than the model has.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        *,
        pretrained: bool = False,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        init_cfg: Any = None,
        **keywords: Any,
    ) -> None:
        super().__init__(init_cfg)
        self.net = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=tuple(out_indices), **keywords
        )
        self.norm_eval = norm_eval
        stages = [info["module"] for info in feature_info(self.net)]
        if not 0 <= frozen_stages <= len(stages):
            raise ValueError(f"frozen_stages must be 0 to {len(stages)}, the stages of {name}, got {frozen_stages}")
        inner = self.net.model if isinstance(self.net, FeatureGetterNet) else self.net
        self._frozen = [] if frozen_stages == 0 else _modules_up_to(inner, stages[frozen_stages - 1])
        for module in self._frozen:
            module.requires_grad_(False)

    @property
    def channels(self) -> list[int]:
        """Channels of the returned maps, for the neck's in_channels."""
        return list(self.net.feature_info.channels())  # type: ignore[union-attr, operator]  # FeatureInfo of timm

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> maps (B, channels, H / reduction, W / reduction), from fine to coarse."""
        return tuple(self.net(x))

    def init_weights(self) -> None:
        """Keep timm's weights, unless init_cfg asks for others."""
        if self.init_cfg is not None:
            super().init_weights()
        self._is_init = True

    def train(self, mode: bool = True) -> "FoveateBackbone":
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                    module.eval()
        for module in self._frozen:
            module.eval()
        return self


def _modules_up_to(net: nn.Module, last: str) -> list[nn.Module]:
    """Return the modules registered before `last` or inside it, without those that also hold later ones."""
    names = [name for name, _ in net.named_modules()]
    end = max(i for i, name in enumerate(names) if name == last or name.startswith(f"{last}."))
    early = set(names[: end + 1])
    inside = {name: [n for n in names if n == name or n.startswith(f"{name}.")] for name in early - {""}}
    return [net.get_submodule(name) for name, parts in inside.items() if early.issuperset(parts)]
