"""Simulated int8: a quantizer's ranges and rounding in float arithmetic, to measure what a setting costs in accuracy.

Paper      Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929: the settings of `OUTLIER_FREE`.
Speed      none: nothing here is faster than float32, and nothing here is timed. Files with int8 weights are written by
           `quantize_onnx` and `quantize_program`.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._modes import evaluating
from ..attention_ops._clip import clipped
from ..attention_ops.gated import GatedAttention
from ..backbones._vit import ViTBlock
from .errors import ExportError

Estimator = Literal["minmax", "mse"]
_CANDIDATES = 100  # ranges that the mse estimator tries
_LEAST_RANGE = 1e-8


@dataclass(frozen=True)
class Quantizer:
    """Settings of a simulation.

    Attributes:
        weights: how the range of a weight is found: "minmax", or "mse", the range of least squared error.
        weight_bits, activation_bits: of the integers.
        momentum: share of the old range of an activation that a new batch leaves; the first batch is taken as it is.
        batches: of calibration.
    """

    weights: Estimator = "minmax"
    weight_bits: int = 8
    activation_bits: int = 8
    momentum: float = 0.9
    batches: int = 16


OUTLIER_FREE = Quantizer()  # the paper's W8A8: symmetric weights, asymmetric activations, one range a tensor
PRESETS = {"outlier-free": OUTLIER_FREE}


@dataclass(frozen=True)
class Grid:
    """Integers low to high, and the numbers that they stand for: scale * (integer - zero_point)."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers, as floats; halves are rounded to even."""
        return (torch.round(x / self.scale) + self.zero_point).clamp(self.low, self.high)

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * (self.integers(x) - self.zero_point)


def symmetric_grid(least: Tensor, most: Tensor, bits: int = 8) -> Grid:
    """Return a grid around 0; without negative numbers it is that of unsigned integers."""
    zero = torch.zeros_like(most)
    if least >= 0:
        return Grid(most.clamp(min=_LEAST_RANGE) / (2**bits - 1), zero, 0, 2**bits - 1)
    half = 2 ** (bits - 1)
    return Grid(torch.maximum(least.abs(), most) / (half - 1), zero, -half, half - 1)


def asymmetric_grid(least: Tensor, most: Tensor, bits: int = 8) -> Grid:
    """Return a grid of unsigned integers from `least` to `most`, widened to hold 0."""
    least, most, levels = least.clamp(max=0), most.clamp(min=_LEAST_RANGE), 2**bits - 1
    scale = (most - least) / levels
    return Grid(scale, torch.round(-least / scale).clamp(0, levels), 0, levels)


def weight_grid(weight: Tensor, bits: int = 8, estimator: Estimator = "minmax") -> Grid:
    """Return the symmetric grid of a weight, one range for the tensor."""
    if estimator == "minmax":
        return symmetric_grid(weight.min(), weight.max(), bits)
    if estimator != "mse":
        raise ExportError(f"weights: wanted 'minmax' or 'mse', got {estimator!r}")
    step = (weight.abs().max() + 0.5) / _CANDIDATES
    ranges = (step * i for i in range(1, _CANDIDATES + 1))
    grids = [symmetric_grid(-most if weight.min() < 0 else torch.zeros_like(most), most, bits) for most in ranges]
    return min(grids, key=lambda grid: float((grid(weight) - weight).square().sum()))


def percentile_range(x: Tensor, percentile: float) -> tuple[float, float]:
    """Return the range that leaves out 100 - percentile % of the numbers at either end, by linear interpolation."""
    import numpy as np

    low, high = np.percentile(x.detach().numpy(), (100 - percentile, percentile))
    return float(low), float(high)


class ActivationQuantizer(nn.Module):
    """Round activations to a grid; while it observes, every batch first moves the range."""

    least: Tensor
    most: Tensor

    def __init__(self, settings: Quantizer) -> None:
        super().__init__()
        self.settings, self.observes, self.seen = settings, True, False
        self.register_buffer("least", torch.zeros(()))
        self.register_buffer("most", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.observes:
            self.observe(x)
        return self.grid(x)

    def observe(self, x: Tensor) -> None:
        old = self.settings.momentum if self.seen else 0.0
        self.least = old * self.least + (1 - old) * x.min()
        self.most = old * self.most + (1 - old) * x.max()
        self.seen = True

    @property
    def grid(self) -> Grid:
        return asymmetric_grid(self.least, self.most, self.settings.activation_bits)


class _Layer(nn.Module):
    """A linear layer or convolution with weights on a grid, and its output too, in `parts` with ranges of their own.

    Args:
        rounds_output: False where an activation function directly behind it is rounded instead.
    """

    def __init__(self, layer: nn.Module, settings: Quantizer, parts: int = 1, rounds_output: bool = True) -> None:
        super().__init__()
        self.layer = deepcopy(layer)
        weight: Any = self.layer.weight
        with torch.no_grad():
            rounded = [weight_grid(w, settings.weight_bits, settings.weights)(w) for w in weight.chunk(parts)]
            weight.copy_(torch.cat(rounded))
        kinds = [ActivationQuantizer(settings) for _ in range(parts)] if rounds_output else []
        self.outputs = nn.ModuleList(kinds)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if not self.outputs:
            return out
        axis = 1 if isinstance(self.layer, nn.Conv2d) else -1
        parts = zip(self.outputs, out.chunk(len(self.outputs), axis), strict=True)
        return torch.cat([quantize(part) for quantize, part in parts], axis)


class _Norm(nn.Module):
    """A LayerNorm whose scale is on a grid, as a weight; its shift stays float."""

    def __init__(self, norm: nn.LayerNorm, settings: Quantizer) -> None:
        super().__init__()
        self.norm, self.output = deepcopy(norm), ActivationQuantizer(settings)
        with torch.no_grad():
            self.norm.weight.copy_(weight_grid(norm.weight, settings.weight_bits, settings.weights)(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))


class _Activation(nn.Module):
    """An activation function directly behind a linear layer: one quantizer for both."""

    def __init__(self, function: nn.Module, settings: Quantizer) -> None:
        super().__init__()
        self.function, self.output = function, ActivationQuantizer(settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.function(x))


class _Attention(nn.Module):
    """Gated attention with q, k, v, scaled scores, probabilities and the gated output on grids; gates stay float."""

    def __init__(self, attention: GatedAttention, settings: Quantizer) -> None:
        super().__init__()
        self.attention = attention
        self.attention.qkv = _Layer(attention.qkv, settings, parts=3)  # type: ignore[assignment]
        self.attention.proj = _Layer(attention.proj, settings)  # type: ignore[assignment]
        self.scores, self.probs, self.context = (ActivationQuantizer(settings) for _ in range(3))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.attention.proj_drop(self.attention.proj(self.attend(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Return what the output projection reads, (B, N, C)."""
        layer = self.attention
        q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.scores(torch.matmul(q, k.mT) / layer.scale**-1)
        out = torch.matmul(self.probs(clipped(scores.softmax(-1), layer.clip)), v).transpose(1, 2)
        gate = layer.gates(x)
        return self.context((out if gate is None else out * gate[..., None]).flatten(2))


class _Block(nn.Module):
    """A block of ours whose residual sums are on grids."""

    def __init__(self, block: ViTBlock, settings: Quantizer) -> None:
        super().__init__()
        self.block = block
        self.first, self.second = ActivationQuantizer(settings), ActivationQuantizer(settings)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        x = self.first(x + block.drop_path1(block.ls1(block.attn(block.norm1(x)))))
        return self.second(x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


def simulate_int8(model: nn.Module, batches: Iterable[Tensor], settings: Quantizer = OUTLIER_FREE) -> nn.Module:
    """Return a copy of a model that computes as an int8 model would, in float arithmetic, calibrated on batches.

    On grids are: weights of linear layers and convolutions and their outputs (behind a GELU where one follows
    directly), scales and outputs of LayerNorms; in our plain ViTs of gated attention also scores, probabilities, the
    gated output of heads, and residual sums. Biases and gates stay float.

    Args:
        model: in any mode; the copy is in eval mode.
        batches: images (B, C, H, W); the first `settings.batches` of them are observed.

    Raises:
        ExportError: no batch.
    """
    copy = deepcopy(model).eval()
    _replace(copy, settings)
    seen = 0
    with evaluating(copy), torch.no_grad():
        for batch, _ in zip(batches, range(settings.batches), strict=False):
            copy(batch)
            seen += 1
    if seen == 0:
        raise ExportError("simulate_int8: wanted batches of images to observe, got none")
    freeze(copy)
    return copy


def freeze(model: nn.Module) -> None:
    """End the observation: ranges stay."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.observes = False


def _replace(module: nn.Module, settings: Quantizer) -> None:
    """Put simulated layers in the place of a module's children, all the way down."""
    children = list(module.named_children())
    for i, (name, child) in enumerate(children):
        follower = children[i + 1][1] if i + 1 < len(children) else None
        before = children[i - 1][1] if i else None
        if isinstance(child, GatedAttention):
            setattr(module, name, _Attention(child, settings))
        elif isinstance(child, nn.Linear | nn.Conv2d):
            setattr(module, name, _Layer(child, settings, rounds_output=not isinstance(follower, nn.GELU)))
        elif isinstance(child, nn.LayerNorm) and child.elementwise_affine:
            setattr(module, name, _Norm(child, settings))
        elif isinstance(child, nn.GELU) and isinstance(before, nn.Linear | nn.Conv2d):
            setattr(module, name, _Activation(child, settings))
        else:
            _replace(child, settings)
            if type(child) is ViTBlock:
                setattr(module, name, _Block(child, settings))


def quantized(model: nn.Module, settings: Quantizer) -> tuple[nn.Module, Callable[[], None]]:
    """Return a copy of a layer that observes what it is called with, and a function that ends the observation."""
    whole = nn.Sequential(deepcopy(model)).eval()
    _replace(whole, settings)
    return whole[0], lambda: freeze(whole)
