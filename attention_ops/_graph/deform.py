"""Deformable convolution for exporters: torchvision's operator is unknown to most of them.

Semantics  those of torchvision's `deform_conv2d` without a mask: bilinear samples, of which the part outside the map
           counts as zero; offsets are (rows, columns) of each tap, row-major.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sizes import image_numbers, sides


def deform_conv2d_graph(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolve without padding or dilation, by four gathers of rows and one product.

    Args:
        x: (B, C, H, W).
        offset: (B, 2 * rows * columns, h, w), in tokens.
        weight: (D, C, rows, columns).
        bias: (D,).
        stride: tokens.

    Returns:
        (B, D, h, w).
    """
    (rows, cols), (height, width) = weight.shape[2:], sides(offset, 2)
    moved = offset.permute(0, 2, 3, 1).unflatten(3, (rows * cols, 2))  # (B, h, w, taps, 2)
    taps = torch.arange(rows * cols, device=x.device)
    row = torch.arange(height, device=x.device)[:, None, None] * stride + taps // cols  # (h, 1, taps)
    col = torch.arange(width, device=x.device)[:, None] * stride + taps % cols  # (w, taps)
    samples = _sample(x, row + moved[..., 0], col + moved[..., 1])  # (B, h, w, taps, C)
    out = F.linear(samples.flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return out.permute(0, 3, 1, 2)


def _sample(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Bilinear samples of (B, C, H, W) at positions (B, h, w, taps): (B, h, w, taps, C)."""
    (height, width), (top, left) = sides(x, 2), (row.floor(), col.floor())
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # of all images: (B * H * W, C)
    first = (image_numbers(x) * (height * width))[:, None, None, None]
    below, right = row - top, col - left
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for y, of_row in ((top, 1 - below), (top + 1, below)):
        for z, of_col in ((left, 1 - right), (left + 1, right)):
            inside = (y >= 0) & (y <= height - 1) & (z >= 0) & (z <= width - 1)
            place = torch.where(inside, y * width + z, 0.0).long() + first  # onnxscript breaks clamps of one tensor
            picked = rows.index_select(0, place.flatten()).unflatten(0, tuple(place.shape))
            total = total + picked * torch.where(inside, of_row * of_col, 0.0)[..., None]
    return total
