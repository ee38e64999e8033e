"""The attention layers of CLEAR: circles of image tokens, text that sees and is seen by all, averages of cells.

Paper      Liu et al. 2024, arXiv:2412.16112 (CLEAR), in the blocks of FLUX (diffusers' Attention).
Official   https://github.com/Huage001/CLEAR (Apache-2.0). Text queries see text and image, but no cells.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._graph.sizes import known
from .circle import circle_attention
from .mixers import register_mixer

LONGEST = 4608  # keys for which proportional attention has the plain scale: 512 text tokens and 64 x 64 of an image


def axial_rotary(
    size: tuple[int, int], axes_dim: tuple[int, int, int], prefix_tokens: int = 0, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Make FLUX's rotary tables of a map: cosines and sines, (prefix_tokens + H * W, sum of axes_dim) each, float32.

    Args:
        size: (H, W).
        axes_dim: channels of a head that turn with a constant, with the row and with the column; even numbers.
        prefix_tokens: tokens ahead of the map, which do not turn.
        theta: base of the frequencies.
    """
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    places = torch.stack([torch.zeros(size, dtype=torch.float64), rows, cols], -1).flatten(0, 1)
    places = F.pad(places, (0, 0, prefix_tokens, 0))
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append((places[:, axis, None] * frequencies).repeat_interleave(2, 1))
    turned = torch.cat(angles, 1)
    return turned.cos().float(), turned.sin().float()


def turn(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn pairs of neighboring channels of (B, N, heads, d) by tables (N, d); None: as it is."""
    if rotary is None:
        return x
    cos, sin = rotary[0][:, None].to(x.dtype), rotary[1][:, None].to(x.dtype)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return x * cos + turned * sin


@register_mixer("circle")
class CircleAttention(nn.Module):
    """Multi-head circular attention with its projections, a token mixer (see mixers.py).

    Prefix tokens are text: they see all tokens and all tokens see them. Maps of any size; with cells, of multiples of
    the cell.

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        map_size: of all mixers; this one does not need it.
        prefix_tokens: tokens of text, ahead of the map.
        qkv_bias: give the qkv projection a bias.
        radius: a token sees the tokens at a distance below it.
        down_factor: side of a cell in tokens, whose keys and values are averaged with learned weights; 1: no cells.
        qk_norm: RMSNorm of each head of queries and keys.
        proportional: scale logits by sqrt(log_4608(keys) / head_dim), with 10 times the keys where there are cells.
        proj: give the layer an output projection.
        proj_drop: dropout after it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        radius: int = 8,
        down_factor: int = 1,
        qk_norm: bool = False,
        proportional: bool = False,
        proj: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if radius < 1 or down_factor < 1:
            raise ValueError(f"CircleAttention: radius and down_factor must be at least 1, got {radius}, {down_factor}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.map_size = tuple(map_size)
        self.prefix_tokens = prefix_tokens
        self.radius, self.down_factor, self.proportional = radius, down_factor, proportional
        self.longest = LONGEST
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **dd) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **dd) if qk_norm else nn.Identity()
        cells = torch.full((down_factor, down_factor), down_factor**-2.0, **dd) if down_factor > 1 else None
        self.cell_weight = None if cells is None else nn.Parameter(cells)
        self.proj = nn.Linear(dim, dim, **dd) if proj else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, size: tuple[int, int], rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:  # (B, N, C) -> (B, N, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        out = self.attend(turn(self.q_norm(q), rotary), turn(self.k_norm(k), rotary), v, self.prefix_tokens, size)
        return self.proj_drop(self.proj(out.flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: int, size: tuple[int, int]) -> Tensor:
        """(B, text + H * W, heads, head_dim) three times -> the same."""
        if torch.jit.is_scripting():
            q = q * self.scale(k.shape[1])
        else:
            q = q * self.any_scale(k.shape[1], q)
        shape = [size[0], size[1]]
        maps = [t.narrow(1, text, t.shape[1] - text).unflatten(1, shape) for t in [q, k, v]]
        if text == 0:
            out = circle_attention(
                maps[0], maps[1], maps[2], self.radius, cell_weight=self.cell_weight, scale=1.0
            )  # fmt: skip
            return out.flatten(1, 2)
        out = circle_attention(
            maps[0],
            maps[1],
            maps[2],
            self.radius,
            cell_weight=self.cell_weight,
            text_k=k.narrow(1, 0, text),
            text_v=v.narrow(1, 0, text),
            scale=1.0,
        )
        queries, keys, values = q.narrow(1, 0, text).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        of_text = F.scaled_dot_product_attention(queries, keys, values, scale=1.0).transpose(1, 2)
        return torch.cat([of_text, out.flatten(1, 2)], 1)

    def scale(self, keys: int) -> float:
        """What multiplies the logits, for a sequence of so many keys."""
        if not self.proportional:
            return self.head_dim**-0.5
        count = keys * 10 if self.down_factor > 1 else keys
        return math.sqrt(math.log(count) / math.log(self.longest) / self.head_dim)

    @torch.jit.ignore
    def any_scale(self, keys: int, like: Tensor) -> float | Tensor:
        """The same; for a free number of keys, a tensor of `like`'s dtype."""
        if known(keys) or not self.proportional:
            return self.scale(keys)
        place = torch.arange(keys, device=like.device)[-1:]
        count = (place + 1).double() * (10 if self.down_factor > 1 else 1)
        return (count.log() / (math.log(self.longest) * self.head_dim)).sqrt().to(like.dtype)

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, radius={self.radius}, down_factor={self.down_factor}"
        return f"{sizes}, prefix_tokens={self.prefix_tokens}, proportional={self.proportional}"


class JointCircleAttention(CircleAttention):
    """CLEAR's layer of two streams: text and image have projections of their own, and attend together.

    Args:
        dim, num_heads, kwargs: of `CircleAttention`.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = True, device=None, dtype=None, **kwargs) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, map_size=(1, 1), qk_norm=qk_norm, **kwargs, **dd)
        self.text_qkv = nn.Linear(dim, 3 * dim, **dd)
        self.text_q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **dd) if qk_norm else nn.Identity()
        self.text_k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **dd) if qk_norm else nn.Identity()
        self.text_proj = nn.Linear(dim, dim, **dd)

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        text: Tensor,
        size: tuple[int, int],
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, H * W, C) and (B, T, C) -> the same; `rotary` has the tables of text and image, in this order."""
        heads = [x.unflatten(-1, (3, self.num_heads, -1)) for x in (self.text_qkv(text), self.qkv(image))]
        q = torch.cat([self.text_q_norm(heads[0][:, :, 0]), self.q_norm(heads[1][:, :, 0])], 1)
        k = torch.cat([self.text_k_norm(heads[0][:, :, 1]), self.k_norm(heads[1][:, :, 1])], 1)
        v = torch.cat([heads[0][:, :, 2], heads[1][:, :, 2]], 1)
        tokens = text.shape[1]
        out = self.attend(turn(q, rotary), turn(k, rotary), v, tokens, size).flatten(2)
        image_out = self.proj(out.narrow(1, tokens, out.shape[1] - tokens))
        return self.proj_drop(image_out), self.text_proj(out.narrow(1, 0, tokens))
