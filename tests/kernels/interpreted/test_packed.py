"""Layers whose q, k and v are slices of one projection: its gradient is written by the kernels, not stacked."""

import copy

import pytest
import torch

from foveate.attention_ops import (
    ChannelAttention,
    HiLoAttention,
    NeighborhoodAttention2d,
    WindowAttention2d,
    packed,
)
from foveate.backbones.biformer import DenseLepeAttention
from foveate.backbones.fv_davit import TileAttention

LAYERS = {
    "neighborhood": (lambda: NeighborhoodAttention2d(32, 2, 3), (2, 7, 9, 32)),
    "neighborhood, dilated": (lambda: NeighborhoodAttention2d(32, 2, 3, 2, rel_pos_bias=False), (2, 7, 9, 32)),
    "one tile": (lambda: NeighborhoodAttention2d(32, 2, 7), (2, 7, 7, 32)),
    "head_dim 24": (lambda: NeighborhoodAttention2d(48, 2, 3, rel_pos_bias=False), (1, 5, 5, 48)),
    "window": (lambda: WindowAttention2d(32, 2, 4), (2, 8, 8, 32)),
    "window, padded": (lambda: WindowAttention2d(32, 2, 4), (1, 7, 9, 32)),
    "tiles of a map": (lambda: TileAttention(32, 2, 4), (1, 7, 9, 32)),
    "hilo": (lambda: HiLoAttention(32, 2, 2, 0.0), (1, 6, 8, 32)),
    "dense": (lambda: DenseLepeAttention(32, 2), (1, 5, 6, 32)),
    "channel": (lambda: ChannelAttention(32, 2), (2, 5, 6, 32)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_projection_is_not_stacked(monkeypatch, name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    double, x = copy.deepcopy(layer).double(), torch.randn(shape, requires_grad=True)
    out = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(packed.torch, "stack", None)
        found = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    wide = x.detach().double().requires_grad_()
    true = torch.autograd.grad(double(wide).square().sum(), [wide, *double.parameters()])
    for ours, wanted in zip(found, true, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)


def test_windows_of_davit_are_read_in_place(monkeypatch):
    torch.manual_seed(0)
    layer, x = TileAttention(32, 2, 4), torch.randn(1, 7, 9, 32)
    cut = layer.cut(x)
    monkeypatch.setattr(TileAttention, "cut", None)
    torch.testing.assert_close(layer(x), cut, rtol=1e-4, atol=1e-5)
