"""Buffers that a body on a CPU reuses: the first touch of new memory costs as much as arithmetic on it."""

import torch
from torch import Tensor


class Buffers:
    """Buffers by name.

    Args:
        like: a tensor on the device of the buffers.
        dtype: of the buffers.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like = like
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[tuple[str, torch.Size], Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return uninitialized memory, the same for a name and shape each time. Ask for the largest shape first."""
        if (name, shape) not in self.views:
            if name not in self.buffers or self.buffers[name].numel() < shape.numel():
                self.buffers[name] = self.like.new_empty(shape.numel(), dtype=self.dtype)
            self.views[name, shape] = self.buffers[name][: shape.numel()].view(shape)
        return self.views[name, shape]

    def load(self, name: str, x: Tensor) -> Tensor:
        """Copy to contiguous memory."""
        return self.take(name, x.shape).copy_(x)

    def gather(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """(rows, tokens, ...) by (n, topk) -> (n, topk * tokens, ...)."""
        copies = self.take(name, torch.Size((index.numel(), *rows.shape[1:])))
        torch.index_select(rows.flatten(1), 0, index.flatten(), out=copies.flatten(1))
        return copies.view(len(index), -1, *rows.shape[2:])
