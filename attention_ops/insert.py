"""Put a gate into every residual block of an existing model, or a token mixer in the place of its attention.

The blocks of timm's ResNets, RegNets, MobileNets and EfficientNets have an attribute `se` for channel attention. It is
None or an identity where a block has no attention. The gate replaces it.
"""

from typing import Any

from torch import nn

from .channel_gate import EfficientChannelAttention
from .mixers import MIXERS
from .reattend import reattend
from .strip_gate import EfficientLocalAttention
from .subspace_gate import SubspaceAttention

GATES = {"eca": EfficientChannelAttention, "ela": EfficientLocalAttention, "ulsam": SubspaceAttention}


def insert_attention(model: nn.Module, kind: str, **kwargs) -> nn.Module:
    """Put one gate into the `se` slot of every residual block of `model`, in place; it replaces what is there.

    With the name of a token mixer ("agent", ...), self-attention is replaced instead: see `reattend`.

    In timm's ResNets `se` is called after the last norm of the branch, before the shortcut is added; in RegNets,
    MobileNets and EfficientNets before the last 1x1 convolution.

    Args:
        model: any model whose blocks have an attribute `se`; for a mixer, one that `reattend` takes.
        kind: "eca", "ela", "ulsam", or the name of a token mixer.
        kwargs: of the gate's module: `kernel_size`; `variant`, `residual`; `groups`. Of `reattend` for a mixer.

    Returns:
        The model.

    Raises:
        ValueError: no such kind, no block of the model has the slot, or the gate does not fit a block's channels.
    """
    if kind in MIXERS:
        return reattend(model, kind, **kwargs)
    if kind not in GATES:
        raise ValueError(f"insert_attention: kind must be one of {[*GATES, *sorted(MIXERS)]}, got {kind!r}")
    blocks = [block for block in model.modules() if hasattr(block, "se") and _channels(block)]
    if not blocks:
        raise ValueError(f"insert_attention: no block of {type(model).__name__} has a slot named 'se'")
    for block in blocks:
        like = next(block.parameters())
        gate = GATES[kind](_channels(block), device=like.device, dtype=like.dtype, **kwargs)
        block.se = gate.train(block.training)
    return model


def _channels(block: Any) -> int | None:
    """Return the channels at the `se` slot: the inputs of the last 1x1 convolution, or the outputs of the last norm."""
    if hasattr(block, "conv_pwl"):  # MobileNet, EfficientNet: inverted residual, edge residual
        return block.conv_pwl.in_channels
    if hasattr(block, "conv_pw"):  # their depthwise separable block
        return block.conv_pw.in_channels
    if hasattr(block, "conv3") and hasattr(block.conv3, "conv"):  # RegNet
        return block.conv3.conv.in_channels
    for norm in ("bn3", "bn2"):  # ResNet
        if hasattr(block, norm):
            return getattr(block, norm).num_features
    return None
