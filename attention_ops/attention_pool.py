"""Attention pooling: one vector from all tokens of a map, by learned weights over the tokens.

LAMA       Mehta, Rangwala, Ramakrishnan 2019, arXiv:1912.00835 (Low Rank Factorization for Compact Multi-Head
           Self-Attention): the bilinear form of every head has rank 1 and asks one context vector, the mean of the
           tokens. The paper is about text, and no official code is known; the definition was compared with code that
           is not by the authors.
GAAM       Ioannides, Chadha, Elkins 2024, arXiv:2401.11143 (Gaussian Adaptive Attention): a product of Gaussians of the
           standardized features, whose offsets and widths are learned. Official code:
           https://github.com/gioannides/Gaussian-Adaptive-Attention (Apache-2.0).
We differ  LAMA divides out of place (the code at hand divides in place and cannot be trained), and a token all of whose
           scores are 0 keeps them, where the definition gives NaN. GAAM is one expression in log space for all
           Gaussians of a head. As pooling, GAAM sums the weighted tokens, with Gaussians of its own for every run of
           channels.
"""

import math

import torch
from torch import Tensor, nn

from ._attend import accumulator

MASKED = -1e9  # score of a token that does not exist
UNITS = 1e4  # the variance is scaled: ONNX's optimizer takes a summand of 1e-8 for 0 and removes it
LEAST_SUM = 1e-8  # of the Gaussians' weights, and what is added to the variance


def lama_weights(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    *,
    mask: Tensor | None = None,
    activation: str | None = "tanh",
    normalize: bool = True,
) -> Tensor:
    """Weigh tokens by their agreement with the mean token, head by head.

    z = act((p^T mean) * (q^T x)), divided by its length over the heads; softmax over the tokens.

    Cost: 2 * N * D * heads multiply-adds.

    Args:
        x: (B, N, D).
        p, q: (D, heads).
        mask: (B, N) bool, True for tokens that exist; the others are neither in the mean nor weighted.
        activation: "tanh" or None.
        normalize: False returns the scores in place of their softmax.

    Returns:
        (B, heads, N), float32 at least.

    Raises:
        ValueError: shapes disagree, or the activation is unknown.
    """
    if x.dim() != 3 or p.shape != q.shape or p.dim() != 2 or p.shape[0] != x.shape[2]:
        raise ValueError(f"lama_weights: wanted x (B, N, D) and p, q (D, heads), got {_shapes(x, p, q)}")
    if activation not in ("tanh", None):
        raise ValueError(f"lama_weights: activation must be 'tanh' or None, got {activation!r}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"lama_weights: mask must be {tuple(x.shape[:2])} bool, got {tuple(mask.shape)} {mask.dtype}")
    wide = accumulator(x.dtype)
    x, p, q = x.to(wide), p.to(wide), q.to(wide)
    if mask is None:
        mean = x.mean(1)
    else:
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    scores = torch.matmul(mean, p)[:, None] * torch.matmul(x, q)  # (B, N, heads)
    scores = scores.tanh() if activation == "tanh" else scores
    lengths = scores.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    scores = (scores / lengths).transpose(1, 2)
    scores = scores if mask is None else scores.masked_fill(~mask[:, None], MASKED)
    return scores.softmax(-1) if normalize else scores


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def gaussian_weights(
    x: Tensor, offsets: Tensor, widths: Tensor, *, dim: int, eps: float = LEAST_SUM, padding: float | None = None
) -> Tensor:
    """Weigh the entries along one axis by a product of Gaussians of their standardized values.

    With mean and (unbiased) variance along the axis, Gaussian i is exp(-(x - mean - offset_i)^2 / (variance + eps) /
    (2 width_i^2)) / sqrt(2 pi width_i^2). Their product is divided by its sum along the axis, at least by eps.

    Cost: three coefficients per value of the other axes, and a few passes over x, whatever the number of Gaussians.

    Args:
        x: any shape.
        offsets, widths: (..., gaussians); leading axes, if any, must broadcast to x with a 1 at `dim`.
        dim: the axis.
        eps: added to the variance, and the least divisor.
        padding: entries equal to this number count as 0 in mean and variance. They keep a weight in the sum.

    Returns:
        x's shape, float32 at least. Sums to 1 along the axis, or to less if the divisor was eps.
    """
    wide = accumulator(x.dtype)
    x, offsets, widths = x.to(wide), offsets.to(wide), widths.to(wide)
    known = x if padding is None else x.masked_fill(x == padding, 0)
    unbiased = min(1, known.shape[dim] - 1)  # one entry alone: variance 0
    mean, variance = known.mean(dim, keepdim=True), known.var(dim, correction=unbiased, keepdim=True)
    away, spread = x - mean, UNITS * variance + UNITS * eps
    precision = 0.5 / widths.square()
    square, linear = precision.sum(-1), 2 * (precision * offsets).sum(-1)
    constant = (precision * offsets.square()).sum(-1)
    scale = (0.5 * (2 * math.pi * widths.square()).log()).sum(-1)
    logs = -UNITS * (square * away.square() - linear * away + constant) / spread - scale
    least = math.log(eps)
    return (logs - logs.logsumexp(dim, keepdim=True).clamp(min=least)).exp()


class GaussianAdaptiveAttention(nn.Module):
    """GAAM as published: x times its Gaussian weights along one axis, which heads cut into runs.

    Args:
        axis: of the weights.
        heads: runs of the axis, each with its own Gaussians and statistics; the last takes what is left over.
        gaussians: of each head.
        padding: entries equal to this number pass unchanged, and count as 0 in mean and variance.
        eps: added to the variance, and the least divisor. (The authors' class for several heads ignores its own.)
    """

    def __init__(
        self,
        axis: int = 1,
        heads: int = 1,
        gaussians: int = 3,
        *,
        padding: float | None = None,
        eps: float = LEAST_SUM,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or gaussians < 1:
            raise ValueError(f"GaussianAdaptiveAttention: heads, gaussians must be 1 or more, got {heads}, {gaussians}")
        self.axis, self.heads, self.padding, self.eps = axis, heads, padding, eps
        self.mean_offsets = nn.Parameter(torch.zeros(heads, gaussians, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.randn(heads, gaussians, device=device, dtype=dtype).exp())

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights of all entries, in x's shape."""
        length = x.shape[self.axis]
        if length < self.heads:
            raise ValueError(f"GaussianAdaptiveAttention: axis {self.axis} has {length} entries for {self.heads} heads")
        run = length // self.heads
        parts = x.split([run] * (self.heads - 1) + [length - run * (self.heads - 1)], self.axis)
        found = [
            gaussian_weights(part, offsets, widths, dim=self.axis, eps=self.eps, padding=self.padding)
            for part, offsets, widths in zip(parts, self.mean_offsets, self.c, strict=True)
        ]
        return torch.cat(found, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        out = (x * self.weights(x)).to(x.dtype)
        return out if self.padding is None else torch.where(x == self.padding, x, out)


class LamaPool(nn.Module):
    """Pool tokens by LAMA: heads' weighted sums side by side, projected to the width of the tokens.

    Args:
        dim: channels.
        heads: weighted sums.
    """

    def __init__(self, dim: int, heads: int = 8, *, device=None, dtype=None) -> None:
        super().__init__()
        if heads < 2:
            raise ValueError(f"LamaPool: wanted at least 2 heads (one keeps a sign only), got {heads}")
        self.p = nn.Parameter(torch.empty(dim, heads, device=device, dtype=dtype))
        self.q = nn.Parameter(torch.empty(dim, heads, device=device, dtype=dtype))
        self.projection_layer = nn.Linear(heads * dim, dim, device=device, dtype=dtype)
        for factor in (self.p, self.q):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, C)
        weights = lama_weights(x, self.p, self.q).to(x.dtype)
        return self.projection_layer(torch.matmul(weights, x).flatten(1))


class GaussianPool(nn.Module):
    """Pool tokens by GAAM: the sum of the tokens by Gaussian weights along them, for every channel.

    Args:
        dim: channels; heads must divide it.
        heads: runs of channels, each with its own Gaussians.
        gaussians: of each head.
    """

    def __init__(self, dim: int, heads: int = 8, gaussians: int = 3, *, device=None, dtype=None) -> None:
        super().__init__()
        if heads < 1 or dim % heads or gaussians < 1:
            raise ValueError(f"GaussianPool: heads must divide dim {dim}, gaussians be >= 1, got {heads}, {gaussians}")
        self.heads = heads
        self.mean_offsets = nn.Parameter(torch.zeros(heads, gaussians, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.randn(heads, gaussians, device=device, dtype=dtype).exp())

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, C)
        grouped = x.unflatten(2, (self.heads, -1))  # (B, N, heads, C / heads)
        weights = gaussian_weights(grouped, self.mean_offsets[:, None], self.c[:, None], dim=1)
        return (grouped * weights).sum(1).flatten(1).to(x.dtype)
