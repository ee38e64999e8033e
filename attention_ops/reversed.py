"""Reversed attention: every token sends its value to the tokens that it attends to, its parents.

Paper      Ding et al. 2023, arXiv:2304.03282 (DependencyViT). The authors published no code. The layer follows
           huggingface/pytorch-image-models pull request 2062, whose author reports a lower accuracy than the paper.
Semantics  A = softmax over r of scale * q_s . k_r; out_r = sum over s of A[s, r] * weight_s * v_s, per head.
Tiled      the rows of A are complete for some senders at a time, so that memory is linear in the tokens; the backward
           pass makes them again.
Fused      two passes: the log-sum-exp of every row, then for a tile of receivers the sum over senders, which is what
           attention's backward pass computes for values.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attend import EagerBody, accumulator, of_one_layout
from ._checks import why_no_attention_kernel
from ._graph.tiles import product
from ._op import Impl, declare, run
from .dense_attention import check_gate, check_tokens
from .mixers import register_mixer
from .tiled_attention import CHUNK_LOGITS

OP = "reversed_attention"
SHARPNESS = 10.0  # 1 / temperature of the softmax that selects heads


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Sum for every token what the tokens that attend to it send: out_r = sum over s of A[s, r] * weight_s * v_s.

    Cost: N * N * head_dim multiply-adds per head, twice; the kernel computes the logits twice. Memory is linear in N.

    Args:
        q, k: (B, N, heads, head_dim); v: (B, N, heads, value_dim). One dtype and device; strided views are fine.
        weight: (B, N, heads), of the sender's message; dtype of q.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, N, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, weight, scale, impl)


def _check(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> None:
    check_tokens(OP, q, k, v)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"{OP}: k must have the {q.shape[1]} tokens of q, got {k.shape[1]}")
    check_gate(OP, "weight", weight, q, "(B, N, heads)")


def reversed_attention_reference(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float) -> Tensor:
    """The definition, with the whole matrix; float32 inside at least."""
    wide = accumulator(q.dtype)
    logits = torch.einsum("bshd,brhd->bhsr", q.to(wide), k.to(wide)) * scale
    sent = v.to(wide) * weight.to(wide)[..., None]
    return torch.einsum("bhsr,bshd->brhd", logits.softmax(-1), sent).to(q.dtype)


def reversed_attention_graph(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Plain differentiable torch, with the whole matrix."""
    queries, keys, sent = (x.transpose(1, 2) for x in (q, k, v * weight[..., None]))  # (B, heads, N, d)
    probs = product(queries * scale, keys, transposes=True).softmax(-1).to(v.dtype)
    return of_one_layout(product(probs.transpose(-2, -1), sent).transpose(1, 2))


class _BySenders(EagerBody):
    """Some senders of some images at a time. Tensors: q, k, sent; (B, heads, N, d)."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, sent: Tensor) -> Tensor:
        wide = accumulator(q.dtype)
        out = torch.zeros(sent.shape, dtype=wide, device=q.device)
        for images, senders in self._chunks(q):
            probs = self._probabilities(q[images, :, senders], k[images])
            out[images] += torch.matmul(probs.mT, sent[images, :, senders].to(wide))
        return out.to(q.dtype)

    def backward(self, out: Any, grad: Tensor, q: Tensor, k: Tensor, sent: Tensor) -> tuple[Tensor, ...]:
        wide = accumulator(q.dtype)
        dq, dsent = q.new_empty(q.shape), sent.new_empty(sent.shape)
        dk = torch.zeros(k.shape, dtype=wide, device=k.device)
        for images, senders in self._chunks(q):
            queries, keys, of_out = q[images, :, senders], k[images].to(wide), grad[images].to(wide)
            message = sent[images, :, senders].to(wide)
            probs = self._probabilities(queries, k[images])
            dmessage = torch.matmul(probs, of_out)
            delta = (message * dmessage).sum(-1, keepdim=True)
            dlogits = probs * (torch.matmul(message, of_out.mT) - delta)
            dsent[images, :, senders] = dmessage.to(sent.dtype)
            dq[images, :, senders] = (torch.matmul(dlogits, keys) * self.scale).to(q.dtype)
            dk[images] += torch.matmul(dlogits.mT, queries.to(wide) * self.scale)
        return dq, dk.to(k.dtype), dsent

    def graph(self, q: Tensor, k: Tensor, sent: Tensor) -> Tensor:
        probs = torch.matmul(q * self.scale, k.mT).softmax(-1)
        return of_one_layout(torch.matmul(probs.mT, sent))

    def _chunks(self, q: Tensor) -> list[tuple[slice, slice]]:
        """Cut images, and the senders of one image where its matrix is too large."""
        batch, heads, tokens, _ = q.shape
        most = torch.get_num_threads() * CHUNK_LOGITS
        step = max(most // max(heads * tokens * tokens, 1), 1)
        length = max(min(most // max(heads * tokens, 1), tokens), 1)
        starts = ((image, row) for image in range(0, batch, step) for row in range(0, tokens, length))
        return [(slice(image, image + step), slice(row, row + length)) for image, row in starts]

    def _probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        wide = accumulator(q.dtype)
        return torch.matmul(q.to(wide) * self.scale, k.to(wide).mT).softmax(-1)


def reversed_attention_tiled(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Complete rows of the matrix for some senders at a time."""
    queries, keys, sent = (x.transpose(1, 2) for x in (q, k, v * weight[..., None]))
    return _BySenders(scale)(queries, keys, sent).transpose(1, 2).contiguous()


def _fused(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float) -> Tensor:
    from ..kernels.clipped.launch import reversed_attention as kernels  # here, so that CPU users need no Triton

    return kernels(q[:, None], k[:, None], v[:, None], weight[:, None], scale)[:, 0]


def _macs(q: Tensor, v: Tensor) -> int:
    batch, tokens, heads, dim = q.shape
    return batch * heads * tokens * tokens * (dim + v.shape[3])


declare(
    reversed_attention,
    check=_check,
    reference=reversed_attention_reference,
    tiled=reversed_attention_tiled,
    graph=reversed_attention_graph,
    fused=_fused,
    why_not_fused=why_no_attention_kernel,
    cast=("q", "k", "v", "weight"),
    macs=_macs,
)


class MessageController(nn.Module):
    """What a token's message is worth: (B, N, C) -> (B, N), above 0 and below 1."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, bias=False, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))).squeeze(-1).sigmoid()


class MessageAttention(nn.Module):
    """Reversed attention with its projections, the selection of heads and the control of messages.

    A token spreads its message over heads by a softmax with temperature 0.1 of a linear layer, and scales it by m in
    (0, 1) from a small MLP. m is multiplied over the layers of a model: the layer takes that of the layers before and
    returns the product.

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        qkv_bias: give the qkv projection a bias.
        hidden_ratio: hidden channels of the MLP of messages, as a share of dim.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        hidden_ratio: float = 0.5,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{type(self).__name__}: num_heads must divide dim {dim}, got {num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale, self.sharpness = (dim // num_heads) ** -0.5, SHARPNESS
        self.head_selector = nn.Linear(dim, num_heads, bias=False, **dd)
        self.message_controller = MessageController(dim, int(dim * hidden_ratio), **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) and the product of m of the layers before, (B, N) -> the output, and m with this layer's."""
        weight, m = self.weigh(x, m)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        out = reversed_attention(q, k, v, weight, scale=self.scale)
        return self.proj_drop(self.proj(out.flatten(2))), m

    def weigh(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of every message, (B, N, heads), and the product of m up to this layer, (B, N)."""
        selected = F.softmax(self.head_selector(x) * self.sharpness, dim=-1)
        m = m * self.message_controller(x)
        return selected * m[..., None], m

    @torch.jit.ignore
    def dependency_mask(self, x: Tensor, m: Tensor) -> Tensor:
        """Return (B, receivers, senders): what reaches whom, summed over heads. Memory N * N; for pictures."""
        weight, _ = self.weigh(x, m)
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        probs = (torch.einsum("bshd,brhd->bhsr", q, k) * self.scale).softmax(-1)
        return torch.einsum("bhsr,bsh->brs", probs, weight)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


@register_mixer("reversed")
class ReversedAttention(nn.Module):
    """`MessageAttention` as a mixer: on its own, with no layers before it.

    Args:
        dim, num_heads, kwargs: see `MessageAttention`.
        map_size, prefix_tokens: as every mixer takes them; nothing in the layer depends on them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        del map_size, prefix_tokens
        self.messages = MessageAttention(dim, num_heads, **kwargs)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # (B, N, C) -> (B, N, C)
        """`size` is not read, since nothing depends on where tokens lie."""
        return self.messages(x, x.new_ones(x.shape[0], x.shape[1]))[0]
