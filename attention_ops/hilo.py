"""HiLo attention: some heads see their window, the others see the whole map through pooled tokens.

Paper      Pan, Cai, Zhuang 2022, arXiv:2205.13213 (LITv2), section 3.3.
Semantics  those of the authors' code: int(heads * alpha) heads are low-frequency; tokens are pooled BEFORE they are
           projected to keys and values; with windows of one token all heads are low-frequency.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attend import accumulator, sdpa
from ._checks import check_alike, check_at_least
from ._graph.sizes import is_known
from ._graph.window import hilo_attention_graph
from ._op import OPS, Impl, SymSize, Tensors, declare, run
from .packed import unpack
from .tiling import crop, pad_to_windows
from .window import why_not_fused as why_no_window_kernel
from .window import (
    window_attention_fused,
    window_attention_reference,
    window_attention_tiled,
)

OP = "hilo_attention"


def hilo_attention(
    high: Tensors,
    low: Tensors,
    window_size: SymSize,
    *,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend inside windows with the heads of `high`, and to pooled tokens with the heads of `low`.

    Cost per head: H * W * (tokens of a window) * head_dim multiply-adds for a high one and H * W * h * w * head_dim for
    a low one, twice.

    Args:
        high: q, k, v, each (B, H, W, high heads, head_dim). Either branch may have no heads.
        low: q (B, H, W, low heads, head_dim), and k, v (B, h, w, low heads, head_dim) of the pooled map.
        window_size: tokens, an int or (rows, columns); must divide (H, W).
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, high heads + low heads, head_dim), high heads first; dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or window_size does not divide the map.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, high, low, window_size, scale, impl)


def _check(high: Sequence[Tensor], low: Sequence[Tensor], window_size: tuple[int, int]) -> None:
    for name, branch in (("high", high), ("low", low)):
        if len(branch) != 3 or any(t.dim() != 5 for t in branch):
            found = [tuple(t.shape) for t in branch]
            raise ValueError(f"{OP}: {name} must hold q, k, v (B, H, W, heads, head_dim), got shapes {found}")
    (high_q, high_k, high_v), (low_q, low_k, low_v) = high, low
    named = {"high q": high_q, "high k": high_k, "high v": high_v, "low q": low_q, "low k": low_k, "low v": low_v}
    check_alike(OP, **named)
    for name, like in (("high k", "high q"), ("high v", "high q"), ("low v", "low k")):
        if (shape := named[name].shape) != (wanted := named[like].shape):
            raise ValueError(f"{OP}: {name} must have the shape of {like} {tuple(wanted)}, got {tuple(shape)}")
    if (low_q.shape[0], *low_q.shape[3:]) != (low_k.shape[0], *low_k.shape[3:]):
        q_shape, k_shape = tuple(low_q.shape), tuple(low_k.shape)
        raise ValueError(f"{OP}: low k must have the batch, heads and head_dim of low q {q_shape}, got {k_shape}")
    if (*high_q.shape[:3], high_q.shape[4]) != (*low_q.shape[:3], low_q.shape[4]):
        shapes = f"{tuple(high_q.shape)} and {tuple(low_q.shape)}"
        raise ValueError(f"{OP}: high q and low q must have one batch, map and head_dim, got {shapes}")
    if high_q.shape[3] + low_q.shape[3] == 0:
        raise ValueError(f"{OP}: one of high and low must have heads, got none")
    if any(is_known(size < 1) for size in (*low_q.shape[1:3], low_q.shape[4], *low_k.shape[1:3])):
        raise ValueError(f"{OP}: H, W and head_dim must be at least 1, got shapes {[tuple(t.shape) for t in low]}")
    check_at_least(OP, "window_size", window_size, 1)
    if any(is_known(low_q.shape[1 + i] % window_size[i] != 0) for i in (0, 1)):
        raise ValueError(f"{OP}: window_size {tuple(window_size)} must divide the map {tuple(low_q.shape[1:3])}")


def hilo_attention_reference(
    high: Sequence[Tensor], low: Sequence[Tensor], window_size: tuple[int, int], scale: float
) -> Tensor:
    """The definition, float32 inside at least."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        wide = accumulator(q.dtype)
        probs = torch.matmul(q.to(wide) * scale, k.to(wide).mT).softmax(-1)
        return torch.matmul(probs, v.to(wide)).to(q.dtype)

    return _both(window_attention_reference, attend, high, low, window_size, scale)


def hilo_attention_tiled(
    high: Sequence[Tensor], low: Sequence[Tensor], window_size: tuple[int, int], scale: float
) -> Tensor:
    """SDPA on windows, and SDPA to the pooled tokens."""
    return _both(window_attention_tiled, sdpa, high, low, window_size, scale)


def _fused(high: Sequence[Tensor], low: Sequence[Tensor], window_size: tuple[int, int], scale: float) -> Tensor:
    return _both(window_attention_fused, F.scaled_dot_product_attention, high, low, window_size, scale)


def _both(
    attend_windows: Callable[..., Tensor],
    attend: Callable[..., Tensor],
    high: Sequence[Tensor],
    low: Sequence[Tensor],
    window_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """Run each branch that has heads by its function; return the heads of the high branch first."""
    outs = []
    if high[0].shape[3]:
        outs.append(OPS["window_attention"].calling(attend_windows)(*high, window_size, scale=scale))
    if low[0].shape[3]:
        tokens = (x.flatten(1, 2).transpose(1, 2) for x in low)  # (B, heads, tokens, d)
        pooled = attend(*tokens, scale=scale).transpose(1, 2)
        outs.append(pooled.unflatten(1, (low[0].shape[1], low[0].shape[2])))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)


def why_not_fused(high: Sequence[Tensor], scale: float) -> str | None:
    """Return the reason why no fused kernel can run on these tensors, or None."""
    if high[0].shape[3] == 0:
        return "only the high branch has a kernel, and it has no heads"
    q, k, v = high
    return why_no_window_kernel(q, k, v, None, scale)


def _macs(high: Sequence[Tensor], low: Sequence[Tensor], window_size: tuple[int, int]) -> int:
    pooled = low[1].shape[1] * low[1].shape[2]
    return 2 * (high[0].numel() * window_size[0] * window_size[1] + low[0].numel() * pooled)


declare(
    hilo_attention,
    check=_check,
    reference=hilo_attention_reference,
    tiled=hilo_attention_tiled,
    graph=hilo_attention_graph,
    fused=_fused,
    why_not_fused=why_not_fused,
    cast=("high", "low"),
    macs=_macs,
)


class HiLoAttention(nn.Module):
    """HiLo attention with its projections, on channels-last maps; the names of the layers are those of the authors.

    A branch without heads has no parameters. A map that windows do not cover exactly is padded right and bottom with
    zeros before all projections, as in the authors' dense backbones: padded tokens are pooled and attended like any
    other; the output is cropped.

    Args:
        dim: channels; heads must divide it.
        heads: number of heads, both branches together.
        window_size: side of the windows of the high branch and of the pooling of the low one, in tokens.
        alpha: share of low-frequency heads, 0 to 1; int(heads * alpha) of them. All, where window_size is 1.
        qkv_bias: give the projections to q, k and v a bias.
        scale: multiplies the logits; (dim // heads) ** -0.5 when None.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int = 2,
        alpha: float = 0.5,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"HiLoAttention: heads must divide dim {dim}, got {heads}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"HiLoAttention: alpha must be 0 to 1, got {alpha}")
        check_at_least("HiLoAttention", "window_size", [window_size], 1)
        dd = {"device": device, "dtype": dtype}
        self.window_size = window_size
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.low_heads = heads if window_size == 1 else int(heads * alpha)
        self.high_heads = heads - self.low_heads
        low_dim, high_dim = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        self.l_q = nn.Linear(dim, low_dim, bias=qkv_bias, **dd) if low_dim else None
        self.l_kv = nn.Linear(dim, 2 * low_dim, bias=qkv_bias, **dd) if low_dim else None
        self.l_proj = nn.Linear(low_dim, low_dim, **dd) if low_dim else None
        self.h_qkv = nn.Linear(dim, 3 * high_dim, bias=qkv_bias, **dd) if high_dim else None
        self.h_proj = nn.Linear(high_dim, high_dim, **dd) if high_dim else None

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        height, width = x.shape[1], x.shape[2]
        x = pad_to_windows(x, [self.window_size, self.window_size])
        nothing = x.new_empty([x.shape[0], x.shape[1], x.shape[2], 0, self.head_dim])
        high = [nothing, nothing, nothing]
        if self.h_qkv is not None:
            high = unpack(self.h_qkv(x).unflatten(-1, (3, self.high_heads, self.head_dim)), 3)
            nothing = high[0][:, :, :, :0]
        low = [nothing, nothing, nothing]
        if self.l_q is not None and self.l_kv is not None:
            q = self.l_q(x).unflatten(-1, (self.low_heads, self.head_dim))
            kv = self.l_kv(self.pool(x)).unflatten(-1, (2, self.low_heads, self.head_dim))
            low = [q, kv[:, :, :, 0], kv[:, :, :, 1]]
            if self.h_qkv is None:
                high = [q[:, :, :, :0], q[:, :, :, :0], q[:, :, :, :0]]
        window = [self.window_size, self.window_size]
        out = hilo_attention(high, low, window, scale=self.scale)
        return crop(self.project(out), height, width)

    def pool(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H / window, W / window, C)
        """Return the means of the tokens of every window."""
        if self.window_size == 1:
            return x
        return F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)

    def project(self, x: Tensor) -> Tensor:  # (B, H, W, heads, head_dim) -> (B, H, W, C)
        """Project the heads of each branch, and put both side by side."""
        high, low = x[:, :, :, : self.high_heads].flatten(3), x[:, :, :, self.high_heads :].flatten(3)
        if self.h_proj is None:
            assert self.l_proj is not None
            return self.l_proj(low)
        if self.l_proj is None:
            return self.h_proj(high)
        return torch.cat([self.h_proj(high), self.l_proj(low)], dim=-1)

    def extra_repr(self) -> str:
        return f"high_heads={self.high_heads}, low_heads={self.low_heads}, window_size={self.window_size}"
