"""2-D attention as ops: each file holds the promise, the checks, the reference and the choice of body."""

from ._choice import Impl
from .neighborhood import NeighborhoodAttention2d, neighborhood_attention

__all__ = ["Impl", "NeighborhoodAttention2d", "neighborhood_attention"]
