"""Isotropic NAT and DiNAT, and their ViT baseline with relative position biases: 12 layers at one resolution.

Paper      Hassani, Shi 2022, arXiv:2209.15001, table on isotropic models.
Official   https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT); its checkpoints load as they are.
We differ  any image size runs (there: 224 only). Every layer counts as a stage, so that `features_only` can take any.
"""

from dataclasses import replace
from typing import Any

from timm.models import generate_default_cfgs, register_model

from ._build import cfg
from .dinat import DINAT_S
from .nat import URL, Nat, NatConfig, create_nat

ISOTROPIC = {**DINAT_S, "pool_size": (14, 14)}

default_cfgs = generate_default_cfgs(
    {
        f"{name}_{size}.in1k": cfg(f"{URL}/dinat/checkpoints/isotropic/{name}_{size}_in1k_224.pth", **ISOTROPIC)
        for name in ("nat_isotropic", "dinat_isotropic", "vitrpb")
        for size in ("small", "base")
    }
)

DEPTH = 12
SMALL = NatConfig(dims=(384,) * DEPTH, depths=(1,) * DEPTH, mlp_ratio=4.0, patch_size=16, downsample=None)
BASE = replace(SMALL, dims=(768,) * DEPTH)
DILATED = ((1,), (2,)) * (DEPTH // 2)
DENSE: dict[str, Any] = {"dense": True, "kernel_size": 14}
LAST_THREE = 3  # default features: all maps have one size


def _create(variant: str, config: NatConfig, pretrained: bool, **kwargs) -> Nat:
    return create_nat(variant, config, pretrained, **{"out_indices": LAST_THREE, **kwargs})


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> Nat:
    """Isotropic NAT-Small, 22.0 M parameters, 4.3 GMACs at 224."""
    return _create("nat_isotropic_small", SMALL, pretrained, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> Nat:
    """Isotropic NAT-Base, 86 M parameters, 16.9 GMACs at 224."""
    return _create("nat_isotropic_base", BASE, pretrained, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> Nat:
    """Isotropic DiNAT-Small: every other layer has dilation 2."""
    return _create("dinat_isotropic_small", replace(SMALL, dilations=DILATED), pretrained, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> Nat:
    """Isotropic DiNAT-Base: every other layer has dilation 2."""
    return _create("dinat_isotropic_base", replace(BASE, dilations=DILATED), pretrained, **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> Nat:
    """ViT-Small without class token, with relative position biases: 22.1 M parameters, 4.6 GMACs at 224."""
    return _create("vitrpb_small", replace(SMALL, **DENSE), pretrained, **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> Nat:
    """ViT-Base without class token, with relative position biases: 86 M parameters, 17.5 GMACs at 224."""
    return _create("vitrpb_base", replace(BASE, **DENSE), pretrained, **kwargs)
