"""Efficient channel attention: every channel gated by its neighbors in channel order.

Paper      Wang et al. 2020, arXiv:1910.03151 (ECA-Net), figure 2: average pooling, a 1-D convolution, a sigmoid.
Kernel     equation 12 gives it from the number of channels, |log2(C) / 2 + 1 / 2| to an odd number; the published
           networks state it stage by stage instead. `adaptive_kernel_size` rounds as timm does, with 3 as the least.
Tiled      one read of the map for the means, one for the product; the convolution runs on (B, C) numbers, by conv1d as
           in the authors' code. A matrix-vector product takes 30 % less time, but rounds differently: ReLUs behind
           the gate cross zero, and single gradients of an ECA-Net18 change by 4e-4.
"""

import math

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._attend import accumulator
from ._checks import check_alike, check_device, why_no_kernel
from ._op import Impl, declare, run

OP = "channel_gate"


def channel_gate(x: Tensor, weight: Tensor, *, impl: Impl | str = Impl.AUTO) -> Tensor:
    """Gate every channel by a convolution over the means of the channels beside it, zero beyond the first and last.

    Cost: H * W * C additions and as many multiplications; C * k multiply-adds.

    Args:
        x: (B, C, H, W).
        weight: (1, 1, k), k odd.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: x is not a map, or weight is not (1, 1, k) with k odd.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, x, weight, impl)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (B, C, H, W), got shape {tuple(x.shape)}")
    check_alike(OP, x=x)
    if any(size < 1 for size in x.shape[1:]):
        raise ValueError(f"{OP}: C, H and W must be at least 1, got shape {tuple(x.shape)}")
    shape = tuple(weight.shape)
    if len(shape) != 3 or shape[:2] != (1, 1) or shape[2] % 2 == 0:
        raise ValueError(f"{OP}: weight must be (1, 1, k) with k odd, got {shape}")
    check_device(OP, "weight", weight, "x", x)


def channel_gate_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition, float32 inside at least."""
    wide = accumulator(x.dtype)
    taps = weight.flatten().to(wide)
    reach = len(taps) // 2
    means = F.pad(x.to(wide).mean((2, 3)), (reach, reach))
    gate = (means.unfold(1, len(taps), 1) * taps).sum(-1).sigmoid()  # (B, C)
    return (x.to(wide) * gate[:, :, None, None]).to(x.dtype)


def channel_gate_tiled(x: Tensor, weight: Tensor) -> Tensor:
    """Run the authors' layers in their order. The sum is not x.mean, whose gradient would be one more map."""
    means = x.sum((2, 3), dtype=accumulator(x.dtype))[:, None] / (x.shape[2] * x.shape[3])  # (B, 1, C)
    gate = F.conv1d(means, weight.to(means.dtype), padding=weight.shape[-1] // 2).sigmoid()[:, 0]
    return x * gate.to(x.dtype)[:, :, None, None]


def _fused(x: Tensor, weight: Tensor) -> Tensor:
    from ..kernels.gates.channel_gate import channel_gate as kernels  # here, so that CPU users need no Triton

    return kernels(x, weight)[0]


def _why_not_fused(x: Tensor) -> str | None:
    return why_no_kernel(x)


def _macs(x: Tensor, weight: Tensor) -> int:
    return x.shape[0] * x.shape[1] * weight.shape[-1]


declare(
    channel_gate,
    check=_check,
    reference=channel_gate_reference,
    tiled=channel_gate_tiled,
    fused=_fused,
    why_not_fused=_why_not_fused,
    cast=(),
    macs=_macs,
)


def adaptive_kernel_size(channels: int, gamma: float = 2.0, beta: float = 1.0) -> int:
    """Return the kernel for a number of channels (equation 12), at least 3: 64 -> 3, 128 -> 5, 2048 -> 7."""
    size = int(abs(math.log2(channels) + beta) / gamma)
    return max(size if size % 2 else size + 1, 3)


def token_means(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C), summed in float32 at least. The gradient of x.mean would be one more map."""
    return (x.sum((2, 3), dtype=accumulator(x.dtype)) / (x.shape[2] * x.shape[3])).to(x.dtype)


fx.wrap("token_means")


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention with its weights: a drop-in for the attention slots of timm's blocks.

    Plain layers: `conv` is called on the means, (B, 1, C). The fused kernel is reached through the op, `channel_gate`.

    Args:
        channels: channels of the map.
        kernel_size: taps over channels, odd; from the number of channels when None.
    """

    def __init__(self, channels: int, kernel_size: int | None = None, *, device=None, dtype=None) -> None:
        super().__init__()
        kernel_size = adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"EfficientChannelAttention: kernel_size must be odd and positive, got {kernel_size}")
        padding = kernel_size // 2
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=padding, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return x * self.gate(x).to(x.dtype)[:, :, None, None]

    def gate(self, x: Tensor) -> Tensor:
        """Return the factor of every channel, (B, C) in 0 to 1, of a map (B, C, H, W)."""
        return self.conv(token_means(x)[:, None]).sigmoid()[:, 0]
