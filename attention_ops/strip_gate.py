"""Efficient local attention: a gate for every row and a gate for every column.

Paper      Xu and Wan 2024, arXiv:2403.01123 (ELA).
Semantics  those of the authors' code: rows and columns share one convolution and one GroupNorm. The paper's variants
           are sizes of the two, see `ElaVariant`.
We differ  where the groups do not divide the channels (the T variant's GroupNorm of 32 in MobileNetV2's 144 channels)
           the largest smaller number that does is taken; the authors' code fails there.
Tiled      two reads of the map for the means; the product of the gates is made once, then multiplied in one pass.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.gates.norm import StripNorm
from ._attend import accumulator
from ._checks import check_alike, check_device, why_no_kernel
from ._op import Impl, declare, run

OP = "strip_gate"
ElaVariant = Literal["t", "b", "s", "l"]
# kernel size, channels of a convolution group, groups of the GroupNorm
VARIANTS = {"t": (5, 1, 32), "b": (7, 1, 16), "s": (5, 8, 16), "l": (7, 8, 16)}


def strip_gate(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_groups: int,
    eps: float = 1e-5,
    *,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Gate every row and every column of a map: x * gate(means of rows) * gate(means of columns).

    A gate is a convolution along the strip, GroupNorm over it, and a sigmoid.

    Cost: 2 * H * W * C additions and as many multiplications; (H + W) * C * k * (channels of a group) multiply-adds.

    Args:
        x: (B, C, H, W).
        weight: (C, C / groups, k), k odd; zero padding keeps a strip's length.
        norm_weight, norm_bias: (C,).
        norm_groups: groups of the GroupNorm; must divide C.
        eps: of the GroupNorm.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a weight does not fit x, k is even, or norm_groups does not divide C.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, x, weight, norm_weight, norm_bias, norm_groups, eps, impl)


def _check(x: Tensor, norm: StripNorm) -> None:
    weight, norm_weight, norm_bias, norm_groups, _ = norm
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (B, C, H, W), got shape {tuple(x.shape)}")
    check_alike(OP, x=x)
    if any(size < 1 for size in x.shape[1:]):
        raise ValueError(f"{OP}: C, H and W must be at least 1, got shape {tuple(x.shape)}")
    channels, shape = x.shape[1], tuple(weight.shape)
    if len(shape) != 3 or shape[0] != channels or shape[1] < 1 or channels % shape[1] or shape[2] % 2 == 0:
        raise ValueError(f"{OP}: weight must be (C = {channels}, C / groups, k) with k odd, got {shape}")
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tuple(t.shape) != (channels,):
            raise ValueError(f"{OP}: {name} must be (C = {channels},), got {tuple(t.shape)}")
    for name, t in (("weight", weight), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_device(OP, name, t, "x", x)
    if norm_groups < 1 or channels % norm_groups:
        raise ValueError(f"{OP}: norm_groups must divide C = {channels}, got {norm_groups}")


def strip_gate_reference(x: Tensor, norm: StripNorm) -> Tensor:
    """The definition, spelled out with float32 inside at least."""
    wide, (weight, norm_weight, norm_bias, norm_groups, eps) = accumulator(x.dtype), norm
    taps = weight.to(wide).unflatten(0, (-1, weight.shape[1]))  # (groups, out, in, k)

    def gate(strip: Tensor) -> Tensor:  # (B, C, L)
        reach = weight.shape[-1] // 2
        near = F.pad(strip, (reach, reach)).unfold(-1, weight.shape[-1], 1).unflatten(1, (-1, weight.shape[1]))
        y = torch.einsum("bgilk,goik->bgol", near, taps).flatten(1, 2).unflatten(1, (norm_groups, -1))
        y = y - y.mean((2, 3), keepdim=True)
        y = (y / (y.square().mean((2, 3), keepdim=True) + eps).sqrt()).flatten(1, 2)
        return (y * norm_weight.to(wide)[:, None] + norm_bias.to(wide)[:, None]).sigmoid()

    rows, cols = gate(x.to(wide).mean(3)), gate(x.to(wide).mean(2))
    return (x.to(wide) * rows[:, :, :, None] * cols[:, :, None, :]).to(x.dtype)


def strip_gate_tiled(x: Tensor, norm: StripNorm) -> Tensor:
    """Means and gates in float32 at least; one pass over the map for the product."""
    wide = accumulator(x.dtype)
    if x.stride(1) == 1:  # channels-last: sums and products of (B, H, W, C) run along the channels
        x = x.permute(0, 2, 3, 1)
        means = (x.mean(axis, dtype=wide).mT for axis in (2, 1))
        rows, cols = (norm.gate(strip).mT.to(x.dtype).contiguous() for strip in means)
        return (x * (rows[:, :, None] * cols[:, None])).permute(0, 3, 1, 2)
    rows, cols = (norm.gate(x.mean(axis, dtype=wide)).to(x.dtype) for axis in (3, 2))
    return x * (rows[:, :, :, None] * cols[:, :, None, :])


def _fused(x: Tensor, norm: StripNorm) -> Tensor:
    from ..kernels.gates.strip_gate import strip_gate as kernels  # here, so that CPU users need no Triton

    return kernels(x, *norm)[0]


def _why_not_fused(x: Tensor) -> str | None:
    return why_no_kernel(x)


def _macs(x: Tensor, weight: Tensor) -> int:
    return x.shape[0] * (x.shape[2] + x.shape[3]) * weight.numel()


declare(
    strip_gate,
    check=_check,
    reference=strip_gate_reference,
    tiled=strip_gate_tiled,
    fused=_fused,
    why_not_fused=_why_not_fused,
    cast=(),
    macs=_macs,
    bundles={"norm": StripNorm},
)


def largest_divisor(of: int, up_to: int) -> int:
    """Return the largest divisor of `of` that is not above `up_to`."""
    return next(n for n in range(min(max(up_to, 1), of), 0, -1) if of % n == 0)


class EfficientLocalAttention(nn.Module):
    """Efficient local attention with its weights: a drop-in for the attention slots of timm's blocks.

    Plain layers: `conv` and `norm` are called twice, on the means of rows, (B, C, H), and of columns, (B, C, W). The
    fused kernel is reached through the op, `strip_gate`.

    The variants of the paper, by `variant`: kernel 5 ("t", "s") or 7 ("b", "l"); one channel a convolution group ("t",
    "b") or eight ("s", "l"); a GroupNorm of 32 groups ("t") or 16.

    Args:
        channels: channels of the map.
        variant: "t", "b", "s" or "l".
        residual: return x + gated x, as the authors' segmentation backbones do, instead of gated x.
    """

    def __init__(
        self, channels: int, variant: ElaVariant = "b", *, residual: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"EfficientLocalAttention: variant must be one of {list(VARIANTS)}, got {variant!r}")
        dd = {"device": device, "dtype": dtype}
        kernel_size, group_channels, norm_groups = VARIANTS[variant]
        groups = largest_divisor(channels, channels // group_channels)
        self.residual = residual
        self.conv = nn.Conv1d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False, **dd
        )
        self.norm = nn.GroupNorm(largest_divisor(channels, norm_groups), channels, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        rows, cols = self.gates(x)
        gated = x * (rows[:, :, :, None] * cols[:, :, None, :])
        return x + gated if self.residual else gated

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the gates of rows (B, C, H) and of columns (B, C, W), dtype of x."""
        rows = self.norm(self.conv(x.mean(3))).sigmoid().to(x.dtype)  # torch sums 16-bit means in float32
        cols = self.norm(self.conv(x.mean(2))).sigmoid().to(x.dtype)
        return rows, cols
