"""Any of timm's own models, cut narrower: what a pruned Swin, ViT, ConvNeXt or ResNet is built from again.

Our families take `widths=` themselves; timm's do not, and this name stands in for theirs in a saved model's config:
`timm.create_model("narrowed", of="swin_tiny_patch4_window7_224", widths={...})`.
"""

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import generate_default_cfgs, is_model, register_model, split_model_name_tag
from torch import nn

from ._build import build_features, cfg
from ._pruning import narrow

default_cfgs = generate_default_cfgs({"narrowed.untrained": cfg(notes=("Takes of= and widths=.",))})


@register_model
def narrowed(pretrained: bool = False, of: str = "", widths: Mapping[str, Any] | None = None, **kwargs) -> nn.Module:
    """A timm model of another name, narrower.

    Args:
        of: the name of the full model; other keywords go to it.
        widths: what differs from the full model, see _pruning.py.

    Raises:
        ValueError: one of the two is missing, `of` is no registered name (a folder or a download, for example), or
            `widths` does not fit the model.
    """
    if of and not is_model(split_model_name_tag(of)[0]):
        raise ValueError(f"narrowed: of= wants a timm model name, got {of!r}")
    if not of or widths is None:
        raise ValueError(f"narrowed: wants of= (a timm model name) and widths=, got {of!r} and {widths!r}")

    def make(**arguments: Any) -> nn.Module:
        return narrow(timm.create_model(of, **arguments), widths)

    return build_features(make, "narrowed", pretrained, **kwargs)
