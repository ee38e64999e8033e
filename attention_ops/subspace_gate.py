"""Subspace gate (ULSAM): groups of channels, each with one distribution over the positions of the map.

Paper      Saini, Jha, Das, Mittal, Mohan 2020, arXiv:2006.15102 (ULSAM).
Semantics  those of the authors' module: depthwise 1x1 convolution, BatchNorm, ReLU, 3x3 maximum, 1x1 convolution to one
           channel, BatchNorm, ReLU, softmax over all positions; the map times that distribution is added to the map.
We differ  one layer holds all groups: a convolution per group is one grouped convolution, with the same numbers. The
           authors' keys (`subspaces.0.conv_dws.weight`) load through `merge_subspaces`.
Tiled      in torch: one affine pass, one maximum, one grouped product, one softmax, one product with the map.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attend import accumulator
from ._checks import check_alike, check_device
from ._op import Impl, declare, run

OP = "subspace_gate"


def subspace_gate(
    x: Tensor,
    channel_scale: Tensor,
    channel_shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Add to every group of channels its product with a distribution over positions: x + x * softmax(logits).

    The logits of a group are relu(weight . max3x3(relu(x * channel_scale + channel_shift)) + bias), one for each
    position. In the published layer the scale and the shift are a depthwise convolution and a BatchNorm, `weight` and
    `bias` a pointwise convolution and a BatchNorm, with their statistics folded.

    Cost: H * W * C multiply-adds, and as many multiplications and comparisons with nine neighbors.

    Args:
        x: (B, C, H, W).
        channel_scale, channel_shift: (C,).
        weight: (groups, C / groups); groups are runs of channels.
        bias: (groups,).
        impl: "auto", "tiled" or "reference"; there is no kernel of ours: "fused" is refused.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: x is not a map, or a weight does not fit its channels.
        NotImplementedError: `impl="fused"`.
    """
    return run(OP, x, channel_scale, channel_shift, weight, bias, impl)


def _check(x: Tensor, channel_scale: Tensor, channel_shift: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (B, C, H, W), got shape {tuple(x.shape)}")
    check_alike(OP, x=x)
    if any(size < 1 for size in x.shape[1:]):
        raise ValueError(f"{OP}: C, H and W must be at least 1, got shape {tuple(x.shape)}")
    channels, shape = x.shape[1], tuple(weight.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[0] * shape[1] != channels:
        raise ValueError(f"{OP}: weight must be (groups, C / groups) for C = {channels}, got {shape}")
    for name, t, length in (
        ("channel_scale", channel_scale, channels),
        ("channel_shift", channel_shift, channels),
        ("bias", bias, shape[0]),
    ):
        if tuple(t.shape) != (length,):
            raise ValueError(f"{OP}: {name} must be ({length},), got {tuple(t.shape)}")
    for name, t in (
        ("channel_scale", channel_scale),
        ("channel_shift", channel_shift),
        ("weight", weight),
        ("bias", bias),
    ):
        check_device(OP, name, t, "x", x)


def subspace_gate_reference(
    x: Tensor, channel_scale: Tensor, channel_shift: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The definition, float32 inside at least."""
    wide, groups = accumulator(x.dtype), weight.shape[0]
    y = (x.to(wide) * channel_scale.to(wide)[:, None, None] + channel_shift.to(wide)[:, None, None]).relu()
    near = F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # zeros beyond the border are no maxima: y >= 0
    tops = near.amax((-1, -2)).unflatten(1, (groups, -1))
    logits = (torch.einsum("bgchw,gc->bghw", tops, weight.to(wide)) + bias.to(wide)[:, None, None]).relu()
    gate = logits.flatten(2).softmax(-1).view_as(logits)[:, :, None]
    grouped = x.to(wide).unflatten(1, (groups, -1))
    return (grouped + grouped * gate).flatten(1, 2).to(x.dtype)


def subspace_gate_tiled(
    x: Tensor, channel_scale: Tensor, channel_shift: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Logits in float32 at least; one grouped product for all groups."""
    wide, groups = accumulator(x.dtype), weight.shape[0]
    y = torch.addcmul(channel_shift.to(wide)[:, None, None], x.to(wide), channel_scale.to(wide)[:, None, None]).relu()
    tops = F.max_pool2d(y, 3, 1, 1)
    logits = F.conv2d(tops, weight.to(wide)[:, :, None, None], bias.to(wide), groups=groups).relu()
    return add_gated(x, logits)


def add_gated(x: Tensor, logits: Tensor) -> Tensor:  # (B, C, H, W), (B, groups, H, W) -> (B, C, H, W)
    gate = logits.flatten(2).softmax(-1).view_as(logits)[:, :, None].to(x.dtype)
    grouped = x.unflatten(1, (logits.shape[1], -1))
    return torch.addcmul(grouped, grouped, gate).flatten(1, 2)


def _why_not_fused() -> str:
    return (
        "the gate stands in one to four layers of a network, on maps of at most 14 x 14 tokens, where the launches of "
        "torch's operations take longer than memory; there is no Triton kernel"
    )


def _macs(x: Tensor) -> int:
    return x.numel()


declare(
    subspace_gate,
    check=_check,
    reference=subspace_gate_reference,
    tiled=subspace_gate_tiled,
    why_not_fused=_why_not_fused,
    cast=(),
    macs=_macs,
)

_LAYERS = r"(conv_dws|bn_dws|conv_point|bn_point)\.\w+"


def merge_subspaces(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict in which the authors' layers of a group are joined into ours; other keys stay as they are.

    `a.subspaces.{g}.conv_dws.weight`, of shape (C / groups, 1, 1, 1) for every group g, become `a.conv_dws.weight`,
    (C, 1, 1, 1). So do all parameters and statistics of the four layers; `num_batches_tracked` is that of group 0.
    """
    found: dict[str, dict[int, Tensor]] = {}
    merged: dict[str, Any] = {}
    for key, value in state_dict.items():
        if (part := re.fullmatch(rf"(.*?)subspaces\.(\d+)\.({_LAYERS})", key)) is None:
            merged[key] = value
        else:
            found.setdefault(part[1] + part[3], {})[int(part[2])] = value
    for key, parts in found.items():
        in_order = [parts[group] for group in sorted(parts)]
        merged[key] = in_order[0] if in_order[0].dim() == 0 else torch.cat(in_order)
    return merged


class SubspaceAttention(nn.Module):
    """ULSAM with its weights, on (B, C, H, W) maps: a drop-in for the attention slots of timm's blocks.

    Plain layers: convolutions and norms are called as modules, on all groups at once. The op `subspace_gate` computes
    the same from folded weights. State dicts with the authors' keys load as they are.

    Args:
        channels: channels of the map.
        groups: subspaces; must divide the channels.
    """

    def __init__(self, channels: int, groups: int = 4, *, device=None, dtype=None) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"SubspaceAttention: groups must divide the {channels} channels, got {groups}")
        dd = {"device": device, "dtype": dtype}
        self.groups = groups
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **dd)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9, **dd)  # the authors' momentum: statistics follow the batch
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.conv_point = nn.Conv2d(channels, groups, 1, groups=groups, **dd)
        self.bn_point = nn.BatchNorm2d(groups, momentum=0.9, **dd)

    def logits(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, groups, H, W)
        """Return the logits of every group at every position."""
        x = self.pool(self.bn_dws(self.conv_dws(x)).relu())
        return self.bn_point(self.conv_point(x)).relu()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return add_gated(x, self.logits(x))

    @torch.jit.ignore
    def attention(self, x: Tensor) -> Tensor:
        """Return the distribution of every group over the positions of a map (B, C, H, W): (B, groups, H, W)."""
        logits = self.logits(x)
        return logits.flatten(2).softmax(-1).view_as(logits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {key: state_dict[key] for key in list(state_dict) if key.startswith(f"{prefix}subspaces.")}
        for key in own:
            del state_dict[key]
        state_dict |= merge_subspaces(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
