"""Products of tokens with the tokens around them, as the CPU bodies compute them: rows of a table by index.

A row is one head of one token. `NeighborDots` gives the logits of local keys, `NeighborSums` adds up local values; each
is the backward pass of the other. Both cost what they multiply: no copies of keys, and none for rows that are left out.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Neighbors:
    """Which rows of a table each row of a call sees, and the inverse.

    Args:
        index: (rows, places) int32, into the table; where a place has no row, any row.
        inverse: a function that returns (table rows, places): the row that sees a row of the table at a place, and
            whether there is one.
    """

    def __init__(self, index: Tensor, inverse: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.index, self.inverse = index, inverse

    def spread(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Sum weights * rows over the places at which a row of the table is seen: the adjoint of a gather."""
        index, seen = self.inverse()
        places = torch.arange(index.shape[1], device=index.device, dtype=index.dtype)
        weights = torch.where(
            seen, weights.flatten().index_select(0, (index * index.shape[1] + places).flatten()).view_as(index), 0
        )
        return sums(weights, rows, index)


def sums(weights: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """(M, places), (R, d), (M, places) -> (M, d): the weighted sum of the table's rows."""
    if not len(index) or not len(table):
        return table.new_zeros(len(index), table.shape[1])
    return F.embedding_bag(index, table, per_sample_weights=weights, mode="sum")


def dots(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """(M, d), (R, d), (M, places) -> (M, places): the product of each row with its rows of the table.

    It is what torch computes for the weights in the backward pass of an embedding bag, without copies of rows.
    """
    count, places = index.shape
    if not count or not len(table):
        return rows.new_zeros(index.shape)
    first, bag = _bags(count, places, index.device)
    multiply = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return multiply(rows.contiguous(), table, index.flatten(), first, bag, 0).view(index.shape)


@lru_cache(maxsize=32)
def _bags(count: int, places: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each bag begins, and the bag of each place; int32."""
    with torch.inference_mode(False):
        bags = torch.arange(count, device=device, dtype=torch.int32)
        return bags * places, bags.repeat_interleave(places)


class NeighborDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, near: Neighbors) -> Tensor:
        ctx.near = near
        ctx.save_for_backward(rows, table)
        return dots(rows, table, near.index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, table), grad, near = ctx.saved_tensors, grads[0].contiguous(), ctx.near
        return sums(grad, table, near.index), near.spread(grad, rows), None


class NeighborSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, near: Neighbors) -> Tensor:
        ctx.near = near
        ctx.save_for_backward(weights, table)
        return sums(weights, table, near.index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weights, table), grad, near = ctx.saved_tensors, grads[0].contiguous(), ctx.near
        return dots(grad, table, near.index), near.spread(weights, grad), None


class TakeRows(torch.autograd.Function):
    """(R, d), (M,) distinct rows -> (M, d)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.length, ctx.index = len(table), index
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return put_rows(grads[0], ctx.index, ctx.length), None


class PutRows(torch.autograd.Function):
    """(M, d), (M,) distinct rows of R -> (R, d), zeros elsewhere: the adjoint of `TakeRows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, length: int) -> Tensor:
        ctx.index = index
        return put_rows(rows, index, length)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.index), None, None


def put_rows(rows: Tensor, index: Tensor, length: int) -> Tensor:
    out = rows.new_zeros(length, rows.shape[1])
    out[index] = rows
    return out
