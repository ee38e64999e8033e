"""Halo attention: every block of queries sees its block and a halo of tokens around it.

Paper      Vaswani et al. 2021, arXiv:2103.12731 (HaloNet), figure 1.
Semantics  those of timm's layer, whose weights load: keys and values outside the map are zeros and are NOT masked, so
           they take softmax mass; the relative position logits use the unscaled query; a query of a strided layer is
           placed in the down-sampled block, so query i is i keys from the block's edge, not i * stride.
We differ  a map need not be a multiple of the block: the last blocks overhang, and what they see outside is zeros.
           timm's layer refuses such maps; where the block divides the map, results agree. Where an odd block divides an
           odd map under stride 2 (21 by 7), we return ceil(21 / 2) rows, as a shortcut's strided convolution does, and
           timm the first floor(21 / 2) of them; no complete model of timm reaches this case.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.local.plan import Pattern, pattern_of
from ._attend import accumulator
from ._checks import check_alike, check_at_least, check_device, why_no_local_kernel
from ._graph.halo import halo_attention_graph, halo_attention_lse_graph
from ._graph.sizes import differs, is_known
from ._lse import first_result, lse_variant
from ._op import Impl, Size, declare, run
from .halo_cpu import Blocks, halo_attention_lse_tiled, halo_attention_tiled
from .tiling import AxisWindow

OP = "halo_attention"


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: Size,
    halo: Size,
    *,
    stride: int = 1,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every block of queries to the block and its halo.

    Cost: H * W / stride ** 2 * (bh + 2 * halo_h) * (bw + 2 * halo_w) * head_dim multiply-adds per head, twice.

    Args:
        q: (B, ceil(H / stride), ceil(W / stride), heads, head_dim).
        k: (B, H, W, heads, head_dim); v: (B, H, W, heads, value_dim). One dtype and device; strided views are fine.
        block_size: keys of a block in tokens, an int or (rows, columns); `stride` must divide it.
        halo: tokens seen past a block's edge, an int or (rows, columns); 0 gives window attention.
        stride: keys per query on each axis; a block has block_size / stride queries an axis.
        rel_h, rel_w: (2 * (block + 2 * halo) - 1, head_dim) for rows and columns, both or none. Adds
            q . (rel_h[i] + rel_w[j]) to the scaled logits, q unscaled, with index = place of the key in the window
            - place of the query in the block + block + 2 * halo - 1.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, ceil(H / stride), ceil(W / stride), heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a size is out of range.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, block_size, halo, stride, rel_h, rel_w, scale, impl)


halo_attention_lse = lse_variant(halo_attention)


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: tuple[int, int],
    halo: tuple[int, int],
    stride: int,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 5:
            raise ValueError(f"{op}: {name} must be (B, H, W, heads, head_dim), got shape {tuple(t.shape)}")
    check_alike(op, q=q, k=k, v=v)
    if any(is_known(size < 1) for size in (*k.shape[1:], v.shape[4])):
        raise ValueError(f"{op}: H, W, heads and head_dim must be at least 1, got {tuple(k.shape)}, {tuple(v.shape)}")
    check_at_least(op, "block_size", block_size, 1)
    check_at_least(op, "halo", halo, 0)
    if stride < 1 or block_size[0] % stride or block_size[1] % stride:
        raise ValueError(f"{op}: stride must divide block_size {tuple(block_size)}, got {stride}")
    if differs(v.shape[:4], k.shape[:4]):
        raise ValueError(f"{op}: v must be {(*k.shape[:4], 'value_dim')} as k, got {tuple(v.shape)}")
    queries = (k.shape[0], (k.shape[1] + stride - 1) // stride, (k.shape[2] + stride - 1) // stride, *k.shape[3:])
    if differs(q.shape, queries):
        raise ValueError(f"{op}: q must be {queries} for k {tuple(k.shape)} and stride {stride}, got {tuple(q.shape)}")
    if (rel_h is None) != (rel_w is None):
        raise ValueError(f"{op}: rel_h and rel_w must both be given, or none")
    for name, table, block, reach in zip(("rel_h", "rel_w"), (rel_h, rel_w), block_size, halo, strict=True):
        shape = (2 * (block + 2 * reach) - 1, q.shape[-1])
        check_device(op, name, table, "q", q)
        if table is not None and tuple(table.shape) != shape:
            raise ValueError(
                f"{op}: {name} must be (2 * (block_size + 2 * halo) - 1, head_dim) = {shape}, got {tuple(table.shape)}"
            )


def axis_window(
    queries: int, keys: int, block: int, halo: int, stride: int, device: torch.device | str = "cpu"
) -> AxisWindow:
    """Say what every query of one axis sees: block + 2 * halo keys; not seen are those outside the map, zeros."""
    window = block + 2 * halo
    index, place = torch.arange(queries, device=device)[:, None], torch.arange(window, device=device)
    per_block = block // stride
    position = index // per_block * block - halo + place
    inside = (position >= 0) & (position < keys)
    return AxisWindow(position.clamp(0, keys - 1), inside, place - index % per_block + window - 1)


def halo_attention_lse_reference(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition: gather every query's own keys, window ** 2 copies of k and v. float32 inside at least."""
    wide, (block_size, halo, stride) = accumulator(q.dtype), blocks
    rows, cols = (axis_window(q.shape[1 + i], k.shape[1 + i], block_size[i], halo[i], stride, q.device) for i in (0, 1))
    near = (rows.keys[:, None, :, None], cols.keys[None, :, None, :])  # index (Hq, Wq, wh, ww)
    outside = ~(rows.seen[:, None, :, None] & cols.seen[None, :, None, :])[..., None, None]
    k, v = (t.to(wide)[:, near[0], near[1]].masked_fill(outside, 0) for t in (k, v))  # (B, Hq, Wq, wh, ww, heads, d)
    wide_q = q.to(wide)
    logits = torch.einsum("bhwnd,bhwijnd->bnhwij", wide_q, k) * scale
    if rel_h is not None and rel_w is not None:
        logits = logits + torch.einsum("bhwnd,hid->bnhwi", wide_q, rel_h.to(wide)[rows.cells])[..., :, None]
        logits = logits + torch.einsum("bhwnd,wjd->bnhwj", wide_q, rel_w.to(wide)[cols.cells])[..., None, :]
    of_query = logits.flatten(-2)  # (B, heads, Hq, Wq, keys)
    out = torch.einsum("bnhwij,bhwijnd->bhwnd", of_query.softmax(-1).view_as(logits), v).to(q.dtype)
    return out, of_query.logsumexp(-1).permute(0, 2, 3, 1)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Blocks, scale: float
) -> Tensor:
    from ..kernels.local.launch import local_attention  # here, so that CPU users need no Triton

    return local_attention(q, k, v, _pattern(blocks), tables=_tables(rel_h, rel_w), scale=scale)


def _fused_lse(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    from ..kernels.local.launch import local_attention_lse

    return local_attention_lse(q, k, v, _pattern(blocks), tables=_tables(rel_h, rel_w), scale=scale)


def _pattern(blocks: Blocks) -> Pattern:
    return pattern_of("block", blocks.block_size, blocks.halo, (blocks.stride, blocks.stride))


def _tables(rel_h: Tensor | None, rel_w: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if rel_h is None or rel_w is None else (rel_h, rel_w)


def _macs(q: Tensor, v: Tensor, block_size: tuple[int, int], halo: tuple[int, int], rel_h: Tensor | None) -> int:
    rows, cols = (size + 2 * reach for size, reach in zip(block_size, halo, strict=True))
    relative = 0 if rel_h is None else q.numel() * (rows + cols)
    return q[..., 0].numel() * rows * cols * (q.shape[-1] + v.shape[-1]) + relative


declare(
    halo_attention,
    check=partial(_check, OP),
    reference=first_result(halo_attention_lse_reference),
    tiled=halo_attention_tiled,
    graph=halo_attention_graph,
    fused=_fused,
    why_not_fused=why_no_local_kernel,
    macs=_macs,
    bundles={"blocks": Blocks},
)
declare(
    halo_attention_lse,
    check=partial(_check, f"{OP}_lse"),
    reference=halo_attention_lse_reference,
    tiled=halo_attention_lse_tiled,
    graph=halo_attention_lse_graph,
    fused=_fused_lse,
    why_not_fused=why_no_local_kernel,
    macs=_macs,
    bundles={"blocks": Blocks},
)


class RelativePosition(nn.Module):
    """The relative position tables of a window of tokens, for rows and for columns."""

    def __init__(self, window: int, head_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim, device=device, dtype=dtype))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the tables of rows and of columns, both (2 * window - 1, head_dim)."""
        return self.height_rel, self.width_rel


class HaloAttention2d(nn.Module):
    """Multi-head halo attention with its projections, on (B, C, H, W) maps, without an output projection.

    The names of the parameters and the order of their channels are timm's (`kv` holds [key | value] head by head).

    Args:
        dim: channels of the map; dim_out: of the output, as dim when None; heads must divide it.
        stride: 1 or 2; a strided layer has strided queries, or an average pool after it where `avg_down` or the stride
            does not divide the block. An odd map gives ceil(H / 2) rows, in either case (timm pools to floor(H / 2)).
        heads: number of heads.
        head_dim: of queries and keys; from dim_out * qk_ratio, rounded to a multiple of 8, when None.
        block_size, halo: in tokens.
        qk_ratio: channels of queries and keys over dim_out.
        qkv_bias: give the projections a bias. Keys outside the map are zeros, with and without it.
        avg_down: pool after attention instead of striding the queries.
        scale_rel: scale the relative logits too (other code bases do; timm's default and ours is not to).
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        block_size: int = 8,
        halo: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_rel: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if heads < 1 or dim_out % heads:
            raise ValueError(f"HaloAttention2d: heads must divide dim_out {dim_out}, got {heads}")
        if stride not in (1, 2):
            raise ValueError(f"HaloAttention2d: stride must be 1 or 2, got {stride}")
        dd = {"device": device, "dtype": dtype}
        pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.heads = heads
        self.head_dim = _round_to_8(dim_out * qk_ratio) // heads if head_dim is None else head_dim
        self.value_dim = dim_out // heads
        self.block_size = [block_size, block_size]
        self.halo = [halo, halo]
        self.stride = 1 if pooled else stride
        self.scale = self.head_dim**-0.5
        self.rel_scale = self.scale if scale_rel else 1.0
        self.q = nn.Conv2d(dim, heads * self.head_dim, 1, self.stride, bias=qkv_bias, **dd)
        self.kv = nn.Conv2d(dim, heads * (self.head_dim + self.value_dim), 1, bias=qkv_bias, **dd)
        self.pos_embed = RelativePosition(block_size + 2 * halo, self.head_dim, **dd)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for table in self.pos_embed.parameters():
            nn.init.trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride))
        q = self.q(x).permute(0, 2, 3, 1).unflatten(-1, (self.heads, self.head_dim))
        kv = self.kv(x).permute(0, 2, 3, 1).unflatten(-1, (self.heads, self.head_dim + self.value_dim))
        k, v = kv[..., : self.head_dim], kv[..., self.head_dim :]
        rel_h, rel_w = [table * self.rel_scale for table in self.pos_embed()]
        out = halo_attention(
            q,
            k,
            v,
            self.block_size,
            self.halo,
            stride=self.stride,
            rel_h=rel_h,
            rel_w=rel_w,
            scale=self.scale,
        )
        return self.pool(out.flatten(3).permute(0, 3, 1, 2).contiguous())  # in the layout of timm's layer

    def extra_repr(self) -> str:
        return f"heads={self.heads}, block_size={self.block_size[0]}, halo={self.halo[0]}, stride={self.stride}"


def _round_to_8(channels: float) -> int:
    """Return the nearest multiple of 8, at most 10 % below, as timm rounds channels."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
