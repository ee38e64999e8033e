"""BiFormer: vision transformer with bi-level routing attention.

Paper      Zhu, Wang, Ke, Zhang, Lau 2023, arXiv:2303.08810.
Official   https://github.com/rayleizhu/BiFormer (MIT); its checkpoints load as they are. Where a file holds `model` and
           `model_ema`, `model` is taken: the published accuracy is its.
We differ  any image size runs: maps are padded as the authors' `auto_pad` does, which their registered models leave off
           (they take multiples of 112 pixels only, on which nothing is padded).
Layout     channels-last on a CPU, by itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, load_state_dict, register_model, register_notrace_module
from torch import Tensor, nn

from .._timm import pretrained_cfg
from .._weights import unwrap
from ..attention_ops import BiLevelRoutingAttention, BiLevelRoutingAttentionNchw, window_attention
from ..attention_ops.bi_level_routing import RegionPool, Routing, lepe
from ..attention_ops.packed import unpack
from ._build import StateDict, build, cfg, check_fits
from ._layers import DepthwiseMlp, MapGELU, layer_scale, scaled, to_nchw, to_nhwc
from ._pruning import AttentionLayout, Prunable
from ._staged import Stage, StageConfig, StagedBackbone, check_stages

TopK = int | Literal["conv", "plain"] | None
USE_EMA = False  # the published accuracy is of `model`, where timm's loader would take `model_ema`

register_notrace_module(BiLevelRoutingAttention)  # they cut maps by their size
register_notrace_module(BiLevelRoutingAttentionNchw)


@dataclass(frozen=True)
class BiFormerConfig(StageConfig):
    """What makes one variant differ from another."""

    dims: tuple[int, ...] = (64, 128, 256, 512)  # channels, per stage
    depths: tuple[int, ...] = (2, 2, 8, 2)  # blocks, per stage
    # Regions that a region sees; None: every token sees all tokens; "plain": so too, but without attention's positional
    # convolution; "conv": 1x1, depthwise 5x5 and 1x1 convolutions in place of attention.
    topks: tuple[TopK, ...] = (1, 4, 16, None)
    regions: int = 7  # a side of the map
    head_dim: int = 32  # of routed attention
    dense_heads: int = 8  # of the stages where every token sees all
    mlp_ratio: float = 3.0
    mlp_conv: bool = False  # a depthwise 3x3 convolution inside the MLPs
    pos_conv: bool = True  # a depthwise 3x3 convolution at the head of every block
    pre_norm: bool = True  # norms before attention and MLP; False: after their residual sums
    layer_scale: float | None = None  # initial value; None: no layer scale
    swin_layout: bool = False  # 4x4 patches and 2x2 down-sampling (the authors' "STL")
    nchw: bool = False  # the authors' later code, which pads maps in another way
    # Options of the authors' attention that no published model uses; see BiLevelRoutingAttention.
    routing: Routing = "hard"
    qk_dims: tuple[int | None, ...] | None = None  # width of q and k, per stage; None: as dims
    kv_pool: Literal["avg", "max"] | None = None  # pool keys and values inside their regions
    kv_sizes: tuple[int, ...] | None = None  # tokens a side that pooling leaves of a region, per stage
    kv_strides: tuple[int, ...] | None = None  # or: side of the pooled windows in tokens, per stage; 1: no pooling

    per_stage = ("depths", "topks")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(
            self, [n for n in ("qk_dims", "kv_sizes", "kv_strides") if getattr(self, n) is not None], len(self.dims)
        )
        if self.kv_pool is None and (self.kv_sizes or self.kv_strides):
            raise ValueError("kv_sizes and kv_strides need kv_pool, 'avg' or 'max'")
        if self.kv_pool is not None and (self.kv_sizes is None) == (self.kv_strides is None):
            raise ValueError(f"kv_pool {self.kv_pool!r} needs one of kv_sizes and kv_strides")
        for dim, topk in zip(self.dims, self.topks, strict=True):
            if isinstance(topk, str) and topk not in ("plain", "conv"):
                raise ValueError(f"topks must be numbers, None, 'plain' or 'conv', got {topk!r}")
            name = "head_dim" if isinstance(topk, int) else "dense_heads"
            size = getattr(self, name)
            if topk != "conv" and (size < 1 or dim % size):
                raise ValueError(f"dims must be multiples of {name} {size}, got {dim}")
        words = any(isinstance(topk, str) for topk in self.topks)
        if self.nchw and (words or self.mlp_conv or self.pos_conv or not (self.pre_norm and self.swin_layout)):
            raise ValueError(
                "nchw goes with swin_layout and pre_norm, without pos_conv, mlp_conv, 'plain' and 'conv', "
                "as in the authors' code"
            )
        if self.nchw and (self.routing != "hard" or self.qk_dims or self.kv_pool):
            raise ValueError("nchw knows neither routing, qk_dims nor kv_pool, as in the authors' code")


@register_notrace_module
class DenseLepeAttention(nn.Module):
    """Attention of all tokens to all tokens, plus a 5x5 depthwise convolution of the input; channels-last maps."""

    def __init__(self, dim: int, heads: int, lepe_kernel: int = 5, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = lepe(dim, lepe_kernel, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        q, k, v = unpack(self.qkv(x).unflatten(-1, (3, self.heads, -1)), 3)  # (B, H, W, heads, head_dim)
        size = [x.shape[1], x.shape[2]]
        out = window_attention(q, k, v, size, scale=self.scale).flatten(3)
        if self.lepe is not None:
            out = out + to_nhwc(self.lepe(to_nchw(x)))
        return self.proj(out)


@register_notrace_module
class DenseLepeAttentionNchw(nn.Module):
    """The same on (B, C, H, W) maps, where the convolution sees v in place of the input."""

    def __init__(self, dim: int, heads: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        q, k, v = to_nhwc(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).unbind(3)
        size = [x.shape[2], x.shape[3]]
        out = window_attention(q, k, v, size, scale=self.scale)
        return self.proj(to_nchw(out.flatten(3)) + self.lepe(to_nchw(v.flatten(3))))


class ConvMixer(nn.Module):
    """1x1, depthwise 5x5 and 1x1 convolutions, which the authors try in place of attention; channels-last maps."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)
        self.dwconv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        return to_nhwc(self.conv2(self.dwconv(self.conv1(to_nchw(x)))))


def _attention(dim: int, topk: TopK, config: BiFormerConfig, index: int, **dd) -> nn.Module:
    if topk == "conv":
        return ConvMixer(dim, **dd)
    if topk == "plain":
        return DenseLepeAttention(dim, config.dense_heads, lepe_kernel=0, **dd)
    if topk is None:
        return (DenseLepeAttentionNchw if config.nchw else DenseLepeAttention)(dim, config.dense_heads, **dd)
    heads = dim // config.head_dim
    if config.nchw:
        return BiLevelRoutingAttentionNchw(dim, heads, config.regions, topk, **dd)
    qk_dim, pool = None if config.qk_dims is None else config.qk_dims[index], _kv_pool(index, config)
    return BiLevelRoutingAttention(
        dim, heads, config.regions, topk, qk_dim=qk_dim, routing=config.routing, kv_pool=pool, **dd
    )


def _kv_pool(index: int, config: BiFormerConfig) -> RegionPool | None:
    if config.kv_pool is None:
        return None
    if config.kv_sizes is not None:
        return RegionPool(config.kv_pool, size=config.kv_sizes[index])
    if config.kv_strides is None or config.kv_strides[index] == 1:
        return None
    return RegionPool(config.kv_pool, stride=config.kv_strides[index])


def _mlp(dim: int, config: BiFormerConfig, drop: float, **dd) -> nn.Module:
    hidden_dim = int(dim * config.mlp_ratio)
    if config.mlp_conv:
        return DepthwiseMlp(dim, hidden_dim, drop, **dd)
    act = MapGELU if config.nchw else nn.GELU
    return Mlp(dim, hidden_dim, act_layer=act, drop=drop, use_conv=config.nchw, **dd)


class BiFormerBlock(nn.Module):
    """A positional convolution (where the variant has one), attention and MLP; norms before each of the two."""

    channels_first: Final[bool]  # what the norms, the attention and the MLP take
    pre_norm: Final[bool]

    def __init__(
        self,
        dim: int,
        topk: TopK,
        config: BiFormerConfig,
        drop: float,
        drop_path: float,
        index: int = 0,  # of the stage whose qk_dims and pooling the attention has
        **dd,
    ) -> None:
        super().__init__()
        self.channels_first = config.nchw
        self.pre_norm = config.pre_norm
        norm = LayerNorm2d if config.nchw else nn.LayerNorm
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if config.pos_conv else None
        self.norm1 = norm(dim, eps=1e-6, **dd)
        self.attn = _attention(dim, topk, config, index, **dd)
        self.norm2 = norm(dim, eps=1e-6, **dd)
        self.mlp = _mlp(dim, config, drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        shape = (dim, 1, 1) if config.nchw else (dim,)
        self.gamma1 = layer_scale(shape, config.layer_scale, **dd)
        self.gamma2 = layer_scale(shape, config.layer_scale, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        if not self.channels_first:
            x = to_nhwc(x)
        if self.pre_norm:
            x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma1))
            x = x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))
        else:
            x = self.norm1(x + self.drop_path(scaled(self.attn(x), self.gamma1)))
            x = self.norm2(x + self.drop_path(scaled(self.mlp(x), self.gamma2)))
        return x if self.channels_first else to_nchw(x)


def _stem(in_chans: int, dim: int, config: BiFormerConfig, **dd) -> nn.Sequential:
    if config.swin_layout:
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, 4, **dd), nn.BatchNorm2d(dim, **dd))
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        MapGELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def _downsample(dim: int, out_dim: int, config: BiFormerConfig, **dd) -> nn.Sequential:
    if config.swin_layout:
        return nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, out_dim, 2, 2, **dd))
    return nn.Sequential(nn.Conv2d(dim, out_dim, 3, 2, 1, **dd), nn.BatchNorm2d(out_dim, **dd))


class BiFormer(StagedBackbone):
    """Bi-level routing attention backbone; maps are (B, C, H, W)."""

    channels_last = True

    prunable = Prunable(
        qkv=r".+\.attn\.qkv\.weight",
        prj=r".+\.attn\.proj\.weight",
        mlp=r".+\.mlp\.fc[12]\.weight",
        depthwise=r".+\.(lepe|pos_embed)\.weight",
        attentions=(
            AttentionLayout(
                r".+\.attn",
                "BiLevelRoutingAttention",
                per_value=("lepe",),
                unless=(
                    ("router.emb", "learned routing reads the queries and keys of all heads side by side"),
                    ("qk_head_dim", "queries and keys have a width of their own"),
                ),
            ),
            AttentionLayout(r".+\.attn", "BiLevelRoutingAttentionNchw", per_value=("lepe",)),
            AttentionLayout(r".+\.attn", "DenseLepeAttentionNchw", per_value=("lepe",)),
            # its positional convolution reads the input, and adds to the heads' outputs
            AttentionLayout(r".+\.attn", "DenseLepeAttention", cuts_heads=False, cuts_channels=False),
        ),
    )

    def make_stem(self, config: BiFormerConfig, in_chans: int, **dd) -> nn.Module:
        return _stem(in_chans, config.dims[0], config, **dd)

    def make_stage(self, config: BiFormerConfig, index: int, drop: float, drop_paths: list[float], **dd) -> Stage:
        dim, topk = config.dims[index], config.topks[index]
        return Stage(
            _downsample(config.dims[index - 1], dim, config, **dd) if index else nn.Identity(),
            [BiFormerBlock(dim, topk, config, drop, rate, index, **dd) for rate in drop_paths],
        )

    def make_norm(self, dim: int, **dd) -> nn.Module:
        return nn.BatchNorm2d(dim, **dd)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Rename the keys of an official BiFormer checkpoint; ours pass through.

    Raises:
        ValueError: the weights are another model's.
    """
    return check_fits({_our_key(key): value for key, value in unwrap(checkpoint).items()}, model)


def _our_key(key: str) -> str:
    key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
    key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    key = re.sub(r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv.", key)
    key = re.sub(r"\.attn\.(wo|output_linear)\.", ".attn.proj.", key)
    key = re.sub(r"\.attn\.([123])\.", lambda m: f".attn.{('conv1', 'dwconv', 'conv2')[int(m[1]) - 1]}.", key)
    key = re.sub(r"\.mlp\.0\.", ".mlp.fc1.", key)
    key = re.sub(r"\.mlp\.1\.dwconv\.", ".mlp.dwconv.", key)
    key = re.sub(r"\.mlp\.[23]\.", ".mlp.fc2.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


BIFORMER: dict[str, Any] = {
    "first_conv": "stem.0",
    "license": "mit",
    "paper_ids": "arXiv:2303.08810",
    "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
    "origin_url": "https://github.com/rayleizhu/BiFormer",
}
# The authors' shares; no `url`, or timm would list these weights as there to be had.
SHARES = {
    "tiny": "AkBbczdRlZvChHEOoGkgwgQzEDlM",
    "small": "AkBbczdRlZvChHDyM-x9KWRBZ832",
    "base": "AkBbczdRlZvChHI_XPhoadjaNxtO",
    "stl": "AkBbczdRlZvChSf-m7ujkvx9lIQ1",
    "stl_nchw": "AkBbczdRlZvChWYrKbWbMgqd2Ai0",
}


def _notes(share: str) -> tuple[str, ...]:
    return (
        f"The authors' link, reported dead: https://api.onedrive.com/v1.0/shares/s!{share}/root/content. Load a "
        "local file with pretrained=True, pretrained_cfg_overlay=dict(file=...).",
    )


default_cfgs = generate_default_cfgs(
    {f"biformer_{size}.untrained": cfg(**BIFORMER, notes=_notes(share)) for size, share in SHARES.items()}
)

STL = BiFormerConfig(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0, swin_layout=True, pos_conv=False)


def _create_biformer(variant: str, config: BiFormerConfig, pretrained: bool, **kwargs) -> BiFormer:
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if not (pretrained and overlay.get("file")):
        return build(BiFormer, config, variant, pretrained, checkpoint_filter_fn, **kwargs)

    def filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
        del pretrained_cfg(model)["state_dict"]  # or it would hold the weights as long as the model lives
        return checkpoint_filter_fn(state_dict, model)

    kwargs["pretrained_cfg_overlay"] = overlay | {"state_dict": load_state_dict(overlay["file"], use_ema=USE_EMA)}
    return build(BiFormer, config, variant, pretrained, filter_fn, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-T, 13.1 M parameters, 2.2 GMACs at 224."""
    return _create_biformer("biformer_tiny", BiFormerConfig(), pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-S, 25.5 M parameters, 4.5 GMACs at 224."""
    return _create_biformer("biformer_small", BiFormerConfig(depths=(4, 4, 18, 4)), pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-B, 56.8 M parameters, 9.8 GMACs at 224."""
    config = BiFormerConfig(dims=(96, 192, 384, 768), depths=(4, 4, 18, 4))
    return _create_biformer("biformer_base", config, pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer in Swin-T's layout, 28.4 M parameters, 4.6 GMACs at 224."""
    return _create_biformer("biformer_stl", STL, pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    """The same in the authors' later code: another padding, and v under the last stage's positional convolution."""
    return _create_biformer("biformer_stl_nchw", replace(STL, nchw=True), pretrained, **kwargs)
