"""What the families of Agent Attention share: configs, a block of maps, checkpoints resized to other image sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_module, resolve_pretrained_cfg
from torch import Tensor, nn

from .._weights import unwrap
from ..attention_ops import ReducedAgentAttention
from ._build import M, StateDict, build, check_fits
from ._staged import StageConfig

register_notrace_module(ReducedAgentAttention)

Pair = tuple[int, int]
Shapes = tuple[Pair, ...]
C = TypeVar("C")

AGENT: dict[str, Any] = {
    "license": "not stated",
    "paper_ids": "arXiv:2312.08874",
    "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
    "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
}


def on_drive(share: str) -> dict[str, Any]:
    """What a pretrained_cfg says of weights that a program cannot download."""
    return {
        "notes": (
            f"The weights are on a drive, https://cloud.tsinghua.edu.cn/f/{share}/?dl=1; download the file and give it "
            "with pretrained_cfg_overlay=dict(file=...).",
        )
    }


def at(px: int) -> dict[str, Any]:
    """A pretrained_cfg's fields for weights of an image size, evaluated without a crop."""
    return {"input_size": (3, px, px), "pool_size": (px // 32, px // 32), "crop_pct": 1.0}


def numbers(name: str, value: Any, count: int) -> tuple[int, ...]:
    """Read one number per stage: a sequence, or the authors' texts ("9-16-49-49", "2111").

    Raises:
        ValueError: no such text, or another count.
    """
    if isinstance(value, str):
        value = value.split("-") if "-" in value else list(value)
    if not isinstance(value, Sequence) or len(value) != count or not all(str(n).isdigit() for n in value):
        raise ValueError(f"{name} must have one number per stage, {count}, got {value!r}")
    return tuple(int(n) for n in value)


def check_squares(name: str, values: Sequence[int]) -> None:
    """Raise ValueError unless every number of agents is a square."""
    if odd := [n for n in values if n < 1 or isqrt(n) ** 2 != n]:
        raise ValueError(f"{name} must be square numbers (9, 16, 49, ...), got {odd[0]}")


def image_pair(size: int | Sequence[int]) -> Pair:
    """Return (height, width) in pixels of an int or a pair."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"img_size must be pixels, a number or (height, width), got {size!r}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class AgentConfig(StageConfig):
    """Fields that the staged families share; numbers per stage may be given as the authors' texts."""

    dims: tuple[int, ...] = (64, 128, 320, 512)  # channels, per stage
    depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks, per stage
    heads: tuple[int, ...] = (1, 2, 5, 8)  # per stage
    agent_num: tuple[int, ...] | str = (9, 16, 49, 49)  # agents that the biases are made for, per stage
    attn_type: str = "AAAA"  # a letter a stage: A agent attention, B the host's own, M both; "AAMB2": M begins with 2 A
    downstream_agent_shapes: Shapes | None = None  # agents pooled, (rows, columns) per stage; None: as agent_num
    img_size: int | Pair = 224  # pixels; position tables are made for it

    per_stage = ("depths", "heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.dims)
        object.__setattr__(self, "agent_num", numbers("agent_num", self.agent_num, stages))
        check_squares("agent_num", numbers("agent_num", self.agent_num, stages))
        if odd := [(d, h) for d, h in zip(self.dims, self.heads, strict=True) if h < 1 or d % h]:
            raise ValueError(f"heads must divide dims, got {odd[0][1]} heads for {odd[0][0]} channels")
        agent_blocks(self.attn_type, self.depths)
        shapes = self.downstream_agent_shapes
        if shapes is not None and (len(shapes) != stages or any(len(s) != 2 or min(s) < 1 for s in shapes)):
            raise ValueError(f"downstream_agent_shapes must have (rows, columns) per stage, {stages}, got {shapes}")
        image_pair(self.img_size)
        if any(min(size) < 1 for size in self.maps):
            raise ValueError(f"img_size must leave a map in every stage, got {self.img_size}, maps {self.maps}")

    @property
    def maps(self) -> list[Pair]:
        """Size of every stage's map for images of `img_size`."""
        raise NotImplementedError

    def agents(self, stage: int) -> dict[str, Any]:
        """Keywords of the agents of a stage."""
        shapes = self.downstream_agent_shapes
        return {"agents": self.agent_num[stage], "agent_shape": None if shapes is None else shapes[stage]}


def agent_blocks(attn_type: str, depths: Sequence[int]) -> list[list[bool]]:
    """Say which blocks of which stage have agent attention.

    Raises:
        ValueError: not one letter A, B or M per stage, or M without a number behind the letters.
    """
    letters, count = attn_type[: len(depths)], attn_type[len(depths) :]
    known = len(letters) == len(depths) and set(letters) <= set("ABM")
    if not known or (not count.isdigit() if "M" in letters else count):
        wanted = f"a letter A, B or M per stage, {len(depths)}, and behind them a number if one is M"
        raise ValueError(f"attn_type must be {wanted}, got {attn_type!r}")
    first = {"A": max(depths), "B": 0, "M": int(count or 0)}
    return [[i < first[letter] for i in range(depth)] for letter, depth in zip(letters, depths, strict=True)]


def sized(config: C, variant: str, kwargs: Mapping[str, Any]) -> C:
    """Return the config with the image size of the weights that are asked for (a tag such as in1k_448)."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return replace(config, img_size=tuple(cfg.input_size[-2:]))  # type: ignore[type-var]  # every config has the field


def build_agent(
    make: Callable[..., M], config: Any, variant: str, pretrained: bool, filter_fn: Callable, **kwargs: Any
) -> M:
    """Build a variant as `build` does, for the image size of the weights that are asked for."""
    return build(make, sized(config, variant, kwargs), variant, pretrained, filter_fn, **kwargs)


class AgentBlock(nn.Module):
    """Attention and MLP on maps, each behind a LayerNorm and with a shortcut."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, eps: float, drop: float, drop_path: float, **dd
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


LINES = {"ah_bias": 3, "ha_bias": 2, "aw_bias": 4, "wa_bias": 3}  # axis of the map's side
DROPPED = ("attn_mask", "relative_position_index")  # computed from sizes


def load_agent(
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    our_key: Callable[[str], str],
    positions: Mapping[str, tuple[Pair, int]] | None = None,
) -> StateDict:
    """Rename the keys of an official checkpoint, and resize what depends on the image size as the authors' loader does.

    Biases of rows and columns are resized linearly, position embeddings, relative position tables and patch kernels
    bicubically.

    Args:
        our_key: from an official key to ours; ours pass through.
        positions: position embeddings by key, with the size of their map and the tokens before those of the map.

    Raises:
        ValueError: the weights are another model's.
    """
    state = {our_key(key): value for key, value in unwrap(checkpoint).items() if not key.endswith(DROPPED)}
    own = model.state_dict()
    state = {key: _resized(key, value, own.get(key)) for key, value in state.items()}
    for key, (size, prefix) in (positions or {}).items():
        if key in state and key in own and state[key].dim() == 3 and state[key].shape != own[key].shape:
            state[key] = _resize_square(state[key], prefix, *size)
    return check_fits(state, model)


def _resized(key: str, value: Tensor, own: Tensor | None) -> Tensor:
    if own is None or own.shape == value.shape or own.dim() != value.dim():
        return value
    name = key.rpartition(".")[2]
    if name in LINES:
        return _resize_line(value, LINES[name], own.shape[LINES[name]])
    if name == "relative_position_bias_table":
        return _resize_square(value[None], 0, isqrt(len(own)), isqrt(len(own)))[0]
    if key.endswith("patch_embed.proj.weight") and own.shape[:2] == value.shape[:2]:
        return F.interpolate(value.float(), size=own.shape[2:], mode="bicubic", align_corners=False).to(value.dtype)
    return value


def _resize_line(value: Tensor, axis: int, length: int) -> Tensor:
    moved = value.movedim(axis, -1)
    line = F.interpolate(moved.flatten(0, -2)[None].float(), size=length, mode="linear", align_corners=False)[0]
    return line.view(*moved.shape[:-1], length).movedim(-1, axis).to(value.dtype)


def _resize_square(table: Tensor, prefix: int, rows: int, cols: int) -> Tensor:
    """Resize (1, prefix + side * side, C) to (1, prefix + rows * cols, C); unchanged if it holds no square."""
    first, rest = table[:, :prefix], table[:, prefix:]
    side = isqrt(rest.shape[1])
    if side * side != rest.shape[1]:
        return table
    grid = rest.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(rows, cols), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)
