"""Deformable convolution as files hold it: torchvision's results, in the map and past its border."""

import pytest
import torch
from torchvision.ops import deform_conv2d

from foveate.attention_ops._graph.deform import deform_conv2d_graph


@pytest.mark.parametrize("reach", [0.0, 0.7, 3.0, 40.0])
@pytest.mark.parametrize(("size", "taps", "stride"), [((6, 9), 2, 2), ((7, 5), 2, 2), ((8, 7), 3, 1)])
def test_it_equals_torchvisions_operator(reach, size, taps, stride):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, *size).double(), torch.randn(4, 3, taps, taps).double(), torch.randn(4).double()
    out = [(side - taps) // stride + 1 for side in size]
    offset = reach * torch.randn(2, 2 * taps * taps, *out).double()
    expected = deform_conv2d(x, offset, weight, bias, (stride, stride))
    torch.testing.assert_close(deform_conv2d_graph(x, offset, weight, bias, stride), expected)


def test_samples_on_the_border_and_between_it_and_the_next_row_of_zeros():
    x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
    for moved, expected in ((-1.0, 0.0), (-0.25, 0.75), (0.0, 1.0), (3.0, 1.0), (3.5, 0.5), (4.0, 0.0)):
        offset = torch.zeros(1, 2, 4, 4)
        offset[0, 0, 0, 0] = moved  # of the first token, in rows
        out = deform_conv2d_graph(x, offset, weight, None, 1)
        assert out[0, 0, 0, 0] == expected == deform_conv2d(x, offset, weight)[0, 0, 0, 0]
