"""2-D attention as ops: each file holds the promise, the checks, the reference and the choice of body."""

from ._op import Impl
from .bi_level_routing import BiLevelRoutingAttention, BiLevelRoutingAttentionNchw, RegionPool
from .channel import ChannelAttention, channel_attention
from .channel_gate import EfficientChannelAttention, channel_gate
from .circle import circle_attention, circle_attention_lse
from .dense import dense
from .grouped_query import GroupedQueryAttention, grouped_query_attention
from .halo import HaloAttention2d, halo_attention, halo_attention_lse
from .hilo import HiLoAttention, hilo_attention
from .insert import insert_attention
from .large_kernel import LargeKernelAttention, large_kernel_attention
from .merge import merge_attention
from .neighborhood import NeighborhoodAttention2d, neighborhood_attention, neighborhood_attention_lse
from .routed import bi_level_routes, routed_attention
from .strip_gate import EfficientLocalAttention, strip_gate
from .subspace_gate import SubspaceAttention, subspace_gate
from .window import WindowAttention2d, window_attention, window_attention_lse

__all__ = [
    "BiLevelRoutingAttention",
    "BiLevelRoutingAttentionNchw",
    "ChannelAttention",
    "EfficientChannelAttention",
    "EfficientLocalAttention",
    "GroupedQueryAttention",
    "HaloAttention2d",
    "HiLoAttention",
    "Impl",
    "LargeKernelAttention",
    "NeighborhoodAttention2d",
    "RegionPool",
    "SubspaceAttention",
    "WindowAttention2d",
    "bi_level_routes",
    "channel_attention",
    "channel_gate",
    "circle_attention",
    "circle_attention_lse",
    "dense",
    "grouped_query_attention",
    "halo_attention",
    "halo_attention_lse",
    "hilo_attention",
    "insert_attention",
    "large_kernel_attention",
    "merge_attention",
    "neighborhood_attention",
    "neighborhood_attention_lse",
    "routed_attention",
    "strip_gate",
    "subspace_gate",
    "window_attention",
    "window_attention_lse",
]
