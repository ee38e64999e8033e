"""Large kernel attention: a 21x21 receptive field from two depthwise convolutions, as a gate.

Paper      Guo et al. 2022, arXiv:2202.09741 (VAN), figure 2: depthwise 5x5, depthwise 7x7 of dilation 3, pointwise.
Tiled      a dilated depthwise convolution is the plain one on every dilation group. oneDNN has a fast kernel for the
           plain one only: 8 x 64 channels, 56x56, 7x7 dilation 3 took 13.8 ms dilated and 2.1 ms by groups, to the same
           bits (2 threads of a Xeon with AVX-512, torch 2.15). Exporters see the plain dilated convolution.
Fused      for inference, see kernels/large_kernel.py. Its map is channels last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._autocast import cast_for_autocast, no_autocast
from ._choice import Impl, choose
from ._fused import why_no_kernel

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

    Cost: H * W * C * (local taps + dilated taps + C) multiply-adds.

    Args:
        x: (B, C, H, W).
        local_weight: (C, 1, k, k), k odd; local_bias: (C,) or None. Depthwise, zero padding keeps the size.
        dilated_weight: (C, 1, k, k), k odd; dilated_bias likewise. Depthwise with `dilation`.
        point_weight: (C, C, 1, 1); point_bias likewise.
        dilation: step between the taps of the second convolution, in tokens.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a weight does not fit x, a kernel is even, or dilation is below 1.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    impl = Impl(impl).value if isinstance(impl, Impl) else impl
    return torch.ops.foveate.large_kernel_attention(
        x, local_weight, local_bias, dilated_weight, dilated_bias, point_weight, point_bias, dilation, impl
    )


torch.library.define(
    "foveate::large_kernel_attention",
    "(Tensor x, Tensor local_weight, Tensor? local_bias, Tensor dilated_weight, Tensor? dilated_bias, "
    "Tensor point_weight, Tensor? point_bias, int dilation=3, str impl='auto') -> Tensor",
)


@torch.library.impl("foveate::large_kernel_attention", "CompositeImplicitAutograd")
def _large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    dilation: int = 3,
    impl: str = "auto",
) -> Tensor:
    _check(x, local_weight, dilated_weight, point_weight, dilation)
    weights = [local_weight, local_bias, dilated_weight, dilated_bias, point_weight, point_bias]
    run = choose(OP, impl, why_not_fused(x, weights))
    if run is Impl.FUSED:
        return _fused(x, weights, dilation)
    # A tracer wants the plain graph; a GPU's convolutions do not need the detour.
    by_groups = run is Impl.TILED and type(x) is Tensor and not x.is_cuda
    gate = depthwise(x, local_weight, local_bias)
    gate = (depthwise_by_groups if by_groups else depthwise)(gate, dilated_weight, dilated_bias, dilation)
    return x * F.conv2d(gate, point_weight, point_bias)


def _fused(x: Tensor, weights: list[Tensor | None], dilation: int) -> Tensor:
    from ..kernels.large_kernel import large_kernel_attention  # here, so that CPU users need no Triton

    low, *weights = (None if t is None else cast_for_autocast(t)[0] for t in (x, *weights))
    with no_autocast(x):
        return large_kernel_attention(low, *weights, dilation).to(x.dtype)


def why_not_fused(x: Tensor, weights: list[Tensor | None]) -> str | None:
    """Return the reason why no fused kernel can run on these tensors, or None."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        return "the kernel has no gradient; training takes the convolutions of cuDNN"
    if x.shape[1] > MOST_CHANNELS:
        return f"the kernel takes at most {MOST_CHANNELS} channels, got {x.shape[1]}"
    return why_no_kernel(x)


def _check(x: Tensor, local_weight: Tensor, dilated_weight: Tensor, point_weight: Tensor, dilation: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (B, C, H, W), got shape {tuple(x.shape)}")
    channels = x.shape[1]
    for name, weight in (("local_weight", local_weight), ("dilated_weight", dilated_weight)):
        shape = tuple(weight.shape)
        if len(shape) != 4 or shape[:2] != (channels, 1) or shape[2] % 2 == 0 or shape[3] % 2 == 0:
            raise ValueError(f"{OP}: {name} must be (C = {channels}, 1, k, k) with k odd, got {shape}")
    if tuple(point_weight.shape) != (channels, channels, 1, 1):
        raise ValueError(f"{OP}: point_weight must be {(channels, channels, 1, 1)}, got {tuple(point_weight.shape)}")
    if dilation < 1:
        raise ValueError(f"{OP}: dilation must be at least 1, got {dilation}")


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Depthwise convolution with zero padding that keeps the size: (B, C, H, W) -> (B, C, H, W)."""
    padding = [dilation * (k // 2) for k in weight.shape[2:]]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


def depthwise_by_groups(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The same as `depthwise`: every dilation group is an image of its own. Two copies of the map."""
    height, width = x.shape[2:]
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % dilation, 0, -height % dilation))
    x = x.unflatten(2, (-1, dilation)).unflatten(1, (-1, dilation))  # (B, Y, dy, X, dx, C)
    groups = x.permute(0, 2, 4, 1, 3, 5)
    images = groups.reshape(-1, *groups.shape[3:]).permute(0, 3, 1, 2)  # (B * dy * dx, C, Y, X), channels last
    images = depthwise(images, weight, bias).permute(0, 2, 3, 1)
    x = images.reshape(groups.shape).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width].permute(0, 3, 1, 2)


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
