"""A small ViT around any token mixer: a paper that is only a mixer becomes a backbone by one keyword.

    timm.create_model("mixer_vit_tiny", mixer="flow")
    timm.create_model("mixer_vit_tiny", mixer="circle", radius=6, down_factor=2)

Paper      Dosovitskiy et al. 2021, arXiv:2010.11929 (ViT); the position encoding by a convolution: Chu et al. 2021,
           arXiv:2102.10882. The mixers name their papers, see attention_ops/mixers.py.
We differ  there is no class token: the classifier reads the mean of the tokens. Every block counts as a stage.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import DropPath, Mlp, to_2tuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._errors import did_you_mean
from .._weights import unwrap
from ..attention_ops.mixers import MIXERS, create_mixer
from ._build import build, cfg, check_fits, last_three
from ._layers import pad_to_multiples, to_channels_last, to_nhwc
from ._pruning import Prunable
from ._staged import Stage, StageConfig, StagedBackbone

OF_MODEL = {"self", "dim", "num_heads", "map_size", "prefix_tokens", "proj_drop", "device", "dtype"}  # not of a mixer


@dataclass(frozen=True)
class MixerVitConfig(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (192,) * 12  # channels, the same in all blocks
    depths: tuple[int, ...] = (1,) * 12
    heads: int = 3
    mlp_ratio: float = 4.0
    patch_size: int = 16  # px
    img_size: int | tuple[int, int] = 224  # px, of the largest image, for mixers with tables of positions
    mixer: str = "attention"
    mixer_args: tuple[tuple[str, Any], ...] = ()  # keywords of the mixer

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.dims)) != 1 or self.dims[0] % self.heads:
            raise ValueError(f"dims must be one multiple of heads {self.heads}, got {self.dims}")

    @property
    def reductions(self) -> list[int]:
        """Image pixels per token, per block."""
        return [self.patch_size] * len(self.dims)

    @property
    def map_size(self) -> tuple[int, int]:
        height, width = to_2tuple(self.img_size)
        return -(-height // self.patch_size), -(-width // self.patch_size)


@register_notrace_module
class PatchStem(nn.Module):
    """One convolution per patch, and a depthwise 3x3 convolution that tells tokens where they are.

    The image is padded with zeros right and at the bottom to whole patches: (B, 3, H, W) -> (B, Y, X, C).
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(to_channels_last(pad_to_multiples(x, self.patch_size)))
        return to_nhwc(x + self.position(x))


@register_notrace_module
class ChannelsLastMixer(nn.Module):
    """A token mixer on channels-last maps."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        size = (x.shape[1], x.shape[2])
        return self.mixer(x.flatten(1, 2), size).unflatten(1, (size[0], size[1]))


class MixerBlock(nn.Module):
    def __init__(self, config: MixerVitConfig, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        dim, keywords = config.dims[0], dict(config.mixer_args)
        if "proj_drop" in inspect.signature(MIXERS[config.mixer]).parameters:
            keywords["proj_drop"] = drop
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = ChannelsLastMixer(
            create_mixer(config.mixer, dim, config.heads, map_size=config.map_size, **keywords, **dd)
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MixerVit(StagedBackbone):
    """A plain ViT with a token mixer; maps are (B, H, W, C) inside."""

    output_fmt = "NHWC"

    prunable = Prunable(
        qkv=r".+\.attn\.mixer\.qkv\.weight",
        prj=r".+\.attn\.mixer\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r"stem\.position\.weight",
    )

    def make_stem(self, config: MixerVitConfig, in_chans: int, **dd) -> nn.Module:
        return PatchStem(in_chans, config.dims[0], config.patch_size, **dd)

    def make_stage(self, config: MixerVitConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        return Stage(nn.Identity(), [MixerBlock(config, drop, rate, **dd) for rate in drop_paths])

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.LayerNorm(dim, eps=1e-6, **dd)


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Check that weights are this model's.

    Raises:
        ValueError: the weights are another model's.
    """
    return check_fits(dict(unwrap(checkpoint)), model)


VIT: dict[str, Any] = {
    "first_conv": "stem.proj",
    "pool_size": (14, 14),
    "paper_ids": "arXiv:2010.11929",
    "paper_name": "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    "origin_url": "https://github.com/google-research/vision_transformer",
}

default_cfgs = generate_default_cfgs({"mixer_vit_tiny.untrained": cfg(**VIT), "mixer_vit_small.untrained": cfg(**VIT)})

TINY = MixerVitConfig()
SMALL = MixerVitConfig(dims=(384,) * 12, heads=6)


def mixer_keywords(mixer: str) -> set[str]:
    """Return the keywords of a token mixer.

    Raises:
        ValueError: there is no mixer of that name.
    """
    if mixer not in MIXERS:
        near = did_you_mean(mixer, list(MIXERS))
        raise ValueError(f"mixer must be one of {', '.join(sorted(MIXERS))}, got {mixer!r}{near}")
    return set(inspect.signature(MIXERS[mixer]).parameters) - OF_MODEL


def _create(name: str, config: MixerVitConfig, pretrained: bool, /, **kwargs) -> MixerVit:  # "variant" is a mixer's
    mixer = kwargs.pop("mixer", config.mixer)
    taken = {key: kwargs.pop(key) for key in sorted(mixer_keywords(mixer) & kwargs.keys())}
    config = replace(config, mixer=mixer, mixer_args=tuple(taken.items()))
    shown = last_three(len(kwargs.get("dims") or config.dims))
    return build(
        MixerVit, config, name, pretrained, checkpoint_filter_fn, **{"out_indices": shown, **kwargs}
    )  # fmt: skip


@register_model
def mixer_vit_tiny(pretrained: bool = False, **kwargs) -> MixerVit:
    """A ViT-Tiny with any token mixer, 5.7 M parameters with plain attention.

    Args:
        kwargs: `mixer` names it ("attention", "flow", "circle", "routing", "nprf", ...); its keywords may be given too.
    """
    return _create("mixer_vit_tiny", TINY, pretrained, **kwargs)


@register_model
def mixer_vit_small(pretrained: bool = False, **kwargs) -> MixerVit:
    """A ViT-Small with any token mixer, 22.0 M parameters with plain attention.

    Args:
        kwargs: `mixer` names it ("attention", "flow", "circle", "routing", "nprf", ...); its keywords may be given too.
    """
    return _create("mixer_vit_small", SMALL, pretrained, **kwargs)
