"""Maps resized and pooled: torch's functions, and products with matrices where a model becomes a file."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._graph.exporting import is_exported
from ._graph.resize import pool_by_products, resize_by_products
from ._graph.sizes import is_surely, known, sides


def resize_map(x: Tensor, height: int, width: int, cubic: bool = False) -> Tensor:
    """Resize (B, C, H, W), bilinear or bicubic, align_corners=False; a map of this size is returned as it is."""
    if torch.jit.is_scripting():
        if x.shape[2] == height and x.shape[3] == width:
            return x
        return F.interpolate(x, size=[height, width], mode="bicubic" if cubic else "bilinear", align_corners=False)
    else:
        own = sides(x, 2)
        if is_surely(own[0] == height) and is_surely(own[1] == width):
            return x
        if is_exported() or not known(*own, height, width):
            return resize_by_products(x, height, width, cubic)
        mode = "bicubic" if cubic else "bilinear"
        return F.interpolate(x, size=(height, width), mode=mode, align_corners=False)


def resize_positions(table: Tensor, own: tuple[int, int], height: int, width: int, cubic: bool = False) -> Tensor:
    """Resize position embeddings (1, rows * columns, C) of a map `own` to (1, height * width, C), contiguous."""
    on_map = table.transpose(1, 2).unflatten(2, [own[0], own[1]])
    return resize_map(on_map, height, width, cubic).flatten(2).transpose(1, 2).contiguous()


def pool_map(x: Tensor, rows: int, cols: int) -> Tensor:
    """Average (B, C, H, W) over rows x cols cells that cover it, as F.adaptive_avg_pool2d does."""
    if torch.jit.is_scripting():
        return F.adaptive_avg_pool2d(x, [rows, cols])  # type: ignore[arg-type]
    else:
        if is_exported() or not known(*sides(x, 2)):
            return pool_by_products(x, rows, cols)
        return F.adaptive_avg_pool2d(x, (rows, cols))
