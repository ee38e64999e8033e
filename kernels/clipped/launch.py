"""Clipped, masked, gated and reversed attention: launch shapes, launchers, and the ops with their gradients.

Shapes, dtypes and devices were checked by the caller. A tensor whose head_dim is not contiguous is copied; other
strides are taken as they are. There is no double backward.

Reversed attention is what backward passes compute for values: out[r] = sum over s of P[s, r] weight[s] v[s], with P the
softmax over r. So its forward pass runs the kernels for lse and dv, and its backward pass the others.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._launch import (
    LEAST_DOT,
    dot_precision,
    eager_backward,
    eager_forward,
    on_device,
    padded,
    power_of_2,
    refuse_second_derivative,
    without_autocast,
)
from ..packed import separate
from .backward import clipped_dkv_kernel, clipped_dq_kernel
from .forward import clipped_forward_kernel

LOG2_E = math.log2(math.e)
NO_STRIDES = (0, 0, 0, 0)


def tile_shape(queries: int, keys: int, head_dim: int, itemsize: int, masked: bool) -> tuple[int, int]:
    """Return the queries and the keys of a tile: what 4 warps hold without spills, 8 where both are 64.

    Args:
        queries, keys: tokens of a window.
        head_dim: the larger one, padded.
        masked: with a mask of bits, whose words take registers.
    """
    most = 64 if itemsize == 2 and head_dim <= 64 and not masked else 32 if itemsize == 2 or head_dim <= 64 else 16
    return min(most, power_of_2(queries, LEAST_DOT)), min(most, power_of_2(keys, LEAST_DOT))


def place(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[int, ...]:
    """Return what `tokens.find` takes: a window's sides, where the first one begins, and the map's sides."""
    first = [step - side if step else 0 for side, step in zip(window, shift, strict=True)]
    return *window, *first, *size


class Launch:
    """What the kernels of one call share. `window` is empty where all tokens are one window."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, window: Sequence[int], shift: Sequence[int], clip: Sequence[float],
        gate: Tensor | None, bits: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        self.images, rows, cols, self.heads, dim = q.shape
        size, key_size = (rows, cols), (k.shape[1], k.shape[2])
        self.queries, self.keys = (place(s, window or s, shift) for s in (size, key_size))
        sides = zip(size, window or size, shift, strict=True)
        self.windows = tuple(length // side + (step > 0) for length, side, step in sides)
        widest = max(padded(dim), padded(v.shape[-1]))
        tokens = math.prod(self.queries[:2]), math.prod(self.keys[:2])
        tile = tile_shape(*tokens, widest, q.element_size(), bits is not None)
        gamma, zeta = clip or (0.0, 1.0)
        self.scale, self.clip = scale, (gamma, zeta - gamma)
        self.constants: dict[str, Any] = {
            "DIM": dim, "DIM_V": v.shape[-1], "PAD": padded(dim), "PAD_V": padded(v.shape[-1]),
            "M": tile[0], "N": tile[1], "CLIP": (gamma, zeta) != (0.0, 1.0), "HAS_GATE": gate is not None,
            "HAS_BITS": bits is not None, "PRECISION": dot_precision(q.dtype),
            "num_warps": 8 if tile == (64, 64) else 4, "num_stages": 2, "enable_fp_fusion": True,
        }  # fmt: skip

    def grid(self, tokens: int, tile: int) -> tuple[int]:
        return (self.images * self.heads * math.prod(self.windows) * -(-tokens // tile),)

    @property
    def numbers(self) -> tuple:
        return self.heads, self.windows, self.queries, self.keys


def _strides(*maps: Tensor | None) -> tuple[tuple[int, ...], ...]:
    return tuple(NO_STRIDES if t is None else t.stride()[:4] for t in maps)


def launch_forward(one: Launch, q, k, v, gate, bits, out: Tensor | None, lse) -> None:
    """Write the output, unless it is None, and the log-sum-exp of every query."""
    tokens = math.prod(one.queries[:2])
    clipped_forward_kernel[one.grid(tokens, one.constants["M"])](
        q, k, v, q if gate is None else gate, q if bits is None else bits, q if out is None else out, lse,
        *_strides(q, k, v, gate, bits, out), *one.numbers, one.scale * LOG2_E, *one.clip,
        HAS_OUT=out is not None, **one.constants,
    )  # fmt: skip


def launch_dq(one: Launch, q, k, v, gate, bits, grad, lse, dq, dgate: Tensor | None, delta) -> None:
    """Write dq, the gradient of the gate and delta, which dkv reads."""
    tokens = math.prod(one.queries[:2])
    clipped_dq_kernel[one.grid(tokens, one.constants["M"])](
        q, k, v, q if gate is None else gate, q if bits is None else bits, grad, lse, dq,
        delta if dgate is None else dgate, delta, *_strides(q, k, v, gate, bits, grad, dq), *one.numbers,
        one.scale, one.scale * LOG2_E, *one.clip, **one.constants,
    )  # fmt: skip


def launch_dkv(one: Launch, q, k, v, gate, bits, grad, lse, delta, dk: Tensor | None, dv: Tensor | None) -> None:
    """Write dk and dv, those of the two that are given."""
    tokens = math.prod(one.keys[:2])
    clipped_dkv_kernel[one.grid(tokens, one.constants["N"])](
        q, k, v, q if gate is None else gate, q if bits is None else bits, grad, lse,
        lse if delta is None else delta, k if dk is None else dk, v if dv is None else dv,
        *_strides(q, k, v, gate, bits, grad, dk, dv), *one.numbers, one.scale, one.scale * LOG2_E, *one.clip,
        WANTS_DK=dk is not None, WANTS_DV=dv is not None, **one.constants,
    )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_all(bits: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bits is None else _dense(bits).expand(q.shape[0], q.shape[3], -1, -1)


def pack_bits(mask: Tensor) -> Tensor:
    """(..., M) bool -> (..., words) int32: key n is bit n % 32 of word n // 32."""
    words = -(-mask.shape[-1] // 32)
    whole = F.pad(mask, (0, 32 * words - mask.shape[-1])).unflatten(-1, (words, 32))
    return _as_words((whole * _powers(mask)).sum(-1))


def pack_columns(columns: Tensor, keys: int) -> Tensor:
    """(..., budget) int64, distinct numbers of keys -> (..., words) int32, as `pack_bits` packs them."""
    words = columns.new_zeros(*columns.shape[:-1], -(-keys // 32))
    return _as_words(words.scatter_add_(-1, columns // 32, _powers(columns)[columns % 32]))


def _powers(like: Tensor) -> Tensor:
    return 1 << torch.arange(32, device=like.device)


def _as_words(numbers: Tensor) -> Tensor:
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, cols, heads, _ = q.shape
    lse = q.new_empty(batch, heads, rows, cols, dtype=torch.float32)
    return q.new_empty(batch, rows, cols, heads, v.shape[-1]), lse


@torch.library.custom_op("foveate::clipped_attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bits: Tensor | None, window: list[int], shift: list[int],
    clip: list[float], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _empty_results(q, v)
    if out.numel() > 0:
        q, k, v, bits = _dense(q), _dense(k), _dense(v), _of_all(bits, q)
        one = Launch(q, k, v, window, shift, clip, gate, bits, scale)
        with on_device(q):
            launch_forward(one, q, k, v, gate, bits, out, lse)
    return out, lse


@_forward.register_fake
def _(q, k, v, gate, bits, window, shift, clip, scale):
    return _empty_results(q, v)


@torch.library.custom_op("foveate::clipped_attention_backward", mutates_args=())
@without_autocast
def _backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bits: Tensor | None, lse: Tensor, grad: Tensor,
    window: list[int], shift: list[int], clip: list[float], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v and gate; an empty tensor without a gate."""
    dq, dk, dv, dgate = _empty_gradients(q, k, v, gate)
    if grad.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dgate.zero_()
    q, k, v, grad, bits = _dense(q), _dense(k), _dense(v), _dense(grad), _of_all(bits, q)
    one = Launch(q, k, v, window, shift, clip, gate, bits, scale)
    delta = torch.empty_like(lse)
    of_gate = None if gate is None else torch.empty_like(lse)
    with on_device(q):
        launch_dq(one, q, k, v, gate, bits, grad, lse, dq, of_gate, delta)
        launch_dkv(one, q, k, v, gate, bits, grad, lse, delta, dk, dv)
    if of_gate is not None:
        dgate.copy_(of_gate.permute(0, 2, 3, 1))
    return dq, dk, dv, dgate


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    return *separate(q, k, v), q.new_empty(0) if gate is None else gate.new_empty(gate.shape)


@_backward.register_fake
def _(q, k, v, gate, bits, lse, grad, window, shift, clip, scale):
    return _empty_gradients(q, k, v, gate)


refuse_second_derivative(_backward, "clipped_attention")
call_backward = eager_backward(_backward)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[1])


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    q, k, v, gate, bits, lse = ctx.saved_tensors
    dq, dk, dv, dgate = call_backward(q, k, v, gate, bits, lse, grad, *ctx.numbers)
    return dq, dk, dv, None if gate is None else dgate, None, *(None for _ in ctx.numbers)


call_forward = eager_forward(_forward, _save, _differentiate)


def clipped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Sequence[int] = (),
    shift: Sequence[int] = (0, 0),
    *,
    bits: Tensor | None = None,
    clip: Sequence[float] | None = None,
    gate: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Attend in windows, or from all tokens to all where `window` is empty; differentiable once.

    Args:
        q, k, v: (B, H, W, heads, head_dim); k and v may have another size than q where there are no windows.
        window, shift: (rows, columns); the windows of a map that is cut at the shift.
        bits: (B or 1, heads or 1, queries, words) int32 from `pack_bits`, without windows only.
        clip: (gamma, zeta) of a clipped softmax.
        gate: (B, H, W, heads), multiplies the output.

    Returns:
        (B, H, W, heads, head_dim of v), contiguous.
    """
    numbers = ([] if clip is None else [float(n) for n in clip]), scale
    return call_forward(q, k, v, gate, bits, list(window), list(shift), *numbers)[0]


@torch.library.custom_op("foveate::reversed_attention_forward", mutates_args=())
def _reversed(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(k, v)
    if out.numel() > 0:
        q, k, v = _dense(q), _dense(k), _dense(v)
        one = Launch(q, k, v, (), (0, 0), (), weight, None, scale)
        with on_device(q):
            launch_forward(one, q, k, v, weight, None, None, lse)
            launch_dkv(one, q, k, v, weight, None, v, lse, None, None, out)
    return out, lse


@_reversed.register_fake
def _(q, k, v, weight, scale):
    return _empty_results(k, v)


@torch.library.custom_op("foveate::reversed_attention_backward", mutates_args=())
@without_autocast
def _reversed_backward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and weight."""
    dq, dk, dv, dweight = _empty_gradients(q, k, v, weight)
    if grad.numel() == 0:
        return dq, dk, dv, dweight
    q, k, v, grad = _dense(q), _dense(k), _dense(v), _dense(grad)
    one = Launch(q, k, grad, (), (0, 0), (), weight, None, scale)
    of_weight, delta = torch.empty_like(lse), torch.empty_like(lse)
    with on_device(q):  # as if the gradient were the values, and the values the gradient
        launch_forward(one, q, k, grad, weight, None, dv, torch.empty_like(lse))
        launch_dq(one, q, k, grad, weight, None, v, lse, dq, of_weight, delta)
        launch_dkv(one, q, k, grad, weight, None, v, lse, delta, dk, None)
    dweight.copy_(of_weight.permute(0, 2, 3, 1))
    return dq, dk, dv, dweight


@_reversed_backward.register_fake
def _(q, k, v, weight, lse, grad, scale):
    return _empty_gradients(q, k, v, weight)


refuse_second_derivative(_reversed_backward, "reversed_attention")
call_reversed_backward = eager_backward(_reversed_backward)


def _save_reversed(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.scale = inputs[4]
    ctx.save_for_backward(*inputs[:4], output[1])


def _differentiate_reversed(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    q, k, v, weight, lse = ctx.saved_tensors
    return *call_reversed_backward(q, k, v, weight, lse, grad, ctx.scale), None


call_reversed = eager_forward(_reversed, _save_reversed, _differentiate_reversed)


def reversed_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Sum, for every key, what all queries send to it: (B, H, W, heads, head_dim) maps, weight (B, H, W, heads).

    Differentiable once. Memory is linear in the tokens.
    """
    return call_reversed(q, k, v, weight, scale)[0]
