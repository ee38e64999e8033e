"""Quantizable attention: a clipped softmax and gates let a head do nothing, so that training makes no outliers.

Paper      Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929.
Official   https://github.com/Qualcomm-AI-research/outlier-free-transformers: attention and keys (`alpha`) are theirs.
We differ  one qkv projection, as in timm's ViT; the authors project q, k and v apart.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from ._clip import read_clip
from .dense_attention import dense_attention
from .mixers import register_mixer

GATES = ("linear", "mlp", "mlp2", "all", "per_head", "unconditional")


class HeadGates(nn.Sequential):
    """One small network per head, of the head's channels: (B, N, C) -> (B, N, heads)."""

    def __init__(self, *gates: nn.Module) -> None:
        super().__init__(*gates)
        self.heads = len(gates)

    def forward(self, x: Tensor) -> Tensor:
        of_heads = x.unflatten(-1, (self.heads, -1))
        logits = []
        for i, gate in enumerate(self):
            logits.append(gate(of_heads[:, :, i]))
        return torch.cat(logits, dim=-1)


@register_mixer("gated")
class GatedAttention(nn.Module):
    """Attention with a clipped softmax, a gate, or both. Gates multiply heads before the output projection.

    The gate of a token and head is sigmoid(G(x)), with x the input of the attention:

    gate           G
    linear         one Linear(head_dim, 1) per head, of the head's channels of x
    mlp            one Linear - ReLU - Linear per head, hidden head_dim // 4 (the paper's table prints 4)
    mlp2           the same, hidden head_dim
    all            one Linear(dim, heads)
    per_head       as linear, but the logit is the mean over tokens: one gate per image and head
    unconditional  one number per head, learned, 0 at first

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        map_size: (rows, columns) of the map that the layer is made for. With prefix_tokens it gives the length T of
            clip_alpha: gamma = -clip_alpha / T, also where an input is longer.
        prefix_tokens: tokens before those of the map.
        qkv_bias: give the qkv projection a bias.
        softmax_clip: (gamma, zeta), or a name of the authors' table such as "clipped(-.003:1)".
        clip_alpha: see map_size; 2 to 4 are the paper's values.
        gate: one of the kinds above, or None.
        gate_init: what a gate is at first, above 0 and below 1; for linear and per_head, whose biases are set.
        gate_finetune: start from a model without gates: weights of linear gates are small, and outputs are divided by
            gate_init.
        proj_drop: dropout after the output projection.
    """

    learns_gate: Final[bool]
    computes_gate: Final[bool]
    averages_gate: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int] = (14, 14),
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        softmax_clip: Sequence[float] | str | None = None,
        clip_alpha: float | None = None,
        gate: str | None = None,
        gate_init: float = 0.5,
        gate_finetune: bool = False,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_gate_options(gate, gate_init, gate_finetune)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"GatedAttention: num_heads must divide dim {dim}, got {num_heads}")
        dd = {"device": device, "dtype": dtype}
        tokens = prefix_tokens + map_size[0] * map_size[1]
        clip = read_clip("GatedAttention", softmax_clip, clip_alpha, tokens)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.clip = None if clip is None else [*clip]
        self.gate = gate
        self.gate_init = gate_init
        self.gate_scale = 1 / gate_init if gate_finetune else 1.0
        self.learns_gate, self.computes_gate = gate == "unconditional", gate not in (None, "unconditional")
        self.averages_gate = gate == "per_head"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.alpha: Any = make_gate(gate, dim, num_heads, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Give gates their first value; the other layers keep theirs."""
        if self.learns_gate:
            nn.init.zeros_(self.alpha)
        elif self.computes_gate:
            for layer in (m for m in self.alpha.modules() if isinstance(m, nn.Linear)):
                layer.reset_parameters()
                if self.gate in ("linear", "per_head"):
                    nn.init.constant_(layer.bias, math.log(self.gate_init / (1 - self.gate_init)))
                    if self.gate_scale != 1.0:
                        nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # (B, N, C) -> (B, N, C)
        """`size` is of every mixer's call, and not read: nothing depends on where tokens lie."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        out = dense_attention(q, k, v, clip=self.clip, gate=self.gates(x), scale=self.scale)
        return self.proj_drop(self.proj(out.flatten(2)))

    def gates(self, x: Tensor) -> Tensor | None:  # (B, N, C) -> (B, N, heads)
        """Return the gate of every token and head; None without a gate."""
        if self.learns_gate:
            return self.alpha.sigmoid().expand(x.shape[0], x.shape[1], -1) * self.gate_scale
        elif self.computes_gate:
            logits = self.alpha(x)
            if self.averages_gate:
                logits = logits.mean(1, keepdim=True).expand(-1, x.shape[1], -1)
            return logits.sigmoid() * self.gate_scale
        else:
            return None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, clip={self.clip}, gate={self.gate}"


def check_gate_options(gate: str | None, gate_init: float, gate_finetune: bool) -> None:
    """Raise ValueError where the options of a gate are unknown, out of range, or without a gate."""
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate must be None or one of {', '.join(GATES)}, got {gate!r}")
    if not 0 < gate_init < 1:
        raise ValueError(f"gate_init must be above 0 and below 1, got {gate_init!r}")
    if gate is None and gate_finetune:
        raise ValueError("gate_finetune needs a gate, got gate=None")


def make_gate(gate: str | None, dim: int, heads: int, **dd) -> nn.Module | nn.Parameter | None:
    head_dim = dim // heads
    hidden = {"mlp": max(head_dim // 4, 1), "mlp2": head_dim}
    if gate is None:
        return None
    if gate == "unconditional":
        return nn.Parameter(torch.zeros(heads, **dd))
    if gate == "all":
        return nn.Linear(dim, heads, **dd)
    if gate in hidden:
        layers = [(nn.Linear(head_dim, hidden[gate], **dd), nn.Linear(hidden[gate], 1, **dd)) for _ in range(heads)]
        return HeadGates(*(nn.Sequential(first, nn.ReLU(), last) for first, last in layers))
    return HeadGates(*(nn.Linear(head_dim, 1, **dd) for _ in range(heads)))
