"""Large kernel attention: a 21x21 receptive field from two depthwise convolutions, as a gate.

Paper      Guo et al. 2022, arXiv:2202.09741 (VAN), figure 2: depthwise 5x5, depthwise 7x7 of dilation 3, pointwise.
Tiled      a dilated depthwise convolution is the plain one on every dilation group. oneDNN has a fast kernel for the
           plain one only: 8 x 64 channels, 56x56, 7x7 dilation 3 took 13.8 ms dilated and 2.1 ms by groups, to the same
           bits (2 threads of a Xeon with AVX-512, torch 2.15). Exporters see the plain dilated convolution.
Fused      kernels/gates/large_kernel.py, forward and backward. Its map is channels last.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels._launch import autocasts
from ._checks import check_alike, check_at_least, why_no_kernel
from ._op import Impl, declare, run
from .tiling import on_dilation_groups

OP = "large_kernel_attention"
MOST_CHANNELS = 1024  # of the kernel


def large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    dilation: int = 3,
    *,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Gate a map with a large-kernel convolution of itself: x * point(dilated(local(x))).

    Cost: H * W * C * (local taps + dilated taps + C) multiply-adds. The fused body has no double backward.

    Args:
        x: (B, C, H, W).
        local_weight: (C, 1, k, k), k odd; local_bias: (C,) or None. Depthwise, zero padding keeps the size.
        dilated_weight: (C, 1, k, k), k odd; dilated_bias: (C,) or None. Depthwise with `dilation`.
        point_weight: (C, C, 1, 1); point_bias: (C,) or None.
        dilation: step between the taps of the second convolution, in tokens.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, C, H, W), dtype of x. Under autocast the convolutions run in its dtype, and the product in that of x.

    Raises:
        ValueError: a weight does not fit x, a kernel is even, or dilation is below 1.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, x, local_weight, local_bias, dilated_weight, dilated_bias, point_weight, point_bias, dilation, impl)


class Convolutions(NamedTuple):
    """The weights of the three convolutions."""

    local_weight: Tensor
    local_bias: Tensor | None
    dilated_weight: Tensor
    dilated_bias: Tensor | None
    point_weight: Tensor
    point_bias: Tensor | None
    dilation: int


def _check(x: Tensor, convolutions: Convolutions) -> None:
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (B, C, H, W), got shape {tuple(x.shape)}")
    channels, one = x.shape[1], convolutions
    for name, weight in (("local_weight", one.local_weight), ("dilated_weight", one.dilated_weight)):
        shape = tuple(weight.shape)
        if len(shape) != 4 or shape[:2] != (channels, 1) or shape[2] % 2 == 0 or shape[3] % 2 == 0:
            raise ValueError(f"{OP}: {name} must be (C = {channels}, 1, k, k) with k odd, got {shape}")
    if (shape := tuple(one.point_weight.shape)) != (channels, channels, 1, 1):
        raise ValueError(f"{OP}: point_weight must be {(channels, channels, 1, 1)}, got {shape}")
    named = {name: t for name, t in one._asdict().items() if isinstance(t, Tensor)}
    weights = {name: t for name, t in named.items() if name.endswith("weight")}
    given = {name: t for name, t in named.items() if name.endswith("bias")}
    for name, bias in given.items():
        if tuple(bias.shape) != (channels,):
            raise ValueError(f"{OP}: {name} must be (C = {channels},), got {tuple(bias.shape)}")
    check_alike(OP, **({} if autocasts(x) else {"x": x}), **weights, **given)
    check_at_least(OP, "dilation", (one.dilation,), 1)


def large_kernel_attention_reference(x: Tensor, convolutions: Convolutions) -> Tensor:
    """The definition: three convolutions in the order of the paper. It is the tiled body too, for tracers and GPUs."""
    return _gate(x, convolutions, depthwise)


def large_kernel_attention_tiled(x: Tensor, convolutions: Convolutions) -> Tensor:
    """Run the three convolutions; on a CPU the dilated one runs on dilation groups."""
    return _gate(x, convolutions, depthwise if x.is_cuda else depthwise_by_groups)


def _gate(x: Tensor, convolutions: Convolutions, dilated: Callable[..., Tensor]) -> Tensor:
    one = convolutions
    gate = depthwise(x.to(one.local_weight.dtype), one.local_weight, one.local_bias)
    gate = dilated(gate, one.dilated_weight, one.dilated_bias, one.dilation)
    return x * F.conv2d(gate, one.point_weight, one.point_bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Depthwise convolution with zero padding that keeps the size: (B, C, H, W) -> (B, C, H, W)."""
    padding = [dilation * (k // 2) for k in weight.shape[2:]]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


def depthwise_by_groups(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Compute what `depthwise` does, as the plain convolution of every dilation group."""
    return on_dilation_groups(x, (dilation, dilation), lambda group: depthwise(group, weight, bias))


def _fused(x: Tensor, convolutions: Convolutions) -> Tensor:
    from ..kernels.gates.large_kernel import large_kernel_attention  # here, so that CPU users need no Triton

    return large_kernel_attention(x.to(convolutions.local_weight.dtype), *convolutions).to(x.dtype)


def why_not_fused(x: Tensor) -> str | None:
    """Return the reason why no fused kernel can run on these tensors, or None."""
    if x.shape[1] > MOST_CHANNELS:
        return f"the kernel takes at most {MOST_CHANNELS} channels, got {x.shape[1]}"
    return why_no_kernel(x)


def _macs(x: Tensor, local_weight: Tensor, dilated_weight: Tensor, point_weight: Tensor) -> int:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return pixels * (local_weight.numel() + dilated_weight.numel() + point_weight.numel())


declare(
    large_kernel_attention,
    check=_check,
    reference=large_kernel_attention_reference,
    tiled=large_kernel_attention_tiled,
    graph=large_kernel_attention_reference,
    fused=_fused,
    why_not_fused=why_not_fused,
    cast=("local_weight", "local_bias", "dilated_weight", "dilated_bias", "point_weight", "point_bias"),
    macs=_macs,
    bundles={"convolutions": Convolutions},
)


class LargeKernelAttention(nn.Module):
    """Large kernel attention with its weights; the names of the layers are those of the authors' code.

    Plain layers, each called on the whole map. The faster CPU body and the fused kernel are reached through the op,
    `large_kernel_attention`.

    Args:
        dim: channels.
        kernel_size: taps a side of the local convolution, odd.
        dilated_kernel_size: taps a side of the dilated convolution, odd.
        dilation: step between those taps, in tokens.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 5,
        dilated_kernel_size: int = 7,
        dilation: int = 3,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        reach = dilation * (dilated_kernel_size // 2)
        self.dilation = dilation
        self.conv0 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.conv_spatial = nn.Conv2d(dim, dim, dilated_kernel_size, padding=reach, groups=dim, dilation=dilation, **dd)
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return x * self.conv1(self.conv_spatial(self.conv0(x)))
