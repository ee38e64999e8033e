"""Module groups of timm's own families, which cannot declare them beside their models as ours do."""

from timm.models.convnext import ConvNeXt
from timm.models.davit import DaVit
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from ..backbones._pruning import AttentionLayout, Prunable

TRANSFORMER = {
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
                cuts_channels=False,  # its fused form takes the scale from the width
            ),
        ),
    ),
    DaVit: Prunable(**TRANSFORMER, depthwise=r".+\.cpe[12]\.proj\.weight"),  # its heads follow from the width
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
