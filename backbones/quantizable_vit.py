"""Quantizable ViT: attention heads that can do nothing, so that activations have no outliers and int8 loses little.

Paper      Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929.
Official   https://github.com/Qualcomm-AI-research/outlier-free-transformers (BSD-3-Clause-Clear): attention, softmax
           and quantizer. The authors published neither their ViT nor weights; around the attention this is timm's
           ViT, with timm's keys and `attn.alpha` for gates. Weights of timm's vit_*_patch16_224 load.
Patch norm the paper adds a LayerNorm after the patch embedding and does not print where; here it is timm's
           `patch_embed.norm`, before class token and positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import nn

from .._weights import unwrap
from ..attention_ops._clip import read_clip
from ..attention_ops.gated import GatedAttention, check_gate_options
from ._build import StateDict, cfg, check_fits
from ._pruning import AttentionLayout, Prunable
from ._vit import CheckedViT, ViTBlock, ViTConfig, at_the_models_size, build_vit, with_own

register_notrace_module(GatedAttention)


@dataclass(frozen=True)
class QuantizableViTConfig(ViTConfig):
    """What makes one variant differ from another."""

    softmax_clip: tuple[float, float] | str | None = None  # (gamma, zeta), or a name as "clipped(-.003:1)"
    clip_alpha: float | None = None  # gamma = -clip_alpha / tokens at img_size, class token included
    gate: str | None = None  # "linear", "mlp", "mlp2", "all", "per_head", "unconditional"
    gate_init: float = 0.5  # of linear and per_head gates
    gate_finetune: bool = False  # start from weights without gates
    patch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        read_clip("quantizable_vit", self.softmax_clip, self.clip_alpha, tokens=1)
        check_gate_options(self.gate, self.gate_init, self.gate_finetune)


def _make_block(
    index: int, *, config: QuantizableViTConfig, grid: tuple[int, int], proj_drop: float, drop_path: float, **dd
) -> ViTBlock:
    attention = GatedAttention(
        config.embed_dim,
        config.num_heads,
        map_size=grid,
        prefix_tokens=1,
        qkv_bias=config.qkv_bias,
        softmax_clip=config.softmax_clip,
        clip_alpha=config.clip_alpha,
        gate=config.gate,
        gate_init=config.gate_init,
        gate_finetune=config.gate_finetune,
        proj_drop=proj_drop,
        **dd,
    )
    return ViTBlock(attention, config.embed_dim, config.mlp_ratio, proj_drop=proj_drop, drop_path=drop_path, **dd)


class QuantizableViT(CheckedViT):
    """timm's ViT with a clipped softmax, gated attention, or both.

    Args:
        config: sizes, clipping, gates.
        img_size: px; with clip_alpha its tokens decide gamma, which does not follow the input.
        kwargs: as in `CheckedViT`.
    """

    prunable = Prunable(
        qkv=r"blocks\.\d+\.attn\.qkv\.weight",
        prj=r"blocks\.\d+\.attn\.proj\.weight",
        mlp=r"blocks\.\d+\.mlp\.fc[12]\.weight",
        attentions=(
            AttentionLayout(
                r"blocks\.\d+\.attn",
                heads="num_heads",
                unless=(("alpha", "its gates read the channels of all heads"),),
            ),
        ),
    )

    def __init__(self, config: QuantizableViTConfig, img_size: int | tuple[int, int] = 224, **kwargs: Any) -> None:
        make = partial(_make_block, config=config, grid=config.grid(img_size))
        super().__init__(config, make, img_size=img_size, patch_norm=config.patch_norm, **kwargs)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Take weights of this model, or of timm's ViT; gates that a file does not have keep their first values.

    Position embeddings of another image size are resampled.

    Raises:
        ValueError: the weights are another model's.
    """
    state_dict = unwrap(checkpoint)
    return check_fits(with_own(at_the_models_size(state_dict, model), model, ".attn.alpha"), model)


QUANTIZABLE: dict[str, Any] = {
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "pool_size": None,
    "paper_ids": "arXiv:2306.12929",
    "paper_name": "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
    "origin_url": "https://github.com/Qualcomm-AI-research/outlier-free-transformers",
}
default_cfgs = generate_default_cfgs(
    {f"quantizable_vit_{size}.untrained": cfg(**QUANTIZABLE) for size in ("tiny", "small", "base")}
)
SMALL = QuantizableViTConfig()


def _create(variant: str, config: QuantizableViTConfig, pretrained: bool, **kwargs) -> QuantizableViT:
    return build_vit(QuantizableViT, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def quantizable_vit_tiny(pretrained: bool = False, **kwargs) -> QuantizableViT:
    """Quantizable ViT-Ti/16, 5.7 M parameters, 1.3 GMACs at 224; plain attention unless clip or gate are given."""
    return _create("quantizable_vit_tiny", replace(SMALL, embed_dim=192, num_heads=3), pretrained, **kwargs)


@register_model
def quantizable_vit_small(pretrained: bool = False, **kwargs) -> QuantizableViT:
    """Quantizable ViT-S/16, the paper's model, 22.1 M parameters, 4.6 GMACs at 224."""
    return _create("quantizable_vit_small", SMALL, pretrained, **kwargs)


@register_model
def quantizable_vit_base(pretrained: bool = False, **kwargs) -> QuantizableViT:
    """Quantizable ViT-B/16, 86.6 M parameters, 17.6 GMACs at 224."""
    return _create("quantizable_vit_base", replace(SMALL, embed_dim=768, num_heads=12), pretrained, **kwargs)
