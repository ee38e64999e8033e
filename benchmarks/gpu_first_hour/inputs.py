"""What a case is made of: tensors in every memory layout, the fused call, and the definition."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Pair = tuple[int, int]


class Made(NamedTuple):
    """Tensors, and two functions of them: the fused body and the definition."""

    leaves: list[Tensor]
    ours: Callable[[list[Tensor]], Tensor]
    exact: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """One call. `make` takes the device."""

    name: str
    dtype: torch.dtype
    make: Callable[[str], Made]

    @property
    def op(self) -> str:
        return self.name.split()[0]


def normal(*shape: int, device: str, dtype: torch.dtype = FP32, factor: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * factor).to(dtype)


def qkv(
    layout: str, shape: tuple[int, ...], device: str, dtype: torch.dtype, factor: float = 1.0
) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
    """Return tensors, and the function that views them as q, k, v: (B, H, W, heads, head_dim).

    Args:
        layout: "packed", "heads first", "nchw", "crop" or "expanded".
    """
    batch, height, width, heads, dim = shape

    def three(*sizes: int) -> list[Tensor]:
        return [normal(*sizes, device=device, dtype=dtype, factor=factor) for _ in "qkv"]

    if layout == "packed":
        packed = normal(batch, height, width, 3, heads, dim, device=device, dtype=dtype, factor=factor)
        return [packed], lambda t: list(t[0].unbind(3))
    if layout == "heads first":
        return three(batch, heads, height, width, dim), lambda t: [x.permute(0, 2, 3, 1, 4) for x in t]
    if layout == "nchw":
        leaves = three(batch, heads * dim, height, width)
        return leaves, lambda t: [x.permute(0, 2, 3, 1).unflatten(-1, (heads, dim)) for x in t]
    if layout == "crop":
        leaves = three(batch, height + 2, width + 3, heads, dim + 3)
        return leaves, lambda t: [x[:, 1:-1, 2:-1, :, 1:-2] for x in t]
    if layout == "expanded":
        shapes = (shape, (batch, height, width, 1, dim), (1, height, width, heads, dim))
        leaves = [normal(*s, device=device, dtype=dtype, factor=factor) for s in shapes]
        return leaves, lambda t: [x.expand(shape) for x in t]
    raise ValueError(f"no such layout: {layout!r}")
