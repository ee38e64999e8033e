"""2-D attention as ops: each file holds the promise, the checks, the reference and the choice of body."""

from ._op import Impl
from .agent import agent_attention
from .agent_layer import AgentAttention, ReducedAgentAttention
from .aggregated import aggregated_attention
from .bi_level_routing import BiLevelRoutingAttention, BiLevelRoutingAttentionNchw, RegionPool
from .channel import ChannelAttention, channel_attention
from .channel_gate import EfficientChannelAttention, channel_gate
from .circle import circle_attention, circle_attention_lse
from .circle_layer import CircleAttention, JointCircleAttention
from .dense import dense
from .dense_attention import dense_attention
from .flow import FlowAttention, FlowAttention2d, flow_attention
from .gated import GatedAttention
from .grouped_query import GroupedQueryAttention, grouped_query_attention
from .halo import HaloAttention2d, halo_attention, halo_attention_lse
from .hilo import HiLoAttention, hilo_attention
from .insert import insert_attention
from .kernelized import KernelizedAttention, kernelized_attention
from .large_kernel import LargeKernelAttention, large_kernel_attention
from .losses import commitment_loss, load_balance_loss
from .merge import merge_attention
from .moh import MohAggregatedAttention, MohAttention
from .neighborhood import NeighborhoodAttention2d, neighborhood_attention, neighborhood_attention_lse
from .reattend import reattend
from .reversed import MessageAttention, ReversedAttention, reversed_attention
from .routed import bi_level_routes, routed_attention
from .routing import cluster_attention, cluster_members
from .routing_layer import ClusterRouting, RoutingAttention
from .self_attention import SelfAttention
from .sparse import sparse_attention
from .sparsified import MaskPredictor, SparsifiedAttention
from .strip_gate import EfficientLocalAttention, strip_gate
from .subspace_gate import SubspaceAttention, subspace_gate
from .window import WindowAttention2d, window_attention, window_attention_lse

__all__ = [
    "AgentAttention",
    "BiLevelRoutingAttention",
    "BiLevelRoutingAttentionNchw",
    "ChannelAttention",
    "CircleAttention",
    "ClusterRouting",
    "EfficientChannelAttention",
    "EfficientLocalAttention",
    "FlowAttention",
    "FlowAttention2d",
    "GatedAttention",
    "GroupedQueryAttention",
    "HaloAttention2d",
    "HiLoAttention",
    "Impl",
    "JointCircleAttention",
    "KernelizedAttention",
    "LargeKernelAttention",
    "MaskPredictor",
    "MessageAttention",
    "MohAggregatedAttention",
    "MohAttention",
    "NeighborhoodAttention2d",
    "ReducedAgentAttention",
    "RegionPool",
    "ReversedAttention",
    "RoutingAttention",
    "SelfAttention",
    "SparsifiedAttention",
    "SubspaceAttention",
    "WindowAttention2d",
    "agent_attention",
    "aggregated_attention",
    "bi_level_routes",
    "channel_attention",
    "channel_gate",
    "circle_attention",
    "circle_attention_lse",
    "cluster_attention",
    "cluster_members",
    "commitment_loss",
    "dense",
    "dense_attention",
    "flow_attention",
    "grouped_query_attention",
    "halo_attention",
    "halo_attention_lse",
    "hilo_attention",
    "insert_attention",
    "kernelized_attention",
    "large_kernel_attention",
    "load_balance_loss",
    "merge_attention",
    "neighborhood_attention",
    "neighborhood_attention_lse",
    "reattend",
    "reversed_attention",
    "routed_attention",
    "sparse_attention",
    "strip_gate",
    "subspace_gate",
    "window_attention",
    "window_attention_lse",
]
