"""Agent attention with the paper's agents, biases and local term: layers for maps of any size.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention), equations for the agent bias and the DWC module.
Agents     the means of the queries over a grid of cells, before the heads are split.
Sizes      the biases keep the size of the map that they are made for. On another map they are resized as in the
           authors' detection and segmentation code: bilinear to the map, then bilinear over the grid of the agents. On
           their own map and grid this changes no bit.
"""

from math import isqrt

import torch
from torch import Tensor, nn

from ._graph.sizes import is_known
from .agent import agent_attention
from .mixers import register_mixer
from .resizing import pool_map, resize_map

BLOCK = 7  # side of the block bias, which is resized to every map


class AgentBiases(nn.Module):
    """The biases of agent attention, and attention through agents that are pooled from the queries.

    Args:
        heads: number of heads.
        agents: number of agents that the biases are made for, a square number.
        map_size: (rows, columns) of the queries' map that the biases are made for.
        key_size: of the keys' map; that of the queries when None.
        agent_shape: grid of agents, (rows, columns), to which the biases are resized; the square one of `agents` when
            None.
        prefix_tokens: tokens before those of the map (class token): queries and keys, but no part of an agent.

    Raises:
        ValueError: agents is no square number, or a side is below 1.
    """

    def __init__(
        self,
        heads: int,
        agents: int,
        map_size: tuple[int, int],
        key_size: tuple[int, int] | None = None,
        agent_shape: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        side = isqrt(max(agents, 0))
        if side < 1 or side * side != agents:
            raise ValueError(f"{type(self).__name__}: agents must be a square number (9, 16, 49, ...), got {agents}")
        (rows, cols), (key_rows, key_cols) = map_size, key_size or map_size
        shape = (side, side) if agent_shape is None else (agent_shape[0], agent_shape[1])
        if min(rows, cols, key_rows, key_cols, *shape) < 1:
            sizes = f"map_size {map_size}, key_size {key_size}, agent_shape {agent_shape}"
            raise ValueError(f"{type(self).__name__}: every side must be at least 1, got {sizes}")
        self.heads = heads
        self.grid = side  # of the agents that the biases are made for
        self.agent_shape = shape
        self.prefix_tokens = prefix_tokens
        self.an_bias = nn.Parameter(torch.empty(heads, agents, BLOCK, BLOCK, **dd))
        self.na_bias = nn.Parameter(torch.empty(heads, agents, BLOCK, BLOCK, **dd))
        self.ah_bias = nn.Parameter(torch.empty(1, heads, agents, key_rows, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(1, heads, agents, 1, key_cols, **dd))
        self.ha_bias = nn.Parameter(torch.empty(1, heads, rows, 1, agents, **dd))
        self.wa_bias = nn.Parameter(torch.empty(1, heads, 1, cols, agents, **dd))
        self.ac_bias: nn.Parameter | None = None
        self.ca_bias: nn.Parameter | None = None
        if prefix_tokens:
            self.ac_bias = nn.Parameter(torch.empty(1, heads, agents, prefix_tokens, **dd))
            self.ca_bias = nn.Parameter(torch.empty(1, heads, prefix_tokens, agents, **dd))
        for bias in self.parameters():
            nn.init.trunc_normal_(bias, std=0.02)

    def bias_to(self, height: int, width: int) -> Tensor:
        """The bias where agents gather from the tokens of a map: (heads, agents, prefix tokens + height * width)."""
        lines = (self.ah_bias + self.aw_bias)[0]  # (heads, agents, rows, columns)
        bias = (resize_map(self.an_bias, height, width) + resize_map(lines, height, width)).flatten(2)
        if self.ac_bias is not None:
            bias = torch.cat([self.ac_bias[0], bias], 2)
        return self.for_agents(bias)

    def bias_from(self, height: int, width: int) -> Tensor:
        """The bias where the tokens of a map read from agents: (heads, prefix tokens + height * width, agents)."""
        lines = (self.ha_bias + self.wa_bias)[0].permute(0, 3, 1, 2)  # (heads, agents, rows, columns)
        bias = (resize_map(self.na_bias, height, width) + resize_map(lines, height, width)).flatten(2)
        if self.ca_bias is not None:
            bias = torch.cat([self.ca_bias[0].transpose(1, 2), bias], 2)
        return self.for_agents(bias).transpose(1, 2)

    def for_agents(self, bias: Tensor) -> Tensor:
        """(heads, own agents, tokens) -> (heads, agents of `agent_shape`, tokens)."""
        rows, cols = self.agent_shape
        if rows == self.grid and cols == self.grid:
            return bias
        bias = bias.transpose(1, 2).unflatten(2, [self.grid, self.grid])  # (heads, tokens, rows, columns)
        return resize_map(bias, rows, cols).flatten(2).transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], key_size: tuple[int, int], scale: float
    ) -> Tensor:
        """Attend through agents pooled from q: q (B, prefix + H W, C), k and v (B, prefix + h w, C) -> as q."""
        few = pool_map(self.on_map(q, size), self.agent_shape[0], self.agent_shape[1]).flatten(2).transpose(1, 2)
        out = agent_attention(
            q.unflatten(-1, [self.heads, -1]),
            k.unflatten(-1, [self.heads, -1]),
            v.unflatten(-1, [self.heads, -1]),
            few.unflatten(-1, [self.heads, -1]),
            bias_to=self.bias_to(key_size[0], key_size[1]),
            bias_from=self.bias_from(size[0], size[1]),
            scale=scale,
        )
        return out.flatten(2)

    def on_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The map in tokens (B, prefix + H W, C), as (B, C, H, W)."""
        return x[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, [size[0], size[1]])

    def add_to_map(self, x: Tensor, local: Tensor) -> Tensor:
        """Add a map (B, C, H, W) to tokens (B, prefix + H W, C)."""
        tokens = local.flatten(2).transpose(1, 2)
        if self.prefix_tokens == 0:
            return x + tokens
        return torch.cat([x[:, : self.prefix_tokens], x[:, self.prefix_tokens :] + tokens], 1)


def init_linear(*layers: nn.Linear) -> None:
    """Draw weights as ViTs do."""
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_heads(name: str, dim: int, heads: int) -> None:
    """Raise ValueError unless heads divide the channels."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: heads must divide dim {dim}, got {heads}")


@register_mixer("agent")
class AgentAttention(AgentBiases):
    """The paper's layer on tokens: projections, attention through pooled agents, depthwise 3x3 convolution of v.

    Cost: linear in the tokens: 4 C^2 + 4 n C + 9 C multiply-adds per token, for n agents.

    Args:
        dim: channels C; num_heads must divide it.
        num_heads: number of heads.
        map_size: (H, W) that the biases are made for; `forward` takes maps of any size.
        prefix_tokens: tokens before those of the map (class token, registers): queries and keys; they are no part of
            an agent and not convolved.
        qkv_bias: give the qkv projection a bias.
        agents: number of agents, a square number.
        agent_shape: (rows, columns) of agents, if another grid than the square one of `agents`: the biases are resized.
        proj_drop: dropout after the output projection. There is no dropout of probabilities.

    Raises:
        ValueError: num_heads does not divide dim, or agents is no square number.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        agents: int = 49,
        agent_shape: tuple[int, int] | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_heads(type(self).__name__, dim, num_heads)
        dd = {"device": device, "dtype": dtype}
        super().__init__(num_heads, agents, map_size, None, agent_shape, prefix_tokens, **dd)
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        init_linear(self.qkv, self.proj)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, prefix + H W, C), (H, W) -> (B, ..., C)
        return self.mix(x, size)

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the layer's output before the output projection, (B, N, C)."""
        if not torch.jit.is_scripting():
            self.check_tokens(x, size)
        q, k, v = self.qkv(x).unflatten(-1, [3, -1]).unbind(2)
        out = self.add_to_map(self.attend(q, k, v, size, size, self.scale), self.dwc(self.on_map(v, size)))
        return self.proj_drop(self.proj(out))

    @torch.jit.unused
    def check_tokens(self, x: Tensor, size: tuple[int, int]) -> None:
        """Raise ValueError where the tokens are known not to be those of the map."""
        if is_known(x.shape[1] != self.prefix_tokens + size[0] * size[1]):
            wanted = f"{self.prefix_tokens} + {size[0]} * {size[1]} tokens for a map of {tuple(size)}"
            raise ValueError(f"{type(self).__name__}: wanted {wanted}, got x of shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"heads={self.heads}, agent_shape={self.agent_shape}, prefix_tokens={self.prefix_tokens}"


class ReducedAgentAttention(AgentBiases):
    """The layer of Agent-PVT on maps: keys and values may come from a map that a convolution made smaller.

    The local term is the convolution of v, which is resized (bilinear) to the queries' map where it is smaller.

    Args:
        dim, num_heads, map_size, qkv_bias, agents, agent_shape, proj_drop: as in `AgentAttention`.
        sr_ratio: stride and side of the convolution that reduces the map before the keys and values; 1: none.

    Raises:
        ValueError: num_heads does not divide dim, agents is no square number, or sr_ratio is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        agents: int = 49,
        agent_shape: tuple[int, int] | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_heads(type(self).__name__, dim, num_heads)
        if sr_ratio < 1:
            raise ValueError(f"{type(self).__name__}: sr_ratio must be at least 1, got {sr_ratio}")
        dd = {"device": device, "dtype": dtype}
        key_size = (map_size[0] // sr_ratio, map_size[1] // sr_ratio)
        super().__init__(num_heads, agents, map_size, key_size, agent_shape, **dd)
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, **dd) if sr_ratio > 1 else None
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        init_linear(self.q, self.kv, self.proj)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        size = (x.shape[1], x.shape[2])
        keys, key_size = x.flatten(1, 2), size
        q = self.q(keys)
        if self.sr is not None and self.norm is not None:
            small = self.sr(x.permute(0, 3, 1, 2))
            key_size = (small.shape[2], small.shape[3])
            keys = self.norm(small.flatten(2).transpose(1, 2))
        k, v = self.kv(keys).unflatten(-1, [2, -1]).unbind(2)
        local = self.dwc(resize_map(self.on_map(v, key_size), size[0], size[1]))
        out = self.add_to_map(self.attend(q, k, v, size, key_size, self.scale), local)
        return self.proj_drop(self.proj(out)).unflatten(1, [size[0], size[1]])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, agent_shape={self.agent_shape}"
