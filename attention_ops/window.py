"""Window attention: every token sees exactly the tokens of its tile.

Paper      Liu et al. 2021, arXiv:2103.14030 (Swin); the windows of DaViT (arXiv:2204.03645) and of LITv2's high
           branch (arXiv:2205.13213) are the same without a bias.
Shift      windows of the rolled map, as in Swin: tokens that only the roll brings together do not see each other. The
           fused body cuts the map at the shift and rolls nothing; the others roll and mask.
Tiled      without bias and mask this is SDPA on windows, a view where one window is the map; with them it shares the
           body of neighborhood attention (no logits are kept for the backward pass).
Options    clip and gate as in dense_attention (arXiv:2306.12929), with kernels of their own.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels._launch import why_no_triton
from ..kernels.local.plan import Pattern, pattern_of
from ._attend import accumulator, sdpa
from ._checks import check_at_least, check_device, check_qkv, pair, why_no_attention_kernel, why_no_local_kernel
from ._clip import Clip, check_clip, clipped
from ._graph.sizes import differs, is_known
from ._graph.window import window_attention_graph, window_attention_lse_graph
from ._op import Impl, Pair, Size, SymSize, declare, run
from .clipped_attention import ClippedAttention
from .dense_attention import check_gate
from .packed import unpack
from .shifted_windows import ClippedWindows, Windows, on_rolled_maps
from .tile_plan import TileMask, plan_tiles
from .tiled_attention import TiledAttention, TiledAttentionLse
from .tiling import cover_with_windows, crop, cut_windows, merge_windows, split_windows

OP = "window_attention"
OP_LSE = "window_attention_lse"


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: SymSize,
    *,
    shift: Size = 0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    clip: Clip | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Attend from every token to the tokens of its window.

    With a shift, windows are those of the map rolled by -shift, and tokens from opposite ends of the map do not see
    each other: Swin's shifted windows with their mask. On each axis the first `shift` tokens of the map then form a
    window, and so do the last window_size - shift.

    Cost: H * W * window_rows * window_cols * head_dim multiply-adds per head, twice; with `clip` the kernel computes
    the logits twice.

    Args:
        q, k: (B, H, W, heads, head_dim); v: (B, H, W, heads, value_dim). One dtype and device; strided views are fine.
        window_size: tokens, an int or (rows, columns); must divide (H, W). Callers pad; `cover_with_windows`
            in tiling.py does it.
        shift: tokens, an int or (rows, columns), 0 to window_size - 1.
        bias: (heads, T, T) with T = window_rows * window_cols, added to the scaled logits of every window; tokens are
            counted row by row in their window of the rolled map.
        mask: (windows, T, T) bool, True where a query sees a key, windows (of the rolled map) and tokens row-major.
            With a shift both masks apply. No row may be empty.
        clip: (gamma, zeta) with gamma <= 0 <= 1 <= zeta, of a clipped softmax; None: plain softmax.
        gate: (B, H, W, heads), multiplies the output; dtype of q.
        scale: multiplies q . k; head_dim ** -0.5 when None.
        impl: "auto", "fused", "tiled" or "reference".

    Returns:
        (B, H, W, heads, value_dim), dtype of q (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, window_size does not divide the map, or shift or clip is out of
            range.
        NotImplementedError: `impl="fused"` where the kernel cannot run (the message says why).
    """
    return run(OP, q, k, v, window_size, shift, bias, mask, clip, gate, scale, impl)


def window_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: SymSize,
    *,
    shift: Size = 0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor]:
    """Run `window_attention`, and return the log-sum-exp of the logits too, for `merge_attention`.

    Both results are differentiable. The tiled body is slower than that of `window_attention`: torch's SDPA returns no
    log-sum-exp.

    A clipped softmax and gates are not part of it: results that they changed cannot be merged.

    Args:
        q, k, v, window_size, shift, bias, mask, scale, impl: see `window_attention`.

    Returns:
        The output, (B, H, W, heads, value_dim), dtype of q, and the natural logarithm of the sum of exp(logit) over the
        keys that a query sees, with logits scaled and biased: (B, H, W, heads), float32, or float64 for float64.

    Raises:
        ValueError, NotImplementedError: in the cases of `window_attention`.
    """
    return run(OP_LSE, q, k, v, window_size, shift, bias, mask, scale, impl)


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Pair,
    shift: Pair,
    bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_qkv(op, q, k, v, value_dim=True)
    check_at_least(op, "window_size", window_size, 1)
    (height, width), (rows, cols) = q.shape[1:3], window_size
    if is_known(height % rows != 0) or is_known(width % cols != 0):
        raise ValueError(f"{op}: window_size {(rows, cols)} must divide the map {(height, width)}")
    if shift != (0, 0) and not (0 <= shift[0] < rows and 0 <= shift[1] < cols):
        raise ValueError(f"{op}: shift must be 0 to window_size - 1 = {(rows - 1, cols - 1)}, got {tuple(shift)}")
    tokens, windows = rows * cols, (height // rows) * (width // cols)
    for name, t, shape, words in (
        ("bias", bias, (q.shape[3], tokens, tokens), "(heads, window tokens, window tokens)"),
        ("mask", mask, (windows, tokens, tokens), "(windows, window tokens, window tokens)"),
    ):
        if t is not None and differs(t.shape, shape):
            raise ValueError(f"{op}: {name} must be {words} = {shape}, got {tuple(t.shape)}")
        check_device(op, name, t, "q", q)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool, got {mask.dtype}")


def _check_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Pair,
    shift: Pair,
    bias: Tensor | None,
    mask: Tensor | None,
    clip: Sequence[float] | None,
    gate: Tensor | None,
) -> None:
    _check(OP, q, k, v, window_size, shift, bias, mask)
    check_clip(OP, clip)
    check_gate(OP, "gate", gate, q, "(B, H, W, heads)")


def window_attention_reference(q: Tensor, k: Tensor, v: Tensor, windows: ClippedWindows, scale: float) -> Tensor:
    """The definition: every logit of every window at once, float32 inside at least.

    With a mask every query has keys and values of its own, zeros where it sees none: T copies of k and v.
    """
    return _attend(q, k, v, windows, windows.clip, scale)[0]


def window_attention_lse_reference(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition, with the log-sum-exp of every query's logits."""
    return _attend(q, k, v, windows, None, scale)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows | ClippedWindows, clip: Sequence[float] | None, scale: float
) -> tuple[Tensor, Tensor]:
    (window_size, _, bias, mask, *_), wide = windows, accumulator(q.dtype)
    queries, keys, values = (split_windows(x.to(wide), window_size) for x in (q, k, v))  # (B, heads, windows, T, d)
    queries = queries * scale
    if mask is None:
        logits = torch.matmul(queries, keys.mT)
    else:
        keys, values = (x[..., None, :, :].masked_fill(~mask[..., None], 0) for x in (keys, values))  # (.., T, T, d)
        logits = torch.einsum("bnwtd,bnwtkd->bnwtk", queries, keys).masked_fill(~mask, -torch.inf)
    if bias is not None:
        logits = logits + bias.to(wide)[:, None]
    equation = "bnwtk,bnwkd->bnwtd" if mask is None else "bnwtk,bnwtkd->bnwtd"
    out, size = torch.einsum(equation, clipped(logits.softmax(-1), clip), values), (q.shape[1], q.shape[2])
    lse = merge_windows(logits.logsumexp(-1, keepdim=True), size, window_size).squeeze(-1)
    return merge_windows(out, size, window_size).to(q.dtype), lse


def window_attention_tiled(q: Tensor, k: Tensor, v: Tensor, windows: ClippedWindows, scale: float) -> Tensor:
    """SDPA on windows; with a bias or a mask the body that local patterns share; with a clipped softmax its own."""
    if windows.clip is not None:
        seen = None if windows.mask is None else windows.mask[None, None]
        tiles = (split_windows(x, windows.window_size) for x in (q, k, v))
        out = ClippedAttention(seen, windows.clip, scale)(*tiles, windows.bias)
        return merge_windows(out, (q.shape[1], q.shape[2]), windows.window_size)
    if windows.bias is None and windows.mask is None:
        return _on_windows(sdpa, q, k, v, windows.window_size, scale)
    return _tiles(TiledAttention, q, windows, scale)(q, k, v, windows.bias)


def window_attention_lse_tiled(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """The body that local patterns share."""
    return _tiles(TiledAttentionLse, q, windows, scale)(q, k, v, windows.bias)


def _on_windows(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int], scale: float
) -> Tensor:
    windows = [split_windows(x, window_size).flatten(1, 2) for x in (q, k, v)]  # (B, heads * windows, T, d)
    out = attend(*windows, scale=scale)
    return merge_windows(out.unflatten(1, (q.shape[3], -1)), (q.shape[1], q.shape[2]), window_size)


def _tiles(kind: type[TiledAttention], q: Tensor, windows: Windows | ClippedWindows, scale: float) -> TiledAttention:
    plan = plan_tiles(*cut_windows((q.shape[1], q.shape[2]), windows.window_size))
    return kind(plan, None if windows.mask is None else TileMask.of(windows.mask), scale)


def window_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, windows: ClippedWindows, scale: float, gate: Tensor | None = None
) -> Tensor:
    """The kernel of local patterns, which takes no mask (see `why_not_fused`), or that of clipped softmax and gates."""
    if windows.clip is not None or gate is not None:
        from ..kernels.clipped.launch import clipped_attention  # here, so that CPU users need no Triton

        (window, shift, *_, clip) = windows
        return clipped_attention(q, k, v, window, shift, clip=clip, gate=gate, scale=scale)
    from ..kernels.local.launch import local_attention

    return local_attention(q, k, v, _pattern(windows), bias=windows.bias, scale=scale)


def window_attention_lse_fused(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """The same kernel; also the log-sum-exp."""
    from ..kernels.local.launch import local_attention_lse

    return local_attention_lse(q, k, v, _pattern(windows), bias=windows.bias, scale=scale)


def _pattern(windows: Windows | ClippedWindows) -> Pattern:
    return pattern_of("block", windows.window_size, shift=windows.shift)


def why_not_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
    """Return the reason why the fused kernel cannot run on these tensors, or None."""
    if mask is not None:
        return "the kernel takes no mask but that of `shift`; use impl='tiled'"
    return why_no_local_kernel(q, k, v, scale)


def _why_not_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    clip: Sequence[float] | None,
    gate: Tensor | None,
    scale: float,
) -> str | None:
    if (clip is None and gate is None) or mask is not None:
        return why_not_fused(q, k, v, mask, scale)
    if bias is not None:
        return "the kernel of clip and gate takes no bias; use impl='tiled'"
    return why_no_attention_kernel(q, k, v)


def _gated(body: Callable[..., Tensor], wide: bool = False) -> Callable[..., Tensor]:
    """Return a body that takes a gate too, of one without.

    Args:
        wide: round once, after the gate.
    """

    def gated(q: Tensor, k: Tensor, v: Tensor, windows: ClippedWindows, gate: Tensor | None, scale: float) -> Tensor:
        if gate is None:
            return body(q, k, v, windows, scale)
        dtype = accumulator(q.dtype) if wide else q.dtype
        out = body(q.to(dtype), k.to(dtype), v.to(dtype), windows, scale)
        return (out * gate.to(dtype)[..., None]).to(q.dtype)

    gated.__name__ = body.__name__
    return gated


def _macs(q: Tensor, v: Tensor, window_size: Pair, shift: Pair) -> int:
    pairs = 1
    for length, window, step in zip(q.shape[1:3], window_size, shift, strict=True):
        pairs *= length * window - 2 * step * (window - step)  # a shift cuts one window in two
    return q.shape[0] * q.shape[3] * (q.shape[4] + v.shape[4]) * pairs


declare(
    window_attention_lse,
    check=partial(_check, OP_LSE),
    reference=on_rolled_maps(window_attention_lse_reference),
    tiled=on_rolled_maps(window_attention_lse_tiled, cached=True),
    graph=on_rolled_maps(window_attention_lse_graph),
    fused=window_attention_lse_fused,
    why_not_fused=why_not_fused,
    macs=_macs,
    bundles={"windows": Windows},
)
declare(
    window_attention,
    check=_check_all,
    reference=_gated(on_rolled_maps(window_attention_reference), wide=True),
    tiled=_gated(on_rolled_maps(window_attention_tiled, cached=True)),
    graph=_gated(on_rolled_maps(window_attention_graph)),
    fused=window_attention_fused,
    why_not_fused=_why_not_fused,
    cast=("q", "k", "v", "gate"),
    macs=_macs,
    bundles={"windows": ClippedWindows},
)


def is_read_in_place(x: Tensor) -> bool:
    """Say whether Triton kernels read the windows of maps like `x` where they lie; other bodies copy them."""
    return why_no_triton(x) is None


class WindowAttention2d(nn.Module):
    """Multi-head window attention with its projections, on channels-last maps.

    A map that windows do not cover exactly is padded right and bottom with zeros BEFORE the qkv projection: padded
    tokens carry the qkv bias and are attended like any other; the output is cropped.

    Args:
        dim: channels; heads must divide it.
        heads: number of heads.
        window_size: tokens, an int or (rows, columns).
        qkv_bias: give the qkv projection a bias.
        scale: multiplies the logits; (dim // heads) ** -0.5 when None.
        clip: (gamma, zeta) of a clipped softmax; None: plain softmax.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int | Sequence[int] = 7,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        clip: Sequence[float] | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"WindowAttention2d: heads must divide dim {dim}, got {heads}")
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.window_size = pair("WindowAttention2d", "window_size", window_size)
        check_at_least("WindowAttention2d", "window_size", self.window_size, 1)
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        check_clip("WindowAttention2d", clip)
        self.clip = None if clip is None else [float(number) for number in clip]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H, W, C)
        height, width = x.shape[1], x.shape[2]
        x = cover_with_windows(x, self.window_size)
        q, k, v = unpack(self.qkv(x).unflatten(-1, (3, self.heads, -1)), 3)  # (B, H, W, heads, head_dim)
        out = window_attention(q, k, v, self.window_size, clip=self.clip, scale=self.scale)
        return self.proj_drop(crop(self.proj(out.flatten(3)), height, width))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window_size={self.window_size}"
