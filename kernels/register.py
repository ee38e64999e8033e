"""Importing this registers the op of every kernel, which a program that was exported on a GPU needs to load."""

from . import channel, gates_channel, gates_strip, large_kernel, local, routed, routed_backward

__all__ = ["channel", "gates_channel", "gates_strip", "large_kernel", "local", "routed", "routed_backward"]
