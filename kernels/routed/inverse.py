"""Which regions of queries see a region of keys: what the backward pass of routed attention sums over.

With these lists a region of keys finds its own queries, so nothing is added atomically and the bits do not vary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_TOKENS = 2048  # query tokens that one program of the backward pass walks, at least


@dataclass(frozen=True)
class InverseRoutes:
    """For every region of keys of every image, the regions of queries that see it, cut into pieces.

    The list of a region that many regions see is long. Beyond its first `piece` regions it is cut into extra pieces.
    Other programs sum the extra pieces first; the program of the first piece begins with their sums.
    """

    queries: Tensor  # (B * regions * topk,) int32: regions of queries, list after list
    starts: Tensor  # (B * regions,) int32: where a list begins in `queries`
    ends: Tensor  # (B * regions,) int32: where it ends
    extra_starts: Tensor  # (B * regions,) int32: the first extra piece of a list
    extra_owners: Tensor  # (extras,) int32: the list that an extra piece belongs to; B * regions: none
    piece: int  # regions of queries in one piece

    @property
    def extras(self) -> int:
        """Extra pieces at most, known without a look at the routes."""
        return self.extra_owners.numel()


def piece_size(regions: int, topk: int, tokens: int) -> int:
    """How many regions of queries one program walks: four times the mean, so that few lists are cut."""
    return min(max(4 * topk, -(-PIECE_TOKENS // tokens)), regions * topk)


def invert_routes(routes: Tensor, tokens: int) -> InverseRoutes:
    """Invert (B, regions, topk) routes, in the order of the regions of queries. Nothing waits for the device.

    For any number of regions; where there are few, invert.py does the same in one launch.

    Args:
        routes: (B, regions, topk) int64, in 0 ... regions - 1.
        tokens: of a region of queries.
    """
    batch, regions, topk = routes.shape
    piece = piece_size(regions, topk, tokens)
    images = torch.arange(batch, device=routes.device).mul_(regions).view(batch, 1, 1)
    keys, order = (routes + images).flatten().sort(stable=True)
    lists = torch.arange(batch * regions + 1, device=routes.device)
    starts = torch.searchsorted(keys, lists)
    extra_starts = torch.zeros_like(starts)
    torch.cumsum(((starts.diff() - 1) // piece).clamp_(min=0), 0, out=extra_starts[1:])
    places = torch.arange(batch * regions * topk // piece if regions > piece else 0, device=routes.device)
    owners = torch.searchsorted(extra_starts[1:], places, right=True)
    queries = order // topk % regions
    starts = starts.int()
    return InverseRoutes(queries.int(), starts[:-1], starts[1:], extra_starts[:-1].int(), owners.int(), piece)
