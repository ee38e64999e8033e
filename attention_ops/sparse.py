"""Sparse attention: every query sees the keys whose numbers it is given.

Paper      Wei, Duggal, Lin, Liu, Urtasun 2023, arXiv:2303.13755 (Sparsifiner): a small predictor chooses the keys.
Tiled      either copies of the keys that are seen, or all logits with a mask, whichever `gathers` says: copies pay only
           where a query sees few of many keys.
Fused      the numbers become one bit a key; the kernel of dense_attention computes all tiles and masks by these bits.
"""

import torch
from torch import Tensor

from ._attend import accumulator
from ._checks import check_device, why_no_attention_kernel
from ._graph.clipped import dense_attention_graph
from ._graph.sizes import differs, known
from ._op import Impl, declare, run
from .dense_attention import check_tokens, dense_attention_tiled

OP = "sparse_attention"
LEAST_KEYS, MOST_SHARE = 2048, 1 / 96  # from benchmarks/results/sparse_attention_cpu.txt


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    *,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every query to the keys that `columns` names.

    Cost: N * budget * head_dim multiply-adds per head, twice. The bodies that mask compute N * M * head_dim.

    Args:
        q: (B, N, heads, head_dim); k: (B, M, heads, head_dim); v: (B, M, heads, value_dim). One dtype and device;
            strided views are fine.
        columns: (B, heads, N, budget) int64, numbers of keys below M; those of one query must differ.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, N, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, columns, scale, impl)


def _check(q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> None:
    check_tokens(OP, q, k, v)
    wanted = (q.shape[0], q.shape[2], q.shape[1])
    if columns.dim() != 4 or differs(columns.shape[:3], wanted) or columns.shape[3] < 1:
        raise ValueError(f"{OP}: columns must be {(*wanted, 'budget')} as q, got {tuple(columns.shape)}")
    if columns.dtype != torch.int64:
        raise ValueError(f"{OP}: columns must be int64, got {columns.dtype}")
    check_device(OP, "columns", columns, "q", q)


def gathers(keys: int, budget: int) -> bool:
    """Say whether copying `budget` of `keys` keys for every query is faster than a mask over all logits, on a CPU."""
    return keys >= LEAST_KEYS and budget <= keys * MOST_SHARE


def mask_of_columns(columns: Tensor, keys: int) -> Tensor:
    """(B, heads, N, budget) numbers of keys -> (B, heads, N, M) bool."""
    mask = torch.zeros((*columns.shape[:-1], keys), device=columns.device)
    return mask.scatter(-1, columns, 1.0) > 0  # a trace can hold no bool as the value to scatter


def sparse_attention_reference(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, scale: float) -> Tensor:
    """The definition: every query copies its keys. float32 inside at least."""
    wide = accumulator(q.dtype)
    return _gathered(q.to(wide), k.to(wide), v.to(wide), columns, scale).to(q.dtype)


def _gathered(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, scale: float) -> Tensor:
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, d)
    of_query = columns.flatten(2)[..., None]
    keys, values = (
        x.gather(2, of_query.expand(-1, -1, -1, x.shape[-1])).unflatten(2, columns.shape[2:]) for x in (keys, values)
    )  # (B, heads, N, budget, d)
    probs = (torch.matmul(queries[..., None, :] * scale, keys.mT)).softmax(-1)
    return torch.matmul(probs, values).squeeze(-2).transpose(1, 2)


def sparse_attention_graph(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Plain differentiable torch: a mask over all logits."""
    return dense_attention_graph(q, k, v, mask_of_columns(columns, k.shape[1]), None, None, scale)


def sparse_attention_tiled(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Copies of the keys, or a mask over all logits."""
    if q.device.type == "cpu" and known(k.shape[1]) and gathers(k.shape[1], columns.shape[3]):
        return torch.cat([_gathered(*few, scale) for few in _in_parts(q, k, v, columns)], dim=1)
    return dense_attention_tiled(q, k, v, mask_of_columns(columns, k.shape[1]), None, None, scale)


def _in_parts(q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Cut the queries, so that the copies of a part stay in a CPU's cache."""
    of_query = q.shape[0] * q.shape[2] * columns.shape[3] * (q.shape[3] + v.shape[3])
    length = max(_COPIED // max(of_query, 1), 1)
    starts = range(0, max(q.shape[1], 1), length)
    return [(q[:, i : i + length], k, v, columns[:, :, i : i + length]) for i in starts]


_COPIED = 1 << 20  # numbers


def _fused(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, scale: float) -> Tensor:
    from ..kernels.clipped.launch import clipped_attention, pack_columns  # here, so that CPU users need no Triton

    bits = pack_columns(columns, k.shape[1])
    return clipped_attention(q[:, None], k[:, None], v[:, None], bits=bits, scale=scale)[:, 0]


def _macs(q: Tensor, v: Tensor, columns: Tensor) -> int:
    return columns.numel() * (q.shape[3] + v.shape[3])


declare(
    sparse_attention,
    check=_check,
    reference=sparse_attention_reference,
    tiled=sparse_attention_tiled,
    graph=sparse_attention_graph,
    fused=_fused,
    why_not_fused=why_no_attention_kernel,
    macs=_macs,
)
