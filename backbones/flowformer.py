"""Flowformer: a pyramid of plain blocks with Flow-Attention, linear in the number of tokens.

Paper      Wu et al. 2022, arXiv:2202.06258, the vision model.
Official   https://github.com/thuml/Flowformer (MIT), folder Flowformer_CV; its checkpoints load as they are.
We differ  down-sampling opens a stage here and is a list of its own there. Images need not be square: `img_size` may be
           a pair (height, width), and the table of positions is resampled from the grid of the weights.
Layout     maps are (B, H, W, C) inside; every stage has 12 heads.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import DropPath, Mlp, resample_abs_pos_embed, to_2tuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops.flow import FlowAttention2d
from ._build import StateDict, build, cfg, check_fits
from ._layers import layer_scale, scaled, to_channels_last, to_nchw, to_nhwc
from ._pruning import AttentionLayout, Prunable
from ._staged import Stage, StageConfig, StagedBackbone

register_notrace_module(FlowAttention2d)


@dataclass(frozen=True)
class FlowformerConfig(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels, per stage
    depths: tuple[int, ...] = (3, 3, 10, 3)  # blocks, per stage
    heads: int = 12  # in every stage
    mlp_ratio: float = 4.0
    layer_scale: float | None = 1e-3  # initial value, on the MLP's branch only; None: no layer scale
    image: tuple[int, int] = (224, 224)  # px; set by img_size

    def __post_init__(self) -> None:
        super().__post_init__()
        if odd := [d for d in self.dims if d % self.heads]:
            raise ValueError(f"dims must be multiples of heads {self.heads}, got {odd}")
        least = self.reductions[-1]
        if any(px < least or px % least for px in self.image):
            raise ValueError(f"img_size must be multiples of {least} px, got {self.image}")


@register_notrace_module
class PositionedStem(nn.Module):
    """4x4 convolution of stride 4 and a learned vector for each place: (B, 3, H, W) -> (B, H/4, W/4, C), one size."""

    def __init__(self, in_chans: int, dim: int, image: tuple[int, int], device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.image = list(image)
        self.proj = nn.Conv2d(in_chans, dim, 4, 4, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, image[0] // 4, image[1] // 4, dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != self.image[0] or x.shape[3] != self.image[1]:
            raise ValueError(
                f"Flowformer: this model takes images of {self.image[0]} x {self.image[1]} px (img_size), "
                f"got {x.shape[2]} x {x.shape[3]}"
            )
        return to_nhwc(self.proj(to_channels_last(x))) + self.pos_embed


class PatchDownsample(nn.Module):
    """2x2 convolution of stride 2: (B, H, W, C) -> (B, H/2, W/2, D)."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 2, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return to_nhwc(self.proj(to_nchw(x)))


class FlowformerBlock(nn.Module):
    def __init__(self, dim: int, config: FlowformerConfig, drop: float, drop_path: float, **dd) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = FlowAttention2d(dim, config.heads, proj_drop=drop, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), drop=drop, **dd)
        self.gamma = layer_scale((dim,), config.layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma))


class Flowformer(StagedBackbone):
    """Flow-Attention backbone for images of one size; maps are (B, H, W, C) inside.

    Args:
        config: sizes and kinds of layers.
        img_size: of the images, in pixels, one number or (height, width); multiples of the last stage's reduction.
        kwargs: of StagedBackbone.
    """

    output_fmt = "NHWC"

    prunable = Prunable(
        qkv=r".+\.attn\.qkv\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        attentions=(
            # a sigmoid of zero is 0.5: channels of heads without weights still count
            AttentionLayout(r".+\.attn", heads="num_heads", cuts_channels=False),
        ),
    )

    def __init__(self, config: FlowformerConfig, img_size: int | tuple[int, int] = 224, **kwargs) -> None:
        super().__init__(replace(config, image=to_2tuple(img_size)), **kwargs)
        nn.init.trunc_normal_(self.stem.pos_embed, std=0.02)  # type: ignore[arg-type]

    def make_stem(self, config: FlowformerConfig, in_chans: int, **dd) -> nn.Module:
        return PositionedStem(in_chans, config.dims[0], config.image, **dd)

    def make_stage(self, config: FlowformerConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim = config.dims[index]
        return Stage(
            PatchDownsample(config.dims[index - 1], dim, **dd) if index else nn.Identity(),
            [FlowformerBlock(dim, config, drop, rate, **dd) for rate in drop_paths],
        )

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.LayerNorm(dim, eps=1e-6, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"stem.pos_embed"}

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on; the table of positions is resampled.

        Raises:
            ValueError: the size is no multiple of the last stage's reduction.
        """
        height, width = to_2tuple(img_size)
        if any(px < self.stride_px or px % self.stride_px for px in (height, width)):
            raise ValueError(f"img_size must be multiples of {self.stride_px} px, got {(height, width)}")
        stem: Any = self.stem
        table = resample_table(stem.pos_embed.detach(), (height // 4, width // 4))
        stem.pos_embed = nn.Parameter(table, requires_grad=stem.pos_embed.requires_grad)
        stem.image = [height, width]


def resample_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, H, W, C) -> (1, *size, C), bicubic, as timm resamples the tables of ViTs."""
    own = list(table.shape[1:3])
    if own == list(size):
        return table
    tokens = resample_abs_pos_embed(table.flatten(1, 2), list(size), own, num_prefix_tokens=0)
    return tokens.unflatten(1, size)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official Flowformer checkpoint; ours pass through.

    The table of positions is resampled where the model takes images of another size. An official table is square.

    Raises:
        ValueError: the weights are another model's.
    """
    state_dict = {
        _our_key(key): value
        for key, value in unwrap(checkpoint).items()
        if not key.endswith(("total_ops", "total_params"))  # left by a counter of operations
    }
    name = "stem.pos_embed"
    if name in state_dict:
        table, own = state_dict[name], model.state_dict()[name]
        side = math.isqrt(table.shape[1]) if table.dim() == 3 else 0
        if side and side**2 == table.shape[1]:
            table = table.unflatten(1, (side, side))
        if table.dim() == 4 and table.shape[-1] == own.shape[-1]:
            table = resample_table(table, (own.shape[1], own.shape[2]))
        state_dict[name] = table
    return check_fits(state_dict, model)


def _our_key(key: str) -> str:
    key = re.sub(r"^pos_embed$", "stem.pos_embed", key)
    key = re.sub(r"^patch_embed\.0\.", "stem.", key)
    key = re.sub(r"^patch_embed\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


default_cfgs = generate_default_cfgs(
    {
        # no `url`: the share is a page, not a file
        "flowformer_cv.untrained": cfg(
            fixed_input_size=True,
            first_conv="stem.proj",
            license="mit",
            paper_ids="arXiv:2202.06258",
            paper_name="Flowformer: Linearizing Transformers with Conservation Flows",
            origin_url="https://github.com/thuml/Flowformer",
            notes=(
                "The authors' share: https://cloud.tsinghua.edu.cn/d/82d93375f97f4ca58886. Load the file with "
                "pretrained=True, pretrained_cfg_overlay=dict(file=...).",
            ),
        )
    }
)


@register_model
def flowformer_cv(pretrained: bool = False, **kwargs) -> Flowformer:
    """Flowformer for vision, 43.3 M parameters, 6.9 GMACs at 224."""
    return build(Flowformer, FlowformerConfig(), "flowformer_cv", pretrained, checkpoint_filter_fn, **kwargs)
