"""2-D attention as ops: each file holds the promise, the checks, the reference and the choice of body."""

from ._choice import Impl
from .large_kernel import LargeKernelAttention, large_kernel_attention
from .neighborhood import NeighborhoodAttention2d, neighborhood_attention

__all__ = [
    "Impl",
    "LargeKernelAttention",
    "NeighborhoodAttention2d",
    "large_kernel_attention",
    "neighborhood_attention",
]
