"""Local attention: launch shapes, launchers, and the op with its gradient.

Shapes, dtypes and devices were checked by the caller. A tensor whose head_dim is not contiguous is copied; other
strides are taken as they are. There is no double backward: the backward op has no gradient.
"""

import math

import torch
from torch import Tensor

from .._launch import dot_precision, on_device, padded, refuse_second_derivative
from .backward import local_dkv_kernel, local_dq_kernel
from .bias import PROGRAMS, BiasLayout, bias_layout, bias_tiles, local_bias_kernel, table_gradient, works_of
from .forward import local_forward_kernel
from .halo_logits import halo_logits, halo_logits_backward
from .plan import Pattern, Plan, launch_shape, make_plan


def warps(owners: int, itemsize: int) -> int:
    """16 owners a warp; float32 products keep twice the registers busy."""
    return max(owners // (8 if itemsize == 4 else 16), 1)


# Three TF32 products ("tf32x3") take as many instructions (sm_80: 114 a logit, 106 without) and spill in dkv.
FULL_PRECISION = "ieee"


class Launch:
    """Everything that the kernels of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, bias: bool, tables: bool
    ) -> None:
        self.pattern, self.scale = pattern, scale
        self.queries, self.keys = tuple(q.shape[1:3]), tuple(k.shape[1:3])
        self.images, self.heads = q.shape[0], q.shape[3]
        self.dim, self.dim_v, self.itemsize = q.shape[-1], v.shape[-1], q.element_size()
        self.by_block, self.extra, self.device, self.precision = (
            tables,
            bias or tables,
            q.device,
            dot_precision(q.dtype, FULL_PRECISION),
        )

    def shape(self, kernel: str) -> tuple[int, int]:
        return launch_shape(kernel, max(padded(self.dim), padded(self.dim_v)), self.itemsize, self.extra)

    def plan(self, kernel: str) -> Plan:
        sizes = (self.pattern, self.queries, self.keys, self.shape(kernel)[0])
        return make_plan(*sizes, inverse=kernel == "dkv", by_block=self.by_block)

    def tiles(self, plan: Plan) -> tuple[int, int]:
        owners = self.keys if plan.rows.inverse else self.queries
        longest = [-(-n // step) for n, step in zip(owners, self.pattern.dilation, strict=True)]
        return plan.rows.tiles(longest[0]), plan.cols.tiles(longest[1])

    def grid(self, plan: Plan) -> tuple[int]:
        return (self.images * self.heads * math.prod(self.tiles(plan)) * math.prod(self.pattern.dilation),)

    def layout(self, plan: Plan) -> BiasLayout:
        return bias_layout(self.pattern, plan, self.queries, self.keys, self.device)

    def sizes(self, plan: Plan, layout: BiasLayout | None) -> tuple:
        variants = 0 if layout is None else layout.cells.shape[0]
        return self.heads, self.tiles(plan), self.pattern.dilation, self.queries, self.keys, variants

    def constants(self, kernel: str) -> dict:
        plan = self.plan(kernel)
        return {
            "ROWS": plan.rows, "COLS": plan.cols, "DIM": self.dim, "DIM_V": self.dim_v, "PAD": padded(self.dim),
            "PAD_V": padded(self.dim_v), "PRECISION": self.precision, "num_warps": warps(plan.owners, self.itemsize),
            "num_stages": self.shape(kernel)[1], "enable_fp_fusion": True,
        }  # fmt: skip


def _contiguous_dim(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(t.stride()[:4] for t in tensors)


def _bias_arguments(launch: Launch, plan: Plan, bias: Tensor | None, q: Tensor) -> tuple[BiasLayout | None, tuple]:
    """The layout and (tiles, row variants, column variants); q replaces pointers that are not read."""
    if bias is None:
        return None, (q, q, q)
    layout = launch.layout(plan)
    return layout, (bias_tiles(bias, layout, launch.scale, q.dtype), layout.variants_y, layout.variants_x)


def _rel_logits(launch: Launch, q: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor | None:
    if tables is None:
        return None
    return halo_logits(q, tables, _per_block(launch.pattern), 1 / launch.scale, launch.precision)


def _per_block(pattern: Pattern) -> tuple[int, int]:
    return pattern.keys[0] // pattern.stride[0], pattern.keys[1] // pattern.stride[1]


def launch_forward(launch: Launch, q, k, v, bias, rel, out, lse) -> None:
    plan = launch.plan("forward")
    layout, bias_arguments = _bias_arguments(launch, plan, bias, q)
    rel_or_q = q if rel is None else rel
    local_forward_kernel[launch.grid(plan)](
        q, k, v, rel_or_q, *bias_arguments, out, lse, *_strides(q, k, v, rel_or_q, out),
        *launch.sizes(plan, layout), launch.scale * math.log2(math.e),
        HAS_BIAS=bias is not None, PLACES=0 if rel is None else rel.shape[-1] // 2, **launch.constants("forward"),
    )  # fmt: skip


def launch_dq(launch: Launch, q, k, v, bias, rel, out, grad, lse, dq, drel, delta, grad_lse=None) -> None:
    plan = launch.plan("dq")
    layout, bias_arguments = _bias_arguments(launch, plan, bias, q)
    rel_or_q, drel_or_dq = (q, dq) if rel is None else (rel, drel)
    local_dq_kernel[launch.grid(plan)](
        q, k, v, rel_or_q, *bias_arguments, out, grad, lse, lse if grad_lse is None else grad_lse,
        dq, drel_or_dq, delta, *_strides(q, k, v, rel_or_q, out, grad, dq),
        *launch.sizes(plan, layout), launch.scale, launch.scale * math.log2(math.e),
        HAS_BIAS=bias is not None, HAS_GRAD_LSE=grad_lse is not None,
        PLACES=0 if rel is None else rel.shape[-1] // 2, **launch.constants("dq"),
    )  # fmt: skip


def launch_dkv(launch: Launch, q, k, v, bias, rel, grad, lse, delta, dk, dv) -> None:
    plan = launch.plan("dkv")
    layout, bias_arguments = _bias_arguments(launch, plan, bias, q)
    rel_or_q = q if rel is None else rel
    local_dkv_kernel[launch.grid(plan)](
        q, k, v, rel_or_q, *bias_arguments, grad, lse, delta, dk, dv, *_strides(q, k, v, rel_or_q, grad, dk, dv),
        *launch.sizes(plan, layout), launch.scale, launch.scale * math.log2(math.e),
        HAS_BIAS=bias is not None, PLACES=0 if rel is None else rel.shape[-1] // 2, **launch.constants("dkv"),
    )  # fmt: skip


def launch_dbias(launch: Launch, q, k, v, bias, grad, lse, delta) -> Tensor:
    """Return the gradient of the bias table, (heads, cells) in fp32."""
    plan = launch.plan("dbias")
    layout, (tiles_of_bias, *_) = _bias_arguments(launch, plan, bias, q)
    works, entries, shares = works_of(layout, launch.images, PROGRAMS // (launch.heads * plan.steps))
    sums = q.new_empty(len(works), launch.heads, plan.steps, plan.owners, plan.walked, dtype=torch.float32)
    local_bias_kernel[(len(works) * launch.heads * plan.steps,)](
        q, k, v, tiles_of_bias, grad, lse, delta, entries, shares, sums, *_strides(q, k, v, grad),
        launch.heads, launch.pattern.dilation, launch.queries, launch.keys, layout.cells.shape[0],
        launch.scale * math.log2(math.e), **launch.constants("dbias"),
    )  # fmt: skip
    return table_gradient(sums, works, layout)


@torch.library.custom_op("foveate::local_attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_h: Tensor | None, rel_w: Tensor | None,
    kind: str, keys: list[int], reach: list[int], stride: list[int], dilation: list[int], causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = empty_results(q, v)
    if out.numel() > 0:
        q, k, v = (_contiguous_dim(t) for t in (q, k, v))
        tables = None if rel_h is None or rel_w is None else (rel_h.contiguous(), rel_w.contiguous())
        pattern = _pattern(kind, keys, reach, stride, dilation, causal)
        launch = Launch(q, k, v, pattern, scale, bias is not None, tables is not None)
        with on_device(q):
            launch_forward(launch, q, k, v, bias, _rel_logits(launch, q, tables), out, lse)
    return out, lse


def _pattern(kind, keys, reach, stride, dilation, causal) -> Pattern:
    return Pattern(kind, tuple(keys), tuple(reach), tuple(stride), tuple(dilation), tuple(causal))


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, cols, heads, _ = q.shape
    out = q.new_empty(batch, rows, cols, heads, v.shape[-1])
    return out, q.new_empty(batch, heads, rows, cols, dtype=torch.float32)


@_forward.register_fake
def _(q, k, v, bias, rel_h, rel_w, kind, keys, reach, stride, dilation, causal, scale):
    return empty_results(q, v)


@torch.library.custom_op("foveate::local_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_h: Tensor | None, rel_w: Tensor | None,
    out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, bias_grad: bool,
    kind: str, keys: list[int], reach: list[int], stride: list[int], dilation: list[int], causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of q, k, v, bias, rel_h, rel_w; an empty tensor for what is not given or not needed."""
    dq, dk, dv, dbias, drel_h, drel_w = _empty_gradients(q, k, v, bias if bias_grad else None, rel_h, rel_w)
    if out.numel() == 0:
        return dq, dk, dv, dbias.zero_(), drel_h.zero_(), drel_w.zero_()
    q, k, v, grad = (_contiguous_dim(t) for t in (q, k, v, grad))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    tables = None if rel_h is None or rel_w is None else (rel_h.contiguous(), rel_w.contiguous())
    launch = Launch(
        q, k, v, _pattern(kind, keys, reach, stride, dilation, causal), scale, bias is not None, tables is not None
    )
    delta = torch.empty_like(lse)
    with on_device(q):
        rel = _rel_logits(launch, q, tables)
        drel = None if rel is None else torch.empty_like(rel)
        launch_dq(launch, q, k, v, bias, rel, out, grad, lse, dq, drel, delta, grad_lse)
        launch_dkv(launch, q, k, v, bias, rel, grad, lse, delta, dk, dv)
        if bias is not None and bias_grad:
            dbias.copy_(launch_dbias(launch, q, k, v, bias, grad, lse, delta).view_as(bias))
        if tables is not None:
            per_block = _per_block(launch.pattern)
            sums = halo_logits_backward(q, tables, drel, dq, per_block, 1 / scale, launch.precision)
            drel_h.copy_(sums[0])
            drel_w.copy_(sums[1])
    return dq, dk, dv, dbias, drel_h, drel_w


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor | None) -> tuple[Tensor, ...]:
    maps = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return *maps, *(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in tables)


@_backward.register_fake
def _(q, k, v, bias, rel_h, rel_w, out, lse, grad, grad_lse, bias_grad, *pattern):
    return _empty_gradients(q, k, v, bias if bias_grad else None, rel_h, rel_w)


refuse_second_derivative(_backward, "local_attention")


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # most callers use no lse
    ctx.pattern = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output)


def _differentiate(ctx, grad, grad_lse):
    saved = ctx.saved_tensors  # read once: checkpointing refuses a second read
    grad = torch.zeros_like(saved[6]) if grad is None else grad  # of the output
    grads = _backward(*saved, grad, grad_lse, ctx.needs_input_grad[3], *ctx.pattern)
    wanted = [t is not None and needed for t, needed in zip(saved[:6], ctx.needs_input_grad, strict=False)]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None for _ in ctx.pattern)


_forward.register_autograd(_differentiate, setup_context=_save)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    scale: float,
) -> Tensor:
    """Attend from every query to the keys that `pattern` lets it see; differentiable once.

    Args:
        q, k, v: (B, H, W, heads, head_dim); k and v of a block pattern may have a size of their own, v a head_dim.
        bias: (heads, ...) table: rows x columns of relative positions (neighborhood), tokens x tokens (windows).
        tables: rel_h and rel_w of halo attention, (2 * window - 1, head_dim) each; q is not scaled for them.
        scale: of q . k, above 0.

    Returns:
        (B, H, W, heads, head_dim of v), contiguous.
    """
    rel_h, rel_w = (None, None) if tables is None else tables
    return _forward(q, k, v, bias, rel_h, rel_w, *_fields(pattern), scale)[0]


def local_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, bias: Tensor | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend as `local_attention` does, and return the log-sum-exp of the logits too, (B, H, W, heads) fp32."""
    out, lse = _forward(q, k, v, bias, None, None, *_fields(pattern), scale)
    return out, (lse * math.log(2)).permute(0, 2, 3, 1)


def _fields(p: Pattern) -> tuple:
    return p.kind, list(p.keys), list(p.reach), list(p.stride), list(p.dilation), list(p.causal)
