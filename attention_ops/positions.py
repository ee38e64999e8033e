"""Tables with one row per token of a map, such as position embeddings, for maps of another size.

Rows are interpolated as a map is: bicubic, antialiased where it shrinks, as torch.nn.functional.interpolate does with
antialias=True and timm does with position embeddings. It is spelled out as two products, one an axis, so that exported
files can leave the size free.
"""

import torch
from torch import Tensor

from ._graph.sizes import is_surely


def resample_table(table: Tensor, size: tuple[int, int], made_for: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Return a table for a map of another size; the table itself where the size is the same.

    Args:
        table: (prefix_tokens + rows * columns, channels).
        size: (rows, columns) of the map at hand.
        made_for: (rows, columns) of the table.
        prefix_tokens: rows before those of the map, which stay.

    Returns:
        (prefix_tokens + size[0] * size[1], channels), dtype of the table.
    """
    if torch.jit.is_scripting():
        same = size[0] == made_for[0] and size[1] == made_for[1]
    else:
        same = is_surely(size[0] == made_for[0]) and is_surely(size[1] == made_for[1])
    if same:
        return table
    of_map = table[prefix_tokens:].float() if table.dtype in (torch.float16, torch.bfloat16) else table[prefix_tokens:]
    channels = table.shape[1]
    rows = torch.matmul(resize_matrix(size[0], made_for[0], of_map), of_map.reshape(made_for[0], -1))
    by_column = rows.reshape(size[0], made_for[1], channels).transpose(0, 1).reshape(made_for[1], -1)
    cols = torch.matmul(resize_matrix(size[1], made_for[1], of_map), by_column)
    of_map = cols.reshape(size[1], size[0], channels).transpose(0, 1).reshape(-1, channels).to(table.dtype)
    return of_map if prefix_tokens == 0 else torch.cat([table[:prefix_tokens], of_map])


def resize_matrix(length: int, made_for: int, like: Tensor) -> Tensor:
    """(length, made_for): the weights with which an axis of `made_for` entries becomes one of `length`."""
    out = torch.arange(length, device=like.device).to(like.dtype)
    source = torch.arange(made_for, device=like.device).to(like.dtype)
    step = made_for / (out[-1:] + 1)  # the length as a tensor: it may be a free size
    stretch = step.clamp(min=1.0)
    apart = ((source + 0.5 - ((out + 0.5) * step)[:, None]) / stretch).abs()
    weights = torch.where(apart < 1, (1.5 * apart - 2.5) * apart * apart + 1, 0.0)
    weights = torch.where((apart >= 1) & (apart < 2), ((2.5 - 0.5 * apart) * apart - 4) * apart + 2, weights)
    return weights / weights.sum(-1, keepdim=True)
