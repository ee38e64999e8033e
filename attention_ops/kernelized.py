"""Kernelized attention with relative positions: positive random features in place of a softmax.

Paper      Luo et al. 2021, arXiv:2106.12566 (NPRF: normalized, so that few features suffice), equations 5 and 10.
Semantics  z_i = phi(q_i) sum_j e^b(j - i) phi(k_j)^T v_j / (phi(q_i) sum_j e^b(j - i) phi(k_j)^T), with
           phi(x) = exp(omega x - |x|^2 / 2) and x of length 1. No authors' code is known.
Forms      "dense" multiplies features pair by pair; "fft" makes the sums over j by Fourier transforms, in float64: in
           float32 they lose the digits of small e^b beside large ones. "auto" takes the one of fewer estimated seconds,
           and "fft" where the pairs of a head would take more than 64 MB.
Kernel     none: products and Fourier transforms, which libraries do well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attend import accumulator
from ._checks import check_alike, check_device, check_tokens
from ._graph.sizes import as_tensor, differs, integers, is_known, known
from ._graph.tiles import product
from ._op import Impl, Pair, SymSize, declare, run
from .mixers import register_mixer

OP = "kernelized_attention"
FORMS = ("auto", "dense", "fft")
FFT_COST = 40.0  # of a step of a transform, in multiply-adds of a product (2 threads of a Xeon, estimated)
MOST_PAIRS = 1 << 24  # pairs of tokens of a head that are in memory


def kernelized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    size: SymSize,
    *,
    rel: Tensor | None = None,
    prefix_tokens: int = 0,
    normalize: bool = True,
    form: str = "auto",
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend with positive random features, and with weights e^b that depend on how far a key lies from a query.

    Cost: "dense": N ** 2 * (features + value_dim) multiply-adds per head; without `rel`, N * features * value_dim,
    twice; "fft": 2 * features * (value_dim + 1) transforms of 4 * N numbers per head.

    Args:
        q, k: (B, N, heads, head_dim); v: (B, N, heads, value_dim). N = prefix_tokens + H * W, the map row by row.
        omega: (features, head_dim), the random features; shared by the heads.
        size: (H, W) of the map; (1, N) for a sequence.
        rel: (heads, 2 * H - 1, 2 * W - 1), the biases b; cell [key row - query row + H - 1, key column - query column +
            W - 1]. None: no biases.
        prefix_tokens: tokens ahead of the map, whose pairs have the bias 0.
        normalize: divide q and k by their length.
        form: "auto", "dense" or "fft".
        impl: "auto", "tiled" or "reference"; there is no kernel: "fused" is refused.

    Returns:
        (B, N, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the form is unknown.
        NotImplementedError: `impl="fused"`.
    """
    return run(OP, q, k, v, omega, size, rel, prefix_tokens, normalize, form, impl)


def _check(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, size: Pair, rel: Tensor | None, prefix_tokens: int, form: str
) -> None:
    if form not in FORMS:
        raise ValueError(f"{OP}: form must be one of {list(FORMS)}, got {form!r}")
    check_tokens(OP, q, k, v)
    if differs(q.shape, k.shape):
        raise ValueError(f"{OP}: k must have the shape of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if prefix_tokens < 0 or is_known(prefix_tokens + size[0] * size[1] != q.shape[1]):
        raise ValueError(f"{OP}: prefix_tokens + H * W must be {q.shape[1]} tokens, got {prefix_tokens}, {tuple(size)}")
    if omega.dim() != 2 or is_known(omega.shape[1] != q.shape[3]):
        raise ValueError(f"{OP}: omega must be (features, {q.shape[3]}), got {tuple(omega.shape)}")
    check_alike(OP, omega=omega)
    check_device(OP, "omega", omega, "q", q)
    if rel is not None:
        table = (q.shape[2], 2 * size[0] - 1, 2 * size[1] - 1)
        if differs(rel.shape, table):
            raise ValueError(f"{OP}: rel must be (heads, 2 * H - 1, 2 * W - 1) = {table}, got {tuple(rel.shape)}")
        check_device(OP, "rel", rel, "q", q)


def kernelized_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, size: Pair, rel: Tensor | None, prefix_tokens: int,
    normalize: bool, form: str,
) -> Tensor:  # fmt: skip
    """The definition, pair by pair, whatever the form. float32 inside at least."""
    wide = accumulator(q.dtype)
    phi_q, phi_k = (_plain_features(x.to(wide), omega.to(wide), normalize) for x in (q, k))
    weights = torch.einsum("bihm,bjhm->bhij", phi_q, phi_k)
    if rel is not None:
        weights = weights * pair_weights(rel.to(wide), size, prefix_tokens)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", weights, v.to(wide)).to(q.dtype)


def _plain_features(x: Tensor, omega: Tensor, normalize: bool) -> Tensor:
    x = F.normalize(x, dim=-1) if normalize else x
    return (torch.einsum("bnhd,md->bnhm", x, omega) - x.square().sum(-1, keepdim=True) / 2).exp()


def pair_weights(rel: Tensor, size: Pair, prefix_tokens: int) -> Tensor:
    """(heads, 2 * H - 1, 2 * W - 1) -> (heads, N, N): e^b of every pair of tokens, 1 for pairs with a prefix token."""
    of_axis = []
    for length in size:
        place = integers(length).arange(length)
        of_axis.append(place[None, :] - place[:, None] + length - 1)
    rows, cols = of_axis
    cells = rows[:, None, :, None] * (2 * size[1] - 1) + cols[None, :, None, :]  # (H, W, H, W)
    index = as_tensor(cells.reshape(-1), rel.device)
    tokens = size[0] * size[1]
    weights = rel.flatten(1).index_select(1, index).unflatten(1, (tokens, tokens)).exp()
    return F.pad(weights, (prefix_tokens, 0, prefix_tokens, 0), value=1.0) if prefix_tokens else weights


def _features(x: Tensor, omega: Tensor, normalize: bool, per_token: bool) -> Tensor:
    """(B, N, heads, d) -> (B, heads, N, m), less a common factor, so that nothing overflows.

    Args:
        per_token: leave out a factor of every token, which cancels for queries; else one of all tokens of a head.
    """
    x = (F.normalize(x, dim=-1) if normalize else x).transpose(1, 2)
    logs = torch.matmul(x, omega.mT)
    if not normalize:
        logs = logs - x.square().sum(-1, keepdim=True) / 2
    top = logs.detach().amax(-1 if per_token else (-2, -1), keepdim=True)
    return (logs - top).exp()


def kernelized_attention_tiled(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, size: Pair, rel: Tensor | None, prefix_tokens: int,
    normalize: bool, form: str,
) -> Tensor:  # fmt: skip
    """Products of features; sums over keys pair by pair, or by Fourier transforms."""
    wide = accumulator(q.dtype)
    phi_q = _features(q.to(wide), omega.to(wide), normalize, per_token=True)
    phi_k = _features(k.to(wide), omega.to(wide), normalize, per_token=False)
    values = F.pad(v.to(wide).transpose(1, 2), (0, 1), value=1.0)  # (B, heads, N, dv + 1): the last one counts
    if rel is None:
        sums = product(phi_q, product(phi_k.transpose(-2, -1), values))
    elif q.shape[0] > 0 and takes_fft(form, size, omega.shape[0], v.shape[-1]):
        sums = _by_fft(phi_q, phi_k, values, rel.to(wide), size, prefix_tokens)
    else:
        sums = product(product(phi_q, phi_k, transposes=True) * pair_weights(rel.to(wide), size, prefix_tokens), values)
    width = v.shape[-1]
    out = sums.narrow(-1, 0, width) / sums.narrow(-1, width, 1)
    return out.transpose(1, 2).to(q.dtype)


def takes_fft(form: str, size: Pair, features: int, value_dim: int) -> bool:
    """Say whether sums over keys are made by Fourier transforms."""
    if form != "auto":
        return form == "fft"
    if not known(*size):
        return False
    tokens = size[0] * size[1]
    padded = (2 * size[0] - 1) * (2 * size[1] - 1)
    steps = 2 * features * (value_dim + 1) * padded * padded.bit_length()
    return tokens**2 > MOST_PAIRS or steps * FFT_COST < tokens**2 * (features + value_dim)


def _by_fft(phi_q: Tensor, phi_k: Tensor, values: Tensor, rel: Tensor, size: Pair, prefix_tokens: int) -> Tensor:
    """phi_q_i . sum_j e^b(j - i) phi_k_j values_j, (B, heads, N, dv + 1), one feature after the other."""
    dtype = phi_q.dtype
    length = [2 * side - 1 for side in size]
    top = rel.detach().amax((-2, -1), keepdim=True)  # cancels, as e^-top does for the prefix tokens
    kernel = (rel.double() - top).exp().flip(-2, -1)  # [i - j + side - 1]
    kernel = kernel.roll((1 - size[0], 1 - size[1]), (-2, -1))  # the place of i = j comes first
    spectrum = torch.fft.rfft2(kernel, s=length)[None, :, None]  # (1, heads, 1, ...)
    on_map = slice(prefix_tokens, None)
    outs = []
    for feature in range(phi_k.shape[-1]):
        terms = phi_k[..., on_map, feature, None].double() * values[..., on_map, :].double()
        terms = terms.transpose(-2, -1).unflatten(-1, size)  # (B, heads, dv + 1, H, W)
        mixed = torch.fft.irfft2(torch.fft.rfft2(terms, s=length) * spectrum, s=length)
        mixed = mixed[..., : size[0], : size[1]].flatten(-2).transpose(-2, -1)  # (B, heads, H * W, dv + 1)
        outs.append(phi_q[..., on_map, feature, None].double() * mixed)
    sums = torch.stack(outs).sum(0).to(dtype)
    if prefix_tokens == 0:
        return sums
    scale = (-top).exp()  # of a weight 1 beside the weights of the map
    near, far = phi_k[..., :prefix_tokens, :], phi_k[..., on_map, :]
    prefix = product(near.transpose(-2, -1), values[..., :prefix_tokens, :])
    everything = prefix + product(far.transpose(-2, -1), values[..., on_map, :])
    of_prefix = product(phi_q[..., :prefix_tokens, :], everything)
    sums = sums + product(phi_q[..., on_map, :], prefix) * scale
    return torch.cat([of_prefix, sums], -2)


def kernelized_attention_graph(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, size: Pair, rel: Tensor | None, prefix_tokens: int,
    normalize: bool, form: str,
) -> Tensor:  # fmt: skip
    """Pair by pair: files for other runtimes have no Fourier transforms."""
    return kernelized_attention_tiled(q, k, v, omega, size, rel, prefix_tokens, normalize, "dense")


def _why_not_fused() -> str:
    return "products and Fourier transforms, which libraries do well; there is no Triton kernel"


def _macs(q: Tensor, v: Tensor, omega: Tensor, rel: Tensor | None) -> int:
    batch, tokens, heads, dim = q.shape
    features, wide = omega.shape[0], v.shape[3] + 1
    sums = tokens * tokens * (features + wide) if rel is not None else 2 * tokens * features * wide
    return batch * heads * (2 * tokens * features * dim + sums)


declare(
    kernelized_attention,
    check=_check,
    reference=kernelized_attention_reference,
    tiled=kernelized_attention_tiled,
    graph=kernelized_attention_graph,
    why_not_fused=_why_not_fused,
    macs=_macs,
)


@register_mixer("nprf")
class KernelizedAttention(nn.Module):
    """Multi-head kernelized attention with relative positions, a token mixer (see mixers.py).

    The table of biases is that of `map_size`; smaller maps use its middle, larger ones are refused.

    Args:
        dim: channels; num_heads must divide it.
        num_heads: number of heads.
        map_size: (H, W) of the largest map.
        prefix_tokens: tokens ahead of the map, whose pairs have no bias.
        qkv_bias: give the qkv projection a bias.
        features: random features of a head.
        relative: learn a bias for each distance.
        normalize: divide queries and keys by their length.
        form: of `kernelized_attention`.
        proj_drop: dropout after the output projection.
    """

    omega: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: tuple[int, int],
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        features: int = 32,
        relative: bool = True,
        normalize: bool = True,
        form: str = "auto",
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"KernelizedAttention: form must be one of {list(FORMS)}, got {form!r}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.map_size = [int(side) for side in map_size]
        self.prefix_tokens = prefix_tokens
        self.normalize, self.form = normalize, form
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.register_buffer("omega", torch.randn(features, dim // num_heads, **dd))
        cells = (2 * self.map_size[0] - 1) * (2 * self.map_size[1] - 1)
        self.rel = nn.Parameter(torch.zeros(cells, num_heads, **dd)) if relative else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, N, C) -> (B, N, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        out = kernelized_attention(
            q,
            k,
            v,
            self.omega,
            [size[0], size[1]],
            rel=self.table(size),
            prefix_tokens=self.prefix_tokens,
            normalize=self.normalize,
            form=self.form,
        )
        return self.proj_drop(self.proj(out.flatten(2)))

    def table(self, size: tuple[int, int]) -> Tensor | None:
        """(heads, 2 * H - 1, 2 * W - 1): the biases of a map of this size."""
        if self.rel is None:
            return None
        rows, cols = self.map_size[0], self.map_size[1]
        if size[0] > rows or size[1] > cols:
            raise ValueError(
                f"KernelizedAttention: its table of positions is that of maps up to {rows} x {cols}, got {size[0]} x "
                f"{size[1]}"
            )
        table = self.rel.transpose(0, 1).unflatten(1, [2 * rows - 1, 2 * cols - 1])
        table = table.narrow(1, rows - size[0], 2 * size[0] - 1)
        return table.narrow(2, cols - size[1], 2 * size[1] - 1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, features={self.omega.shape[0]}, map_size={tuple(self.map_size)}"
