"""Token mixers by name: modules that take the place of self-attention in a block of a transformer.

A mixer is a module with the constructor

    Mixer(dim, num_heads, *, map_size, prefix_tokens=0, qkv_bias=True, **keywords)

    dim            int     channels C, a multiple of num_heads
    map_size       (H, W)  the map that a position table is made for; forward may see another where the paper allows it
    prefix_tokens  int     tokens before the H W tokens of the map (class token, registers)
    qkv_bias       bool    bias of the projections of q, k and v

and the call

    mixer(x, size) -> (B, N, C)

    x      (B, N, C)  N = prefix_tokens + H W, tokens of the map row by row
    size   (H, W)     of the map of x

Where its mathematics has them, a mixer names its projections `qkv` (Linear, dim -> 3 dim, rows of q, then k, then v,
heads in order) and `proj` (Linear, dim -> dim), as timm's ViT does: weights of attention move into it by these names.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .._errors import did_you_mean

M = TypeVar("M", bound=type[nn.Module])

MIXERS: dict[str, type[nn.Module]] = {}


def register_mixer(name: str) -> Callable[[M], M]:
    """Class decorator: the mixer is known as `name`. Raises ValueError where the name is taken."""

    def add(cls: M) -> M:
        if name in MIXERS:
            raise ValueError(f"register_mixer: {name!r} is {MIXERS[name].__name__}, cannot be {cls.__name__} too")
        MIXERS[name] = cls
        return cls

    return add


def create_mixer(
    name: str, dim: int, num_heads: int, *, map_size: tuple[int, int], prefix_tokens: int = 0, **keywords: Any
) -> nn.Module:
    """The mixer `name`; see the module's text for the arguments. Raises ValueError for unknown names and keywords."""
    if name not in MIXERS:
        near = did_you_mean(name, list(MIXERS))
        raise ValueError(f"create_mixer: wanted one of {', '.join(sorted(MIXERS))}, got {name!r}{near}")
    if dim % num_heads:
        raise ValueError(f"create_mixer: wanted dim that num_heads={num_heads} divides, got {dim}")
    try:
        return MIXERS[name](dim, num_heads, map_size=map_size, prefix_tokens=prefix_tokens, **keywords)
    except TypeError as error:
        raise ValueError(f"create_mixer: {name}: {error}") from error
