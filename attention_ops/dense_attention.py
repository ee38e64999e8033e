"""Dense attention: every token sees every token, with what vision transformers add to the softmax.

Papers     clip and gate: Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929 (clipped softmax, gated attention);
           mask: any connections of single pairs, such as those that Sparsifiner (arXiv:2303.13755) selects.
Semantics  the softmax is over the keys that the mask shows, then clipped, then multiplied with values, then gated.
Tiled      plain attention is SDPA; with a mask or a clipped softmax the logits of a chunk are made, and made again in
           the backward pass.
Fused      a clipped softmax walks over the keys twice: for the log-sum-exp of a row, then for its clipped sum. Masks
           are read as bits; a value that is not finite reaches all queries of a tile, also those that do not see
           it. Gates are multiplied into what a program stores.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._attend import accumulator, sdpa
from ._checks import check_alike, check_device, why_no_attention_kernel
from ._clip import Clip, check_clip, clipped
from ._graph.clipped import dense_attention_graph
from ._graph.sizes import differs, is_known
from ._op import Impl, declare, run
from .clipped_attention import ClippedAttention, MaskedAttention

OP = "dense_attention"


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    clip: Clip | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every query to every key: gate * clip((zeta - gamma) * softmax(scale * q k^T) + gamma, 0, 1) v.

    Cost: N * M * head_dim multiply-adds per head, twice; with `clip` the kernel computes the logits twice.

    Args:
        q: (B, N, heads, head_dim); k: (B, M, heads, head_dim); v: (B, M, heads, value_dim). One dtype and device;
            strided views are fine.
        mask: (B or 1, heads or 1, N, M) bool, True where a query sees a key. A query that sees nothing gives zeros.
        clip: (gamma, zeta) with gamma <= 0 <= 1 <= zeta, of a clipped softmax; None: plain softmax.
        gate: (B, N, heads), multiplies the output; dtype of q.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, N, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or clip is out of range.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, mask, clip, gate, scale, impl)


def check_tokens(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k, v are (B, tokens, heads, head_dim) of one batch, heads, floating dtype and device.

    q may have another number of tokens than k and v, and v another head_dim.
    """
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be (B, N, heads, head_dim), got shape {tuple(q.shape)}")
    keys = k.shape[1] if k.dim() == 4 else "M"
    if k.dim() != 4 or differs((k.shape[0], *k.shape[2:]), (q.shape[0], *q.shape[2:])):
        raise ValueError(f"{op}: k must be {(q.shape[0], keys, *q.shape[2:])} as q, got {tuple(k.shape)}")
    if v.dim() != 4 or differs(v.shape[:3], k.shape[:3]):
        raise ValueError(f"{op}: v must be {(*k.shape[:3], 'value_dim')} as k, got {tuple(v.shape)}")
    check_alike(op, q=q, k=k, v=v)
    for size in (*q.shape[1:], k.shape[1], v.shape[3]):
        if is_known(size < 1):
            raise ValueError(f"{op}: tokens, heads and head_dim must be at least 1, got shape {tuple(q.shape)}")


def check_gate(op: str, name: str, gate: Tensor | None, q: Tensor, words: str) -> None:
    """Raise ValueError unless `gate` is None or has one number for each token and head of q."""
    if gate is None:
        return
    if differs(gate.shape, q.shape[:-1]):
        raise ValueError(f"{op}: {name} must be {words} = {tuple(q.shape[:-1])}, got {tuple(gate.shape)}")
    check_alike(op, **{"q": q, name: gate})


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    clip: Sequence[float] | None,
    gate: Tensor | None,
) -> None:
    check_tokens(OP, q, k, v)
    check_clip(OP, clip)
    check_gate(OP, "gate", gate, q, "(B, N, heads)")
    if mask is None:
        return
    whole = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    of_mask = tuple(mask.shape)
    fits = mask.dim() == 4 and not differs(of_mask[2:], whole[2:])
    if not fits or any(is_known(n != 1) and is_known(n != m) for n, m in zip(of_mask[:2], whole[:2], strict=True)):
        raise ValueError(f"{OP}: mask must be (B or 1, heads or 1, N, M) of {whole}, got {of_mask}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{OP}: mask must be bool, got {mask.dtype}")
    check_device(OP, "mask", mask, "q", q)


def dense_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    clip: Sequence[float] | None,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition: every logit at once, float32 inside at least.

    With a mask every query has keys and values of its own, zeros where it sees none: N copies of k and v.
    """
    wide = accumulator(q.dtype)
    queries, keys, values = (x.to(wide).transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, d)
    queries = queries * scale
    if mask is None:
        out = torch.matmul(clipped(torch.matmul(queries, keys.mT).softmax(-1), clip), values)
    else:
        keys, values = (x[..., None, :, :].masked_fill(~mask[..., None], 0) for x in (keys, values))
        logits = torch.einsum("bhnd,bhnmd->bhnm", queries, keys)
        shown = mask | ~mask.any(-1, keepdim=True)
        probs = clipped(logits.masked_fill(~shown, -torch.inf).softmax(-1), clip).masked_fill(~mask, 0)
        out = torch.einsum("bhnm,bhnmd->bhnd", probs, values)
    out = out.transpose(1, 2)
    return (out if gate is None else out * gate.to(wide)[..., None]).to(q.dtype)


def dense_attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    clip: Sequence[float] | None,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    """SDPA, or attention by chunks of logits where probabilities are clipped or masked."""
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if clip is None and mask is None:
        out = sdpa(queries, keys, values, scale)
    else:
        seen = None if mask is None else mask[:, :, None]
        body = (MaskedAttention if clip is None else ClippedAttention)(seen, clip, scale)
        out = body(queries[:, :, None], keys[:, :, None], values[:, :, None], None)[:, :, 0]
    out = out.transpose(1, 2)
    return out.contiguous() if gate is None else (out * gate[..., None]).contiguous()


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    clip: Sequence[float] | None,
    gate: Tensor | None,
    scale: float,
) -> Tensor:
    from ..kernels.clipped.launch import clipped_attention, pack_bits  # here, so that CPU users need no Triton

    q, k, v = q[:, None], k[:, None], v[:, None]  # (B, 1, tokens, heads, d): one window
    bits = None if mask is None else pack_bits(mask)
    gate = None if gate is None else gate[:, None]
    return clipped_attention(q, k, v, bits=bits, clip=clip, gate=gate, scale=scale)[:, 0]


def _macs(q: Tensor, k: Tensor, v: Tensor) -> int:
    batch, tokens, heads, dim = q.shape
    return batch * heads * tokens * k.shape[1] * (dim + v.shape[3])


declare(
    dense_attention,
    check=_check,
    reference=dense_attention_reference,
    tiled=dense_attention_tiled,
    graph=dense_attention_graph,
    fused=_fused,
    why_not_fused=why_no_attention_kernel,
    cast=("q", "k", "v", "gate"),
    macs=_macs,
)
