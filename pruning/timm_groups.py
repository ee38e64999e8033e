"""Pruning declarations of timm's own families; ours declare them on the model class."""

from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.davit import DaVit
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from ..backbones._pruning import AttentionLayout, Prunable

TRANSFORMER: dict[str, Any] = {
    "qkv": r".+\.attn\.qkv\.weight",
    "prj": r".+\.attn\.proj\.weight",
    "mlp": r".+\.mlp\.fc[12]\.weight",
}

TIMM_GROUPS: dict[type, Prunable] = {
    SwinTransformer: Prunable(
        **TRANSFORMER,
        attentions=(
            AttentionLayout(
                r".+\.attn",
                heads="num_heads",
                per_head=(("relative_position_bias_table", 1),),
                cuts_channels=False,  # fused attention computes the scale from the width
            ),
        ),
    ),
    DaVit: Prunable(**TRANSFORMER, depthwise=r".+\.cpe[12]\.proj\.weight"),  # the number of heads depends on the width
    VisionTransformer: Prunable(
        **TRANSFORMER,
        attentions=(
            AttentionLayout(
                r".+\.attn", "Attention", heads="num_heads", value_widths=("attn_dim",), cuts_channels=False
            ),
        ),
    ),
    ConvNeXt: Prunable(mlp=TRANSFORMER["mlp"], depthwise=r".+\.conv_dw\.weight"),
    ResNet: Prunable(conv=r"layer\d+\.\d+\.conv\d\.weight", gate=r".+\.se\.(fc[12]|conv)\.weight"),
}
