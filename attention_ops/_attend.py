"""Attention in eager torch: a custom backward pass, and products that are exact where numbers are not finite."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch import prefers_flash_attention
from ..kernels._launch import no_autocast


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which logits, masks and sums are kept."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class EagerBody:
    """A forward pass with a custom backward pass; an instance holds all arguments that are not tensors.

    Tensors are given in one order everywhere; some may be None. Subclasses name them. A body with several outputs
    returns a tuple; its `backward` then gets a tuple of outputs and a tuple of their gradients.
    """

    keeps_output: ClassVar[bool] = False  # whether `backward` reads the output of the forward pass

    def forward(self, *tensors: Any, **_: Any) -> Any:
        raise NotImplementedError

    def backward(self, *tensors: Any, **_: Any) -> Sequence[Tensor | None]:
        """Return the gradient of every tensor, None for one that is None or has no gradient.

        Called with the output (None unless `keeps_output`), the gradient of the output, and the tensors.
        """
        raise NotImplementedError

    def graph(self, *tensors: Any, **_: Any) -> Any:
        """The forward pass by differentiable operations, for gradients of gradients."""
        raise NotImplementedError

    def __call__(self, *tensors: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return _Eager.apply(self, *tensors)
        return self.forward(*tensors)


class _Eager(torch.autograd.Function):
    """Without `setup_context`, which costs 60 us a call: torch.func, which needs it, takes the graph body instead."""

    @staticmethod
    def forward(ctx: Any, body: EagerBody, *tensors: Tensor | None) -> Any:
        out = body.forward(*tensors)
        ctx.body = body
        kept = () if not body.keeps_output else out if isinstance(out, tuple) else (out,)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        body, saved, count = ctx.body, ctx.saved_tensors, len(ctx.needs_input_grad) - 1
        tensors, kept = saved[:count], saved[count:]
        out, grad = (kept, grads) if len(grads) > 1 else (kept[0] if kept else None, grads[0])
        with no_autocast(grads[0]):
            if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
                return None, *_differentiable(body.graph, tensors, grad, ctx.needs_input_grad[1:])
            return None, *body.backward(out, grad, *tensors)


def _differentiable(
    graph: Callable[..., Any], tensors: Sequence[Tensor | None], grad: Any, needed: Sequence[bool]
) -> list[Tensor | None]:
    apart = [None if t is None else t.view_as(t) for t in tensors]  # one tensor may be given as q, k and v
    wanted = [t for t, need in zip(apart, needed, strict=True) if need and t is not None]
    with sdpa_kernel(SDPBackend.MATH):
        out = graph(*apart)
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needed]


def of_one_layout(out: Tensor) -> Tensor:
    """Copy the result of a graph body to contiguous memory.

    Its strides depend on the kernel that SDPA takes, and a recorded graph must fit a later decomposition by another.
    """
    return out.clone(memory_format=torch.contiguous_format)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Run SDPA on (B, heads, tokens, head_dim) in eager torch; on a CPU it can be differentiated twice."""
    records = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if not (records and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if not prefers_flash_attention(q, k, v, scale):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return _FlashOnCpu.apply(q, k, v, scale)


class _FlashOnCpu(torch.autograd.Function):
    """torch's kernel for CPUs; its backward pass in torch cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            graph = partial(F.scaled_dot_product_attention, scale=ctx.scale)
            return *_differentiable(graph, (q, k, v), grad, ctx.needs_input_grad[:3]), None
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *backward(grad, q, k, v, out, lse, 0.0, False, scale=ctx.scale), None


# Exact where numbers are not finite: a masked pair adds 0 * NaN to a product of matrices, here it adds nothing.


def is_finite(*tensors: Tensor) -> bool:
    """Say whether all numbers of tensors on a CPU are finite; False too where their sum overflows. True on a GPU."""
    if tensors[0].device.type != "cpu":  # looking at the numbers would wait for the GPU
        return True
    for t in tensors:
        if not math.isfinite(t.sum(dtype=accumulator(t.dtype)).item()):
            return False
    return True


def product_of_seen(weights: Tensor, seen: Tensor, x: Tensor) -> Tensor:
    """weights @ x over seen pairs only: (..., T, K), bool that broadcasts to it, (..., K, d) -> (..., T, d).

    The others must have weight 0.
    """
    finite = x.isfinite()
    out = torch.matmul(weights, torch.where(finite, x, 0))
    odd = (~finite).any(-1).flatten(0, -2).any(0) if x.dim() > 2 else (~finite).any(-1)
    for j in odd.nonzero().flatten().tolist():
        of_key = torch.where(finite[..., j, :], 0, x[..., j, :])[..., None, :]  # (..., 1, d)
        out = out + torch.where(seen[..., j, None], weights[..., j, None] * of_key, 0).to(out.dtype)
    return out


def probabilities_of_seen(q: Tensor, k: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of q @ k^T + bias over seen pairs, 0 for the others; a row that sees nothing is 0."""
    return torch.where(seen, logits_of_seen(q, k, seen, bias).softmax(-1), 0)


def logits_of_seen(q: Tensor, k: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    """q @ k^T + bias for seen pairs, -inf for the others."""
    logits = torch.matmul(q, k.mT)
    logits = logits if bias is None else logits + bias
    return logits.masked_fill(~seen, -torch.inf)
