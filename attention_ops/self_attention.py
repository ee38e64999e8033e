"""Plain self-attention as a token mixer: the baseline of the others."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._attend import sdpa
from ._op import is_traced, under_transform
from .mixers import register_mixer


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Run SDPA on (B, heads, N, d); also under torch.func and for second derivatives, which its fast kernel has not."""
    if torch.compiler.is_compiling():  # it cannot follow the questions below
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if under_transform((q, k, v)):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if is_traced((q, k, v)):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return sdpa(q, k, v, scale)


@register_mixer("attention")
class SelfAttention(nn.Module):
    """Multi-head self-attention of all tokens to all tokens, by scaled_dot_product_attention (see mixers.py).

    Cost: N ** 2 * head_dim multiply-adds per head, twice. Prefix tokens are tokens like the others.

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        map_size, prefix_tokens: of all mixers; this one needs neither.
        qkv_bias: give the qkv projection a bias.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.map_size = tuple(map_size)
        self.prefix_tokens = prefix_tokens
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, N, C) -> (B, N, C)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, head_dim)
        q, k, v = qkv.unbind(0)
        if torch.jit.is_scripting():
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            out = attend(q, k, v, self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
