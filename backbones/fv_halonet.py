"""HaloNet: ResNets whose spatial convolutions are halo attention.

Paper      Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens 2021, arXiv:2103.12731: H0 to H7.
Official   none is public. timm's nets are the reference (Apache-2.0); its weights load as they are.
Names      `fv_` because timm registers some; keys equal timm's, and so do results wherever timm runs. Where the block
           does not divide a map timm refuses; here the last blocks overhang the map.
H0 to H7   timm has H1 only. The other rows are second-hand: a public re-implementation's reading of the paper's table,
           checked against the paper's parameter counts (see `PUBLISHED_M`). Heads are 4, 8, 8, 8 in the paper; timm's
           H1, and so ours, has 8 in the first stage too.
Reuse      stems, stages and heads are timm's ByobNet, and so are the configs of the nets that timm named.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import ByoBlockCfg, ByoModelCfg, LayerFn, SelfAttnBlock
from torch import nn

from .._weights import unwrap
from ..attention_ops import EfficientChannelAttention, HaloAttention2d
from ._build import StateDict, build, cfg, check_fits
from ._pruning import AttentionLayout, Projection, Prunable
from ._staged import check_stages
from ._timm_classes import CheckedByobNet

register_notrace_module(HaloAttention2d)

WIDTHS = (64, 128, 256, 512)  # of queries, per stage
PUBLISHED_M = (5.5, 8.1, 9.4, 11.8, 19.1, 30.7, 43.4, 67.4)  # parameters of H0 to H7


def _halo(dim: int, num_heads: int = 8, block_size: int = 8, halo_size: int = 3, value_ratio: float = 1.0, **kwargs):
    """Make our layer from the arguments of timm's; `value_ratio` widens the values and the output."""
    dim_head = kwargs.pop("dim_head", None if value_ratio == 1 else dim // num_heads)
    return HaloAttention2d(
        dim,
        round(dim * value_ratio),
        heads=num_heads,
        head_dim=dim_head,
        block_size=block_size,
        halo=halo_size,
        **kwargs,
    )


class WideValueBlock(SelfAttnBlock):
    """timm's attention block with values wider than queries: what follows attention is as wide."""

    def __init__(self, in_chs: int, out_chs: int, layers: LayerFn, device=None, dtype=None, **kwargs) -> None:
        super().__init__(in_chs, out_chs, layers=layers, device=device, dtype=dtype, **kwargs)
        dd = {"device": device, "dtype": dtype}
        wide: int = self.self_attn.heads * self.self_attn.value_dim  # type: ignore[operator, assignment]
        self.post_attn = layers.norm_act(wide, **dd)
        self.conv3_1x1 = layers.conv_norm_act(wide, out_chs, 1, apply_act=False, **dd)


@dataclass(frozen=True)
class HaloNetConfig:
    """A row of the paper's table."""

    depths: tuple[int, ...] = (3, 3, 7, 3)  # blocks, per stage
    heads: tuple[int, ...] = (4, 8, 8, 8)  # per stage
    block_size: int = 8  # tokens
    halo: int = 3  # tokens
    value_ratio: float = 1.0  # channels of values over those of queries
    output_ratio: float = 1.0  # channels of a stage's map over those of queries
    final_dim: int = 0  # channels of a last 1x1 convolution; 0: none

    def __post_init__(self) -> None:
        check_stages(self, ("depths", "heads"), len(WIDTHS))

    def byob(self) -> ByoModelCfg:
        """The net in timm's words."""
        block = "self_attn" if self.value_ratio == 1 else partial(WideValueBlock)
        kwargs = {"block_size": self.block_size, "halo_size": self.halo, "value_ratio": self.value_ratio}
        stages = tuple(
            ByoBlockCfg(
                type=block,  # type: ignore[arg-type]  # timm takes a class or a function too
                d=depth,
                c=round(width * self.output_ratio),
                s=2 if i else 1,
                gs=0,
                br=1 / self.output_ratio,
                self_attn_kwargs={"num_heads": heads, **kwargs},
            )
            for i, (depth, heads, width) in enumerate(zip(self.depths, self.heads, WIDTHS, strict=True))
        )
        return ByoModelCfg(
            stages,
            stem_chs=64,
            stem_type="7x7",
            stem_pool="maxpool",
            num_features=self.final_dim,
            self_attn_layer=_halo,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class TimmHaloConfig:
    """A net that timm named, with other blocks if wanted."""

    name: str  # in timm
    block_size: int | None = None  # tokens; timm's when None
    halo: int | None = None  # tokens; timm's when None

    def byob(self) -> ByoModelCfg:
        """timm's config with our layers in the place of its."""
        theirs = model_cfgs[self.name]
        changes = {"block_size": self.block_size, "halo_size": self.halo}
        changes = {key: value for key, value in changes.items() if value is not None}

        def ours(block: ByoBlockCfg) -> ByoBlockCfg:
            if block.self_attn_kwargs is None:
                return block
            kwargs = {**block.self_attn_kwargs, **changes}
            return replace(block, self_attn_layer=_halo, self_attn_kwargs=kwargs)  # type: ignore[arg-type]

        blocks = (ours(b) if isinstance(b, ByoBlockCfg) else tuple(ours(inner) for inner in b) for b in theirs.blocks)
        gate = EfficientChannelAttention if theirs.attn_layer == "eca" else theirs.attn_layer
        return replace(
            theirs,
            blocks=tuple(blocks),
            self_attn_layer=_halo,  # type: ignore[arg-type]
            self_attn_kwargs={**theirs.self_attn_kwargs, **changes},
            attn_layer=gate,  # type: ignore[arg-type]
        )


class HaloNet(CheckedByobNet):
    """Halo attention backbone.

    Args:
        config: the net.
        kwargs: as in timm's ByobNet.
    """

    prunable = Prunable(
        qkv=r".+\.self_attn\.(q|kv)\.weight",
        conv=r"stages\..+\.conv\d\w*\.conv\.weight",
        gate=r"stages\..+\.attn\.(fc[12]|conv)\.weight",
        attentions=(
            AttentionLayout(
                r".+\.self_attn",
                projections=(Projection("q", ("q",)), Projection("kv", ("k", "v"), head_major=True)),
                out=None,
                per_query=(("pos_embed.height_rel", 1), ("pos_embed.width_rel", 1)),
                widths=(("head_dim", "q"), ("value_dim", "v")),
            ),
        ),
    )

    def __init__(self, config: HaloNetConfig | TimmHaloConfig, **kwargs) -> None:
        super().__init__(config.byob(), **kwargs)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Unwrap a checkpoint; the keys are timm's.

    Raises:
        ValueError: the weights are another model's.
    """
    return check_fits(unwrap(checkpoint), model)


URL = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights"


def _cfg(side: int = 256, **kwargs) -> dict[str, Any]:
    return cfg(
        **{
            "input_size": (3, side, side),
            "pool_size": (-(-side // 32), -(-side // 32)),
            "crop_pct": 0.95,
            "first_conv": "stem.conv1.conv",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2103.12731",
            "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
            "origin_url": "https://github.com/huggingface/pytorch-image-models",
            **kwargs,
        }
    )


default_cfgs = generate_default_cfgs(
    {
        "fv_halonet_h0.untrained": _cfg(),
        "fv_halonet_h1.untrained": _cfg(),
        "fv_halonet_h2.untrained": _cfg(),
        "fv_halonet_h3.untrained": _cfg(320),
        "fv_halonet_h4.untrained": _cfg(384),
        "fv_halonet_h5.untrained": _cfg(448),
        "fv_halonet_h6.untrained": _cfg(512),
        "fv_halonet_h7.untrained": _cfg(600),
        "fv_halonet26t.a1h_in1k": _cfg(
            url=f"{URL}/halonet26t_a1h_256-3083328c.pth", hf_hub_id="timm/halonet26t.a1h_in1k"
        ),
        "fv_halonet50ts.a1h_in1k": _cfg(
            url=f"{URL}/halonet50ts_a1h2_256-f3a3daee.pth", hf_hub_id="timm/halonet50ts.a1h_in1k", crop_pct=0.94
        ),
        "fv_sehalonet33ts.ra2_in1k": _cfg(
            url=f"{URL}/sehalonet33ts_256-87e053f9.pth", hf_hub_id="timm/sehalonet33ts.ra2_in1k", crop_pct=0.94
        ),
        "fv_eca_halonext26ts.c1_in1k": _cfg(
            url=f"{URL}/eca_halonext26ts_c_256-06906299.pth", hf_hub_id="timm/eca_halonext26ts.c1_in1k", crop_pct=0.94
        ),
        "fv_haloregnetz_b.ra3_in1k": _cfg(
            224,
            url=f"{URL}/haloregnetz_c_raa_256-c8ad7616.pth",
            hf_hub_id="timm/haloregnetz_b.ra3_in1k",
            crop_pct=0.94,
            mean=IMAGENET_INCEPTION_MEAN,
            std=IMAGENET_INCEPTION_STD,
            first_conv="stem.conv",
        ),
    }
)


def _create(variant: str, config: HaloNetConfig | TimmHaloConfig, pretrained: bool, **kwargs) -> HaloNet:
    return build(HaloNet, config, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def fv_halonet_h0(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H0, 5.5 M parameters, for 256 pixels."""
    return _create("fv_halonet_h0", HaloNetConfig(output_ratio=0.5), pretrained, **kwargs)


@register_model
def fv_halonet_h1(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H1 as timm has it, 8.1 M parameters, 3.0 GMACs at 256."""
    config = HaloNetConfig(depths=(3, 3, 10, 3), heads=(8, 8, 8, 8))
    return _create("fv_halonet_h1", config, pretrained, **kwargs)


@register_model
def fv_halonet_h2(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H2, 9.4 M parameters, for 256 pixels."""
    config = HaloNetConfig(depths=(3, 3, 11, 3), output_ratio=1.25)
    return _create("fv_halonet_h2", config, pretrained, **kwargs)


@register_model
def fv_halonet_h3(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H3, 11.8 M parameters, for 320 pixels."""
    config = HaloNetConfig(depths=(3, 3, 12, 3), block_size=10, output_ratio=1.5, final_dim=1024)
    return _create("fv_halonet_h3", config, pretrained, **kwargs)


@register_model
def fv_halonet_h4(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H4, 19.1 M parameters, for 384 pixels."""
    config = HaloNetConfig(depths=(3, 3, 12, 3), block_size=12, halo=2, output_ratio=3, final_dim=1280)
    return _create("fv_halonet_h4", config, pretrained, **kwargs)


@register_model
def fv_halonet_h5(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H5, 30.7 M parameters, for 448 pixels."""
    config = HaloNetConfig(depths=(3, 3, 23, 3), block_size=14, halo=2, value_ratio=2.5, output_ratio=2, final_dim=1536)
    return _create("fv_halonet_h5", config, pretrained, **kwargs)


@register_model
def fv_halonet_h6(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H6, 43.5 M parameters, for 512 pixels."""
    config = HaloNetConfig(depths=(3, 3, 24, 3), halo=4, value_ratio=3, output_ratio=2.75, final_dim=1536)
    return _create("fv_halonet_h6", config, pretrained, **kwargs)


@register_model
def fv_halonet_h7(pretrained: bool = False, **kwargs) -> HaloNet:
    """HaloNet-H7, 67.4 M parameters, for 600 pixels."""
    config = HaloNetConfig(depths=(3, 3, 26, 3), block_size=10, value_ratio=4, output_ratio=3.5, final_dim=2048)
    return _create("fv_halonet_h7", config, pretrained, **kwargs)


@register_model
def fv_halonet26t(pretrained: bool = False, **kwargs) -> HaloNet:
    """ResNet-26-T with halo attention at stride 16 and 32, 12.5 M parameters, 3.2 GMACs at 256."""
    return _create("fv_halonet26t", TimmHaloConfig("halonet26t"), pretrained, **kwargs)


@register_model
def fv_halonet50ts(pretrained: bool = False, **kwargs) -> HaloNet:
    """ResNet-50-T with halo attention from stride 8 on, 22.7 M parameters, 5.3 GMACs at 256."""
    return _create("fv_halonet50ts", TimmHaloConfig("halonet50ts"), pretrained, **kwargs)


@register_model
def fv_sehalonet33ts(pretrained: bool = False, **kwargs) -> HaloNet:
    """ResNet-33-T with halo attention and squeeze-and-excitation, 13.7 M parameters, 3.6 GMACs at 256."""
    return _create("fv_sehalonet33ts", TimmHaloConfig("sehalonet33ts"), pretrained, **kwargs)


@register_model
def fv_eca_halonext26ts(pretrained: bool = False, **kwargs) -> HaloNet:
    """ResNeXt-26-T with halo attention and efficient channel attention, 10.8 M parameters."""
    return _create("fv_eca_halonext26ts", TimmHaloConfig("eca_halonext26ts"), pretrained, **kwargs)


@register_model
def fv_haloregnetz_b(pretrained: bool = False, **kwargs) -> HaloNet:
    """RegNetZ-B with halo attention and squeeze-and-excitation, 11.7 M parameters."""
    return _create("fv_haloregnetz_b", TimmHaloConfig("haloregnetz_b"), pretrained, **kwargs)
