"""Grouped-query ViT: a plain ViT in which several query heads share a key head.

Paper      Khan, Khaquan, Tafveez, Samiwala, Raza 2024, arXiv:2408.08454 (key-driven, dynamic and perturbed GQA).
Official   https://github.com/yjzhang0505/key-driven-gqa (MIT); its checkpoints load as they are. None is published.
Start      weights of a multi-head ViT of timm load too: keys and values of a group are the means over its heads. The
           final norm and a classifier that fits are kept; the authors' loader loses both.
Rules      see `GroupedQueryAttention`: per image by default, by the authors' sums over the batch with `per_batch=True`.
We differ  images of any size run; the position table is resampled. "noise" draws numbers in eval mode too, as there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint
from torch import Tensor

from .._weights import unwrap
from ..attention_ops import GroupedQueryAttention
from ..attention_ops.grouped_query import Allocation, check_groups, pooled_heads
from ._build import StateDict, cfg, check_fits
from ._pruning import Prunable
from ._vit import CheckedViT, ViTBlock, ViTConfig, build_vit

register_notrace_module(GroupedQueryAttention)  # it groups by numbers


@dataclass(frozen=True)
class GqaConfig(ViTConfig):
    """What makes one variant differ from another; num_heads are the query heads."""

    kv_heads: int = 3
    allocation: Allocation = "uniform"  # "key_norm" (KDGQA), "ema" and "difference" (DGQA), "noise" (PGQA)
    per_batch: bool = False  # group all images of a batch alike
    window: int = 10  # training steps between two updates of the dynamic rules

    def __post_init__(self) -> None:
        check_groups(self.embed_dim, self.num_heads, self.kv_heads, self.allocation, self.per_batch, self.window)
        super().__post_init__()


def _make_block(index: int, *, config: GqaConfig, proj_drop: float, drop_path: float, **dd: Any) -> ViTBlock:
    attention = GroupedQueryAttention(
        config.embed_dim,
        config.num_heads,
        config.kv_heads,
        allocation=config.allocation,
        per_batch=config.per_batch,
        window=config.window,
        qkv_bias=config.qkv_bias,
        proj_drop=proj_drop,
        **dd,
    )
    return ViTBlock(attention, config.embed_dim, config.mlp_ratio, proj_drop=proj_drop, drop_path=drop_path, **dd)


class GqaViT(CheckedViT):
    """A plain ViT of grouped-query attention.

    Args:
        config: sizes, and who shares key heads.
        kwargs: as in `CheckedViT`.
    """

    prunable = Prunable(qkv=r".+\.attn\.[qkv]\.weight", prj=r".+\.attn\.proj\.weight", mlp=r".+\.mlp\.fc[12]\.weight")

    def __init__(self, config: GqaConfig, **kwargs: Any) -> None:
        super().__init__(config, partial(_make_block, config=config), **kwargs)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: Any) -> StateDict:
    """Convert weights of a multi-head ViT (timm's keys), or of the authors' models; ours pass through.

    The position table is resampled to the model's number of patches (bicubic).

    Raises:
        ValueError: the weights are another model's, or kv_heads does not divide the heads that are to be averaged.
    """
    attention = model.blocks[0].attn
    state_dict: StateDict = {}
    for key, value in vit_checkpoint(unwrap(checkpoint), model).items():
        state_dict |= _converted(key, value, attention.heads, attention.kv_heads)
    counters = {key: value for key, value in model.state_dict().items() if ".attn.groups." in key}
    return check_fits({**counters, **state_dict}, model)


def _converted(key: str, value: Tensor, heads: int, kv_heads: int) -> StateDict:
    if (part := re.fullmatch(r"(.+\.attn\.)qkv(\.\w+)", key)) is None:
        return {re.sub(r"\.attn\.cache$", ".attn.groups.cache", key): value}
    if heads % kv_heads or value.shape[0] % (3 * heads):
        raise ValueError(
            f"gqa_vit: weights of {heads} heads are averaged by groups, which wants kv_heads that divides {heads} and "
            f"rows that are a multiple of {3 * heads}, got kv_heads={kv_heads} and {key} {tuple(value.shape)}"
        )
    q, k, v = value.chunk(3)
    pooled = {"q": q, "k": pooled_heads(k, heads, kv_heads), "v": pooled_heads(v, heads, kv_heads)}
    return {f"{part[1]}{name}{part[2]}": tensor for name, tensor in pooled.items()}


GQA: dict[str, Any] = {
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "pool_size": None,
    "crop_pct": 0.9,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "paper_ids": "arXiv:2408.08454",
    "paper_name": "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    "origin_url": "https://github.com/yjzhang0505/key-driven-gqa",
    "notes": (
        "The preprocessing is that of timm's vit_*_patch16_224, whose weights load, converted, through "
        "pretrained_cfg_overlay={'file': path}.",
    ),
}
default_cfgs = generate_default_cfgs(
    {f"gqa_vit_{size}.untrained": cfg(**GQA) for size in ("tiny", "small", "base", "large")}
)

SMALL = GqaConfig()


def _create_gqa(variant: str, config: GqaConfig, pretrained: bool, **kwargs) -> GqaViT:
    return build_vit(GqaViT, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def gqa_vit_tiny(pretrained: bool = False, **kwargs) -> GqaViT:
    """Grouped-query ViT-Tiny/16: 3 query heads share one key head; 5.1 M parameters, 1.1 GMACs at 224."""
    config = replace(SMALL, embed_dim=192, num_heads=3, kv_heads=1)
    return _create_gqa("gqa_vit_tiny", config, pretrained, **kwargs)


@register_model
def gqa_vit_small(pretrained: bool = False, **kwargs) -> GqaViT:
    """Grouped-query ViT-Small/16: 6 query heads, 3 key heads; 20.3 M parameters, 4.3 GMACs at 224."""
    return _create_gqa("gqa_vit_small", SMALL, pretrained, **kwargs)


@register_model
def gqa_vit_base(pretrained: bool = False, **kwargs) -> GqaViT:
    """Grouped-query ViT-Base/16: 12 query heads, 3 key heads; 75.9 M parameters, 15.5 GMACs at 224."""
    config = replace(SMALL, embed_dim=768, num_heads=12)
    return _create_gqa("gqa_vit_base", config, pretrained, **kwargs)


@register_model
def gqa_vit_large(pretrained: bool = False, **kwargs) -> GqaViT:
    """Grouped-query ViT-Large/16: 16 query heads, 4 key heads; 266.5 M parameters, 54.1 GMACs at 224."""
    config = GqaConfig(embed_dim=1024, depth=24, num_heads=16, kv_heads=4)
    return _create_gqa("gqa_vit_large", config, pretrained, **kwargs)
