"""Importing this file registers the op of every kernel. A program exported on a GPU needs them to load."""

from . import channel, keys, mixture
from .agent import forward as agent
from .clipped import launch as clipped_launch
from .gates import channel_gate, large_kernel, strip_gate
from .local import launch
from .routed import backward, forward, routes

__all__ = [
    "agent",
    "backward",
    "channel",
    "channel_gate",
    "clipped_launch",
    "forward",
    "keys",
    "large_kernel",
    "launch",
    "mixture",
    "routes",
    "strip_gate",
]
