"""Layers that timm does not have."""

import torch
import torch.nn.functional as F

from foveate.backbones._layers import MapGELU


def test_map_gelu_is_exact_gelu_and_keeps_the_layout():
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    out = MapGELU()(x)
    torch.testing.assert_close(out, F.gelu(x))
    assert out.is_contiguous(memory_format=torch.channels_last)
