"""The lists of who sees a region (Triton), in one launch where a map has few regions; inverse.py describes them.

Paper      Zhu et al. 2023, arXiv:2303.08810 (BiFormer): what the backward pass of routed attention walks.
Tensors    routes: (B, regions, topk) int64; one out of range is in no list. Lists: see `InverseRoutes`, int32.
Grid       B: a program holds how often each region of queries sees each region of keys of its image.
Numerics   integers; a list is in the order of the regions of queries.
Memory     reads the routes twice, writes the lists; no sort, no search.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import power_of_2
from .inverse import InverseRoutes, piece_size


@triton.jit
def invert_routes_kernel(
    routes_ptr, queries_ptr, starts_ptr, ends_ptr, extra_starts_ptr, owners_ptr, lists, topk, piece, extras,
    REGIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, i = tl.program_id(0), tl.arange(0, BLOCK)
    routes_ptr += image.to(tl.int64) * REGIONS * topk
    seen = tl.zeros((BLOCK, BLOCK), tl.int32)  # [query, key]
    for place in range(topk):
        route = tl.load(routes_ptr + i * topk + place, mask=i < REGIONS, other=-1)
        seen += (route[:, None] == i[None, :]).to(tl.int32)
    lengths = tl.sum(seen, 0)
    starts = image * REGIONS * topk + tl.cumsum(lengths, 0) - lengths
    tl.store(starts_ptr + image * REGIONS + i, starts, mask=i < REGIONS)
    tl.store(ends_ptr + image * REGIONS + i, starts + lengths, mask=i < REGIONS)
    slots = starts[None, :] + tl.cumsum(seen, 0) - seen  # where a query's next entry in the list of a key goes
    for place in range(topk):
        route = tl.load(routes_ptr + i * topk + place, mask=i < REGIONS, other=-1)
        hit = route[:, None] == i[None, :]
        slot = tl.sum(tl.where(hit, slots, 0), 1)
        tl.store(queries_ptr + slot, i, mask=(route >= 0) & (route < REGIONS))
        slots += hit.to(tl.int32)
    more = tl.maximum(lengths - 1, 0) // piece  # extra pieces of each list
    until = tl.cumsum(more, 0)
    if extras > 0:
        tl.store(extra_starts_ptr + image * REGIONS + i, image * extras + until - more, mask=i < REGIONS)
        for place in range(extras):
            owner = tl.sum(((until <= place) & (i < REGIONS)).to(tl.int32), 0)
            tl.store(owners_ptr + image * extras + place, tl.where(owner < REGIONS, image * REGIONS + owner, lists))


def launch_inverse(routes: Tensor, tokens: int) -> InverseRoutes:
    """Invert contiguous (B, regions, topk) routes; `tokens` are those of a region of queries."""
    batch, regions, topk = routes.shape
    piece = piece_size(regions, topk, tokens)
    extras = regions * topk // piece if regions > piece else 0
    lists = batch * regions
    sizes = (routes.numel(), lists, lists, lists if extras else 0, batch * extras)
    queries, starts, ends, extra_starts, owners = (
        torch.empty(size, dtype=torch.int32, device=routes.device) for size in sizes
    )
    invert_routes_kernel[(batch,)](
        routes, queries, starts, ends, extra_starts, owners, lists, topk, piece, extras,
        REGIONS=regions, BLOCK=power_of_2(regions, 16), num_warps=4,
    )  # fmt: skip
    return InverseRoutes(queries, starts, ends, extra_starts, owners, piece)
