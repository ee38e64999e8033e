"""Channel attention: the channels of a head attend to each other, over all tokens of the map.

Paper      Ding et al. 2022, arXiv:2204.03645 (DaViT), figure 3b: channels are the tokens, positions their features.
Roles      here q, k, v mean query, key and value. DaViT's own projections name them otherwise: its slots q, k, v are
           value, query and key, which `ChannelAttention` sorts out; Florence-2 (arXiv:2311.06242) took the usual order
           and another scale.
Tiled      two batched products of head_dim x head_dim logits, linear in the map's tokens.
"""

import torch
from torch import Tensor, nn

from ._attend import accumulator
from ._checks import check_qkv, why_no_attention_kernel
from ._graph.tiles import product
from ._op import Impl, declare, run
from .packed import unpack

OP = "channel_attention"


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """Attend from every channel of a head to the head's channels: softmax(scale * q^T k) v^T, transposed back.

    Cost: H * W * head_dim ** 2 multiply-adds per head, twice.

    Args:
        q, k, v: (B, H, W, heads, head_dim), one shape, dtype and device; strided views are fine.
        scale: multiplies q . k, a sum over H * W tokens; head_dim ** -0.5 when None, as in DaViT.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, head_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, scale, impl)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_qkv(OP, q, k, v)


def channel_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition, float32 inside at least."""
    wide = accumulator(q.dtype)
    logits = torch.einsum("bhwni,bhwnj->bnij", q.to(wide), k.to(wide)) * scale
    return torch.einsum("bnij,bhwnj->bhwni", logits.softmax(-1), v.to(wide)).to(q.dtype)


def channel_attention_tiled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Two batched products. The sums over all tokens are made in float32: in 16 bits they lose digits or overflow."""
    size, wide = q.shape[1:3], accumulator(q.dtype)
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, d)
    logits = product(q.to(wide).transpose(-2, -1), k.to(wide)) * scale
    out = product(v, logits.softmax(-1).to(v.dtype), transposes=True)  # (B, heads, N, d)
    return out.transpose(1, 2).unflatten(1, size)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from ..kernels.channel import channel_attention as kernels  # here, so that CPU users need no Triton

    return kernels(q, k, v, scale)[0]


def _macs(q: Tensor) -> int:
    return 2 * q.numel() * q.shape[-1]


declare(
    channel_attention,
    check=_check,
    reference=channel_attention_reference,
    tiled=channel_attention_tiled,
    fused=_fused,
    why_not_fused=why_no_attention_kernel,
    macs=_macs,
)


class ChannelAttention(nn.Module):
    """Channel attention with its projections, on channels-last maps.

    Args:
        dim: channels; heads must divide it.
        heads: number of groups of channels.
        qkv_bias: give the qkv projection a bias.
        by_tokens: Florence-2's form: slots q, k, v mean what they say and the logits are scaled by tokens ** -0.5.
            Otherwise DaViT's: the slots hold value, query, key, and the scale is head_dim ** -0.5.
    """

    def __init__(
        self, dim: int, heads: int, *, qkv_bias: bool = True, by_tokens: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"ChannelAttention: heads must divide dim {dim}, got {heads}")
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.by_tokens = by_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        first, second, third = unpack(self.qkv(x).unflatten(-1, (3, self.heads, -1)), 3)  # (B, H, W, heads, head_dim)
        if self.by_tokens:
            first = first * (x.shape[1] * x.shape[2]) ** -0.5  # not as the op's scale: an exported graph knows no size
            out = channel_attention(first, second, third, scale=1.0)
        else:
            out = channel_attention(second, third, first, scale=self.scale)
        return self.proj(out.flatten(3))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, by_tokens={self.by_tokens}"
