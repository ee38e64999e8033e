"""DiNAT and DiNAT_s: NAT with every other layer dilated; DiNAT_s in the frame of Swin.

Paper      Hassani, Shi 2022, arXiv:2209.15001.
Official   https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT); its checkpoints load as they are.
Dilation   keys of a dilated layer reach the whole map at the size that the model was made for (8 * 7 = 56 tokens in
           stage 1 at 224); at smaller sizes such layers pad their map, see `NeighborhoodAttention2d`.
"""

from dataclasses import replace

from timm.models import generate_default_cfgs, register_model

from ._build import cfg
from .nat import NAT, URL, Nat, NatConfig, create_nat

AT_224 = ((1, 8), (1, 4), (1, 2), (1,))
AT_384 = ((1, 13), (1, 6), (1, 3), (1,))

DINAT = {**NAT, "paper_ids": "arXiv:2209.15001", "paper_name": "Dilated Neighborhood Attention Transformer"}
DINAT_S = {**DINAT, "first_conv": "stem.proj"}
BIG = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
# The class count of the 22k heads is published nowhere: these weights load as backbones, without the classifier.
BODY = {"num_classes": 0}


def _in1k(name: str) -> str:
    return f"{URL}/dinat/checkpoints/imagenet1k/{name}.pth"


def _in22k(name: str) -> str:
    return f"{URL}/dinat/checkpoints/imagenet22k/{name}.pth"


default_cfgs = generate_default_cfgs(
    {
        "dinat_mini.in1k": cfg(_in1k("dinat_mini_in1k_224"), **DINAT),
        "dinat_tiny.in1k": cfg(_in1k("dinat_tiny_in1k_224"), **DINAT),
        "dinat_small.in1k": cfg(_in1k("dinat_small_in1k_224"), **DINAT),
        "dinat_base.in1k": cfg(_in1k("dinat_base_in1k_224"), **DINAT),
        "dinat_large.in22k_ft_in1k": cfg(_in1k("dinat_large_in22k_in1k_224"), **DINAT),
        "dinat_large.in22k": cfg(_in22k("dinat_large_in22k_224"), **DINAT, **BODY),
        "dinat_large_384.in22k_ft_in1k": cfg(_in1k("dinat_large_in22k_in1k_384"), **DINAT, **BIG),
        "dinat_large_384_11x11.in22k_ft_in1k": cfg(_in1k("dinat_large_in22k_in1k_384_11x11"), **DINAT, **BIG),
        "dinat_large_384_11x11.in22k_interp": cfg(_in22k("dinat_large_in22k_224_11x11interp"), **DINAT, **BIG, **BODY),
        "dinat_s_tiny.in1k": cfg(_in1k("dinat_s_tiny_in1k_224"), **DINAT_S),
        "dinat_s_small.in1k": cfg(_in1k("dinat_s_small_in1k_224"), **DINAT_S),
        "dinat_s_base.in1k": cfg(_in1k("dinat_s_base_in1k_224"), **DINAT_S),
        "dinat_s_large.in22k_ft_in1k": cfg(_in1k("dinat_s_large_in1k_224"), **DINAT_S),
        "dinat_s_large.in22k": cfg(_in22k("dinat_s_large_in22k_224"), **DINAT_S, **BODY),
        "dinat_s_large_384.in22k_ft_in1k": cfg(_in1k("dinat_s_large_in1k_384"), **DINAT_S, **BIG),
    }
)

MINI = NatConfig(dilations=AT_224)
TINY = replace(MINI, depths=(3, 4, 18, 5))
SMALL = replace(TINY, dims=(96, 192, 384, 768), mlp_ratio=2.0)
BASE = replace(SMALL, dims=(128, 256, 512, 1024), layer_scale=1e-5)
LARGE = replace(SMALL, dims=(192, 384, 768, 1536))

S_TINY = NatConfig(
    dims=(96, 192, 384, 768),
    depths=(2, 2, 6, 2),
    dilations=AT_224,
    mlp_ratio=4.0,
    patch_size=4,
    downsample="merge",
)
S_SMALL = replace(S_TINY, depths=(2, 2, 18, 2))
S_BASE = replace(S_SMALL, dims=(128, 256, 512, 1024))
S_LARGE = replace(S_SMALL, dims=(192, 384, 768, 1536))


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT-Mini, 20.0 M parameters, 2.7 GMACs at 224."""
    return create_nat("dinat_mini", MINI, pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT-Tiny, 27.9 M parameters, 4.3 GMACs at 224."""
    return create_nat("dinat_tiny", TINY, pretrained, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT-Small, 50.7 M parameters, 7.8 GMACs at 224. No layer scale, unlike NAT-Small."""
    return create_nat("dinat_small", SMALL, pretrained, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT-Base, 89.8 M parameters, 13.7 GMACs at 224."""
    return create_nat("dinat_base", BASE, pretrained, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT-Large, 200.9 M parameters, 30.6 GMACs at 224."""
    return create_nat("dinat_large", LARGE, pretrained, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT-Large with the dilations of 384 pixels, 89.7 GMACs there."""
    return create_nat("dinat_large_384", replace(LARGE, dilations=AT_384), pretrained, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT-Large with 11x11 kernels and the dilations of 224 pixels, 92.4 GMACs at 384."""
    return create_nat("dinat_large_384_11x11", replace(LARGE, kernel_size=11), pretrained, **kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT_s-Tiny, 28.3 M parameters, 4.5 GMACs at 224."""
    return create_nat("dinat_s_tiny", S_TINY, pretrained, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT_s-Small, 49.6 M parameters, 8.7 GMACs at 224."""
    return create_nat("dinat_s_small", S_SMALL, pretrained, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT_s-Base, 87.8 M parameters, 15.4 GMACs at 224."""
    return create_nat("dinat_s_base", S_BASE, pretrained, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT_s-Large, 196.5 M parameters, 34.5 GMACs at 224."""
    return create_nat("dinat_s_large", S_LARGE, pretrained, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> Nat:
    """DiNAT_s-Large with the dilations of 384 pixels, 101.5 GMACs there."""
    return create_nat("dinat_s_large_384", replace(S_LARGE, dilations=AT_384), pretrained, **kwargs)
