"""What turns a strip of means into gates: a convolution along it, GroupNorm, a sigmoid; in float32, by torch.

A strip is 1 / H or 1 / W of its map, so these passes cost little; the map itself is read by strip_gate.py alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """The weights of a strip gate; strips are (B, C, L), fp32."""

    weight: Tensor  # (C, C / groups, k)
    norm_weight: Tensor
    norm_bias: Tensor
    groups: int
    eps: float

    def convolve(self, strip: Tensor) -> Tensor:
        return F.conv1d(strip, self.weight.float(), padding=self.weight.shape[-1] // 2, groups=self._conv_groups)

    @property
    def _conv_groups(self) -> int:
        return self.weight.shape[0] // self.weight.shape[1]

    def gate(self, strip: Tensor) -> Tensor:
        y = self.convolve(strip)
        return F.group_norm(y, self.groups, self.norm_weight.float(), self.norm_bias.float(), self.eps).sigmoid()

    def grads(self, strip: Tensor, dgate: Tensor) -> list[Tensor]:
        """Gradients of the strip, the weight, the norm's weight and its bias, fp32."""
        (batch, channels, length), scale = strip.shape, self.norm_weight.float()
        y = self.convolve(strip)
        z, mean, rstd = torch.ops.aten.native_group_norm(
            y, scale, self.norm_bias.float(), batch, channels, length, self.groups, self.eps
        )
        dz = dgate * z.sigmoid() * (-z).sigmoid()
        dy, dscale, dbias = torch.ops.aten.native_group_norm_backward(
            dz, y, mean, rstd, scale, batch, channels, length, self.groups, [True, True, True]
        )
        padding, groups = [self.weight.shape[-1] // 2], self._conv_groups
        dstrip, dweight, _ = torch.ops.aten.convolution_backward(
            dy, strip, self.weight.float(), None, [1], padding, [1], False, [0], groups, [True, True, False]
        )
        return [dstrip, dweight, dscale, dbias]
