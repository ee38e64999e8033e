"""How a strip of means becomes gates: a convolution along the strip, GroupNorm, a sigmoid. No Triton needed.

A strip is 1 / H or 1 / W of its map, so these passes cost little; only strip_gate.py reads the map.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class StripNorm(NamedTuple):
    """The weights of a strip gate; they are cast to the type of a strip, (B, C, L)."""

    weight: Tensor  # (C, C / groups, k)
    norm_weight: Tensor
    norm_bias: Tensor
    norm_groups: int
    eps: float

    def convolve(self, strip: Tensor) -> Tensor:
        return F.conv1d(
            strip, self.weight.to(strip.dtype), padding=self.weight.shape[-1] // 2, groups=self._conv_groups
        )

    @property
    def _conv_groups(self) -> int:
        return self.weight.shape[0] // self.weight.shape[1]

    def gate(self, strip: Tensor) -> Tensor:
        y = self.convolve(strip)
        return F.group_norm(
            y, self.norm_groups, self.norm_weight.to(y.dtype), self.norm_bias.to(y.dtype), self.eps
        ).sigmoid()

    def grads(self, strip: Tensor, dgate: Tensor) -> list[Tensor]:
        """Gradients of the strip, the weight, the norm's weight and its bias, in the type of the strip."""
        (batch, channels, length), scale = strip.shape, self.norm_weight.to(strip.dtype)
        y = self.convolve(strip)
        z, mean, rstd = torch.ops.aten.native_group_norm(
            y, scale, self.norm_bias.to(strip.dtype), batch, channels, length, self.norm_groups, self.eps
        )
        dz = dgate * z.sigmoid() * (-z).sigmoid()
        dy, dscale, dbias = torch.ops.aten.native_group_norm_backward(
            dz, y, mean, rstd, scale, batch, channels, length, self.norm_groups, [True, True, True]
        )
        padding, groups = [self.weight.shape[-1] // 2], self._conv_groups
        dstrip, dweight, _ = torch.ops.aten.convolution_backward(
            dy, strip, self.weight.to(strip.dtype), None, [1], padding, [1], False, [0], groups, [True, True, False]
        )
        return [dstrip, dweight, dscale, dbias]
