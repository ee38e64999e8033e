"""What a family says about itself to whoever prunes it: which weights do what, and how attention lays its heads out.

All patterns are regular expressions that must match a whole parameter or module name of the timm model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """A linear layer or 1x1 convolution whose rows belong to heads."""

    layer: str  # inside the attention module
    roles: tuple[str, ...] = ("q", "k", "v")  # what the rows hold
    head_major: bool = False  # rows lie (heads, roles, channels) instead of (roles, heads, channels)


@dataclass(frozen=True)
class AttentionLayout:
    """Where an attention module keeps its heads."""

    modules: str
    kind: str | None = None  # only modules of the class with this name
    projections: tuple[Projection, ...] = (Projection("qkv"),)
    out: str | None = "proj"  # the layer that reads the heads' outputs; None: whoever reads the module
    heads: str = "heads"  # the attribute that counts them
    per_head: tuple[tuple[str, int], ...] = ()  # (parameter, axis) with one entry a head
    per_value: tuple[str, ...] = ()  # depthwise convolutions of v
    per_query: tuple[tuple[str, int], ...] = ()  # (parameter, axis) along the q and k channels, shared by the heads
    widths: tuple[tuple[str, str], ...] = ()  # (attribute, role): channels of a head that the module keeps as a number
    value_widths: tuple[str, ...] = ()  # attributes that keep heads * channels of v
    cuts_heads: bool = True  # False: something else reads or adds to the heads' outputs channel by channel
    cuts_channels: bool = True  # False: channels of q, k, v are normalised or mixed with each other


@dataclass(frozen=True)
class Prunable:
    """The module groups of a family (weights by what they do; None: has none), and its attention modules."""

    qkv: str | None = None  # projections to queries, keys and values
    prj: str | None = None  # output projections of attention
    mlp: str | None = None  # both layers of the MLPs
    conv: str | None = None  # convolutions that mix channels inside residual branches
    depthwise: str | None = None
    gate: str | None = None  # squeeze-and-excitation and its kin
    attentions: tuple[AttentionLayout, ...] = ()
    square: str | None = None  # modules all of whose convolutions map one width to itself, channel i to a gate of i
