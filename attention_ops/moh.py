"""Mixture-of-head attention on TransNeXt's attentions: every token chooses the heads that work for it.

Papers     Jin et al. 2024, arXiv:2410.11842 (MoH); Shi 2024, arXiv:2311.17132 (TransNeXt).
Official   https://github.com/SkyworkAI/MoH (Apache-2.0), folder MoH-ViT; parameters have its names.
We differ  a pair of a token and a head whose gate is 0 has no effect, also where it is not finite, and on a CPU it is
           not computed where at most 30 % of the pairs are left; the authors compute all heads. Maps of any size:
           positions are those of the map at hand, in the scale of `coordinate_size`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._graph.sizes import known
from .aggregated import aggregated_attention
from .losses import Loss
from .resizing import pool_map
from .tiling import larger, map_size

LEAST_SUM = 1.1920929e-07  # float32's eps: the least sum of kept gates
EIGHTHS = 8.0  # distances are in eighths of the map's side


def axis_cells(length: int, pooled: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number the distances from the tokens of an axis to the cells of adaptive pooling.

    Returns:
        (length, pooled) int64, the number of a pair's distance; and (distances,) float32: token - middle of the cell.
    """
    cell = torch.arange(pooled, device=device)
    first, past = cell * length // pooled, ((cell + 1) * length + pooled - 1) // pooled
    twice = 2 * torch.arange(length, device=device)[:, None] - (first + past - 1)  # twice the distance
    least, step, count = half_steps(length, pooled)
    distances = (torch.arange(count, device=device) * step + least).float() / 2
    return (twice - least) // step, distances


def half_steps(length: int, pooled: int) -> tuple[int, int, int]:
    """Return which distances on an axis have a number, in halves of a token: the least, their step, and their count.

    Where all cells have one size, every second half is no distance. Of a free size all halves between tokens are kept.
    """
    if torch.jit.is_scripting():
        free = False
    else:
        free = not known(length, pooled)
    if free:
        return 2 - 2 * length, 1, 4 * length - 3
    side = length // pooled
    if side * pooled == length:
        return side + 1 - 2 * length, 2, 2 * length - side
    least = 1 - length - (pooled - 1) * length // pooled
    return least, 1, 2 * length - (length + pooled - 1) // pooled - least


class MohBase(nn.Module):
    """What both attentions share: gates, the bias of positions, and the scale of queries.

    Args:
        dim: channels; heads must divide it.
        heads: number of heads: those that all tokens use first, then those that tokens choose among.
        shared: heads that all tokens use.
        routed: heads that a token chooses; 0: all heads are shared, with weights.
        coordinate_size: (rows, columns) of the map whose side is the unit of distances; None: the map at hand.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shared: int,
        routed: int,
        coordinate_size: tuple[int, int] | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{type(self).__name__}: heads must divide dim {dim}, got {heads}")
        others = heads - shared
        if shared < 0 or not 0 <= routed <= others or (routed == 0 and others):
            raise ValueError(
                f"{type(self).__name__}: wanted shared heads, and 1 to {others} routed of the others, got {shared} of "
                f"{heads} shared, {routed} routed"
            )
        dd = {"device": device, "dtype": dtype}
        head_dim = dim // heads
        self.heads, self.shared, self.routed = heads, shared, routed
        # Pruning leaves some of the heads that gates are computed for: bit i of `kept_heads` for head i.
        self.all_heads, self.kept_heads = heads, 2**heads - 1
        # TorchScript reads attributes only.
        self.least_sum, self.eighths, self.octaves = LEAST_SUM, EIGHTHS, math.log2(EIGHTHS)
        self.coordinate_size = None if coordinate_size is None else [int(side) for side in coordinate_size]
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24)), **dd))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, head_dim, **dd))
        self.cpb_fc1 = nn.Linear(2, 512, **dd)
        self.cpb_act = nn.ReLU()
        self.cpb_fc2 = nn.Linear(512, heads, **dd)
        self.wg = nn.Linear(dim, others, bias=False, **dd) if routed > 0 else None
        self.wg_0 = nn.Linear(dim, 2, bias=False, **dd) if routed > 0 and shared > 0 else None
        self.wg_1 = nn.Linear(dim, shared, bias=False, **dd) if shared > 1 else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.load_balance = Loss()
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    @property
    @torch.jit.unused
    def active(self) -> float:
        """Heads that a token uses, of all heads, before pruning."""
        return (self.shared + self.routed) / self.all_heads

    def gates(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, heads): the weight of every head for every token, 0 where it is not chosen."""
        parts: list[Tensor] = []
        if self.wg_1 is not None:
            parts.append(self.wg_1(x).softmax(-1) * self.shared)
        elif self.shared == 1:
            parts.append(torch.ones_like(x[..., :1]))
        if self.wg is not None:
            chances = self.wg(x).softmax(-1)
            chosen = chances.topk(self.routed, dim=-1)[1]
            mask = torch.zeros_like(chances).scatter(-1, chosen, 1.0)
            kept = chances * mask
            parts.append(kept / kept.sum(-1, keepdim=True).clamp(min=self.least_sum) * self.routed)
            if not torch.jit.is_scripting():
                self.note_balance(chances, mask)
        if self.wg_0 is not None:
            balance = self.wg_0(x).softmax(-1) * 2
            parts = [parts[0] * balance[..., :1], parts[1] * balance[..., 1:]]
        gates = torch.cat(parts, -1)
        if self.heads == self.all_heads:
            return gates
        left: list[int] = []
        for i in range(self.all_heads):
            if (self.kept_heads >> i) % 2 == 1:
                left.append(i)
        return torch.stack([gates[..., i] for i in left], -1)

    @torch.jit.ignore
    def note_balance(self, chances: Tensor, mask: Tensor) -> None:
        """In training: keep how unevenly heads are chosen, over the tokens of the whole batch."""
        if not self.training:
            self.load_balance.keep(None)
            return
        used = chances.flatten(0, -2).mean(0) * mask.flatten(0, -2).mean(0)
        self.load_balance.keep(used.mean() * chances.shape[-1] ** 2)

    def bias(self, x: Tensor, pooled: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The table of position biases of a map (B, H, W, C), (heads, R, C), and the cells of rows and columns."""
        height, width = map_size(x)
        unit = [height, width] if self.coordinate_size is None else self.coordinate_size
        rows, of_rows = axis_cells(height, pooled[0], x.device)
        cols, of_cols = axis_cells(width, pooled[1], x.device)
        down = self.logarithm(of_rows, unit[0])[:, None].expand(-1, of_cols.shape[0])
        right = self.logarithm(of_cols, unit[1])[None].expand(of_rows.shape[0], -1)
        places = torch.stack([down, right], -1).to(self.temperature.dtype)
        table = self.cpb_fc2(self.cpb_act(self.cpb_fc1(places)))  # (R, C, heads)
        return table.permute(2, 0, 1), rows, cols

    def logarithm(self, distances: Tensor, unit: int) -> Tensor:
        """Distances in tokens, on the scale that the network of positions reads."""
        x = distances / larger(unit - 1, 1) * self.eighths
        return torch.sign(x) * torch.log2(x.abs() + 1.0) / self.octaves

    def extra_repr(self) -> str:
        return f"heads={self.heads}, shared={self.shared}, routed={self.routed}"


class MohAttention(MohBase):
    """Cosine attention of all tokens to all tokens, with heads that tokens choose; on channels-last maps.

    Args:
        dim, heads, kwargs: of `MohBase`.
        qkv_bias: give the qkv projection a bias.
    """

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool = True, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, heads, device=device, dtype=dtype, **kwargs)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)  # (B, H, W, heads, head_dim)
        table, rows, cols = self.bias(x, map_size(x))
        out = aggregated_attention(
            q,
            k.flatten(1, 2),
            v.flatten(1, 2),
            embedding=self.query_embedding.squeeze(1),
            temperature=F.softplus(self.temperature).flatten(),
            pooled_bias=table,
            bias_rows=rows,
            bias_cols=cols,
            gates=self.gates(x),
        )
        return self.proj_drop(self.proj(out.flatten(3)))


class MohAggregatedAttention(MohBase):
    """TransNeXt's aggregated attention with heads that tokens choose; on channels-last maps.

    Args:
        dim, heads, kwargs: of `MohBase`.
        sr_ratio: tokens of a side of a pooled cell; a shorter map has one cell.
        fixed_pool_size: cells a side in place of that; None: sr_ratio decides.
        kernel_size: tokens a side of the local keys, odd.
        qkv_bias: give the projections of q, k and v a bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        sr_ratio: int,
        fixed_pool_size: int | None = None,
        kernel_size: int = 3,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__(dim, heads, device=device, dtype=dtype, **kwargs)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"MohAggregatedAttention: kernel_size must be odd, got {kernel_size}")
        dd = {"device": device, "dtype": dtype}
        near = kernel_size**2
        self.sr_ratio, self.kernel_size = sr_ratio, kernel_size
        self.fixed_pool_size = 0 if fixed_pool_size is None else fixed_pool_size
        self.relative_pos_bias_local = nn.Parameter(torch.empty(heads, near, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(heads, dim // heads, near, **dd))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, near, **dd))
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, **dd)
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(3)  # (B, H, W, heads, head_dim)
        height, width = map_size(x)
        pooled = self.pooled_size(height, width)
        smaller = pool_map(self.act(self.sr(x.permute(0, 3, 1, 2))), pooled[0], pooled[1])
        smaller = self.norm(smaller.permute(0, 2, 3, 1)).flatten(1, 2)  # (B, P, C)
        pooled_k, pooled_v = self.kv(smaller).unflatten(-1, (2, self.heads, -1)).unbind(2)
        table, rows, cols = self.bias(x, pooled)
        side = self.kernel_size
        out = aggregated_attention(
            q,
            pooled_k,
            pooled_v,
            k,
            v,
            embedding=self.query_embedding.squeeze(1),
            temperature=F.softplus(self.temperature).flatten(),
            pooled_bias=table,
            bias_rows=rows,
            bias_cols=cols,
            local_bias=self.relative_pos_bias_local.unflatten(1, (side, side)),
            tokens=self.learnable_tokens,
            token_bias=self.learnable_bias.squeeze(1),
            gates=self.gates(x),
        )
        return self.proj_drop(self.proj(out.flatten(3)))

    def pooled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the pooled map."""
        if self.fixed_pool_size > 0:
            return self.fixed_pool_size, self.fixed_pool_size
        return larger(height // self.sr_ratio, 1), larger(width // self.sr_ratio, 1)
