"""Aggregated attention: the keys around a query and a pooled map in one softmax, with heads that tokens may skip.

Papers     Shi 2024, arXiv:2311.17132 (TransNeXt); Jin et al. 2024, arXiv:2410.11842 (MoH, the gates).
Semantics  queries and keys are normalized; a query sees the kernel_rows x kernel_cols tokens around it that lie on the
           map, and all pooled tokens, in one softmax. The local values get one more weight, linear in the normalized
           query and not normalized. A gate multiplies each head of each token. With local keys, the logarithm of the
           number of keys is rounded to float32 in every dtype, as in the authors' code.
We differ  a pair of a token and a head whose gate is 0 has the result 0, and gradients of 0, also of its gate: the
           tiled body leaves such pairs out where they are most of all pairs. The bias of pooled keys is a table and
           two lists of its cells, not one number for each pair, so that memory grows with the map and not with its
           square.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import accumulator
from ._checks import check_alike, check_device, why_no_attention_kernel
from ._graph.aggregated import aggregated_attention_graph, gated, log_keys_seen, offsets, pair_bias
from ._graph.sizes import differs, is_known
from ._op import Impl, declare, run
from .aggregated_cpu import aggregated_attention_tiled
from .aggregated_parts import Local, Pooled

OP = "aggregated_attention"


def aggregated_attention(
    q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    local_k: Tensor | None = None,
    local_v: Tensor | None = None,
    *,
    embedding: Tensor,
    temperature: Tensor,
    pooled_bias: Tensor,
    bias_rows: Tensor,
    bias_cols: Tensor,
    local_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
    gates: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every token to the tokens around it and to a pooled map, in one softmax.

    With u = q / |q|, logits are (u + embedding) . k / |k| * temperature * ln(number of keys that the token sees), plus
    the bias of the pair. Local values get the weight u . tokens + token_bias besides their probability.

    Cost: heads * H * W * (pooled tokens + kernel tokens) * head_dim multiply-adds, twice; the tiled body leaves out
    pairs of a token and a head whose gate is 0 where at most 30 % are left. The fused body computes all pairs, and
    has no double backward.

    Args:
        q: (B, H, W, heads, head_dim), not normalized.
        pooled_k: (B, P, heads, head_dim), not normalized; pooled_v: (B, P, heads, value_dim). P = Ph * Pw tokens, row
            by row. For attention of all tokens to all tokens, these are the map's own keys and values.
        local_k, local_v: (B, H, W, heads, head_dim or value_dim); None: no local keys.
        embedding: (heads, head_dim), added to the normalized queries.
        temperature: (heads,), above 0.
        pooled_bias: (heads, rows, columns), a table of biases.
        bias_rows: (H, Ph) int64, the row of the table for a row of the map and one of the pooled map.
        bias_cols: (W, Pw) int64, the same for columns.
        local_bias: (heads, kernel_rows, kernel_cols), odd sizes, added to local logits; wanted with local keys.
        tokens, token_bias: (heads, head_dim, kernel_rows * kernel_cols) and (heads, kernel_rows * kernel_cols); wanted
            with local keys.
        gates: (B, H, W, heads), multiplies the result of each head; None: no gates.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or some of the local arguments are missing.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(
        OP,
        q,
        pooled_k,
        pooled_v,
        local_k,
        local_v,
        embedding,
        temperature,
        pooled_bias,
        bias_rows,
        bias_cols,
        local_bias,
        tokens,
        token_bias,
        gates,
        impl,
    )


def _check(
    q: Tensor, pooled: Pooled, local: Local, embedding: Tensor, temperature: Tensor, gates: Tensor | None
) -> None:
    if q.dim() != 5:
        raise ValueError(f"{OP}: q must be (B, H, W, heads, head_dim), got shape {tuple(q.shape)}")
    batch, height, width, heads, dim = q.shape
    k, v, table, rows, cols = pooled
    if k.dim() != 4 or differs((k.shape[0], *k.shape[2:]), (batch, heads, dim)):
        raise ValueError(f"{OP}: pooled_k must be {(batch, 'P', heads, dim)} as q, got {tuple(k.shape)}")
    if v.dim() != 4 or differs(v.shape[:3], k.shape[:3]):
        raise ValueError(f"{OP}: pooled_v must be {(*k.shape[:3], 'value_dim')} as pooled_k, got {tuple(v.shape)}")
    check_alike(OP, q=q, pooled_k=k, pooled_v=v)
    if rows.dim() != 2 or cols.dim() != 2 or differs((rows.shape[0], cols.shape[0]), (height, width)):
        raise ValueError(
            f"{OP}: bias_rows and bias_cols must be ({height}, Ph) and ({width}, Pw), got {tuple(rows.shape)} and "
            f"{tuple(cols.shape)}"
        )
    if is_known(rows.shape[1] * cols.shape[1] != k.shape[1]):
        raise ValueError(f"{OP}: Ph * Pw must be the {k.shape[1]} pooled tokens, got {rows.shape[1]} * {cols.shape[1]}")
    if table.dim() != 3 or table.shape[0] != heads:
        raise ValueError(f"{OP}: pooled_bias must be ({heads}, rows, columns), got {tuple(table.shape)}")
    _check_shapes(q, embedding=(embedding, (heads, dim)), temperature=(temperature, (heads,)))
    if gates is not None:
        _check_shapes(q, gates=(gates, tuple(q.shape[:4])))
    if local.given:
        _check_local(q, v, local)
    for size in (*q.shape[1:], k.shape[1], v.shape[3]):
        if is_known(size < 1):
            raise ValueError(
                f"{OP}: H, W, P, heads and widths must be at least 1, got {tuple(q.shape)}, {tuple(v.shape)}"
            )


def _check_local(q: Tensor, pooled_v: Tensor, local: Local) -> None:
    if (missing := local.missing()) is not None:
        raise ValueError(
            f"{OP}: local keys want local_k, local_v, local_bias, tokens and token_bias; no {missing} given"
        )
    k, v, bias, tokens, token_bias = local
    if differs(k.shape, q.shape):
        raise ValueError(f"{OP}: local_k must have the shape of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if differs(v.shape, (*q.shape[:4], pooled_v.shape[3])):
        raise ValueError(f"{OP}: local_v must be {(*q.shape[:4], pooled_v.shape[3])}, got {tuple(v.shape)}")
    check_alike(OP, q=q, local_k=k, local_v=v)
    heads, dim = q.shape[3:]
    if bias.dim() != 3 or bias.shape[0] != heads or not (bias.shape[1] % 2 and bias.shape[2] % 2):
        raise ValueError(f"{OP}: local_bias must be ({heads}, rows, columns) of odd sizes, got {tuple(bias.shape)}")
    near = bias.shape[1] * bias.shape[2]
    _check_shapes(q, tokens=(tokens, (heads, dim, near)), token_bias=(token_bias, (heads, near)))


def _check_shapes(q: Tensor, **given: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in given.items():
        if differs(tensor.shape, shape):
            raise ValueError(f"{OP}: {name} must be {shape}, got {tuple(tensor.shape)}")
        check_device(OP, name, tensor, "q", q)


def aggregated_attention_reference(
    q: Tensor, pooled: Pooled, local: Local, embedding: Tensor, temperature: Tensor, gates: Tensor | None
) -> Tensor:
    """The definition: every query gathers its own local keys. float32 inside at least."""
    wide, dtype = accumulator(q.dtype), q.dtype
    u = F.normalize(q.to(wide), dim=-1)
    seen = log_keys_seen((q.shape[1], q.shape[2]), local.kernel, pooled.k.shape[1], q.device, wide)
    scaled = (u + embedding.to(wide)) * temperature.to(wide)[:, None] * seen[:, :, None, None]
    keys, values = F.normalize(pooled.k.to(wide), dim=-1), pooled.v.to(wide)
    bias = pair_bias(pooled.table.to(wide), pooled.rows, pooled.cols).unflatten(1, (q.shape[1], q.shape[2]))
    logits = torch.einsum("bhwnd,bpnd->bnhwp", scaled, keys) + bias  # (B, heads, H, W, P)
    if not local.given:
        out = torch.einsum("bnhwp,bpnd->bhwnd", logits.softmax(-1), values)
        return gated(out, gates).to(dtype)
    k, v, local_bias, tokens, token_bias = (t.to(wide) for t in local)
    row, col, outside = _places(q, local.kernel)
    k, v = (t[:, row, col].masked_fill(outside[..., None, None], 0) for t in (F.normalize(k, dim=-1), v))
    near = torch.einsum("bhwnd,bhwknd->bnhwk", scaled, k) + local_bias.flatten(1)[:, None, None]
    probs = torch.cat([near.masked_fill(outside, -torch.inf), logits], -1).softmax(-1)
    weights = probs[..., : near.shape[-1]] + torch.einsum("bhwnd,ndk->bnhwk", u, tokens) + token_bias[:, None, None]
    out = torch.einsum("bnhwk,bhwknd->bhwnd", weights, v)
    out = out + torch.einsum("bnhwp,bpnd->bhwnd", probs[..., near.shape[-1] :], values)
    return gated(out, gates).to(dtype)


def _places(q: Tensor, kernel: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of every token's local keys, clamped to the map, and which lie outside: (H, W, keys)."""
    steps = torch.tensor(offsets(kernel), device=q.device)
    row = torch.arange(q.shape[1], device=q.device)[:, None, None] + steps[:, 0]
    col = torch.arange(q.shape[2], device=q.device)[:, None] + steps[:, 1]
    outside = (row < 0) | (row >= q.shape[1]) | (col < 0) | (col >= q.shape[2])
    row, col = torch.broadcast_tensors(row.clamp(0, q.shape[1] - 1), col.clamp(0, q.shape[2] - 1))
    return row, col, outside


def _why_not_fused(q: Tensor, pooled_v: Tensor, local: Local) -> str | None:
    if local.given and local.kernel != (3, 3):
        return f"the kernels take a local kernel of 3 x 3, got {local.kernel[0]} x {local.kernel[1]}"
    return why_no_attention_kernel(q, q, pooled_v[:, :, None])


def _fused(
    q: Tensor, pooled: Pooled, local: Local, embedding: Tensor, temperature: Tensor, gates: Tensor | None
) -> Tensor:
    from .aggregated_fused import aggregated_attention_fused  # here, so that CPU users need no Triton

    return aggregated_attention_fused(q, pooled, local, embedding, temperature, gates)


def _macs(q: Tensor, pooled: Pooled, local: Local) -> int:
    near = local.kernel[0] * local.kernel[1] if local.given else 0
    pairs, dims = q.shape[:4].numel(), q.shape[4] + pooled.v.shape[3]
    return pairs * (dims * (pooled.k.shape[1] + near) + q.shape[4] * near)


declare(
    aggregated_attention,
    check=_check,
    reference=aggregated_attention_reference,
    tiled=aggregated_attention_tiled,
    graph=aggregated_attention_graph,
    fused=_fused,
    why_not_fused=_why_not_fused,
    cast=("q", "pooled_k", "pooled_v", "local_k", "local_v", "gates"),
    macs=_macs,
    bundles={"pooled": Pooled.of, "local": Local.of},
)
