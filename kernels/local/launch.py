"""Local attention: launch shapes, launchers, and the op with its gradient.

Shapes, dtypes and devices were checked by the caller. A tensor whose head_dim is not contiguous is copied; other
strides are taken as they are. There is no double backward: the backward op has no gradient.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .._launch import (
    compute_capability,
    dot_precision,
    eager_backward,
    eager_forward,
    on_device,
    refuse_second_derivative,
    without_autocast,
)
from ..packed import empty_gradients, separate
from .backward import local_dkv_kernel, local_dq_kernel
from .bias import bias_tiles
from .bias_gradient import local_bias_kernel, table_gradient
from .forward import local_forward_kernel
from .halo_logits import halo_logits, halo_logits_backward
from .launch_plan import KernelLaunch, Sizes, full_precision, plan_launch, plan_one_pass, plan_shares
from .one_pass import local_backward_kernel, local_closed_forward_kernel
from .plan import Pattern, Plan, pattern_of

LOG2_E = math.log2(math.e)


class Launch:
    """What the kernels of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, bias: bool, tables: bool
    ) -> None:
        images, rows, cols, heads, dim = q.shape
        self.sizes = Sizes(
            pattern, (rows, cols), (k.shape[1], k.shape[2]), images, heads, dim, v.shape[-1], q.element_size(),
            dot_precision(q.dtype, full_precision(compute_capability(q))), bias, tables,
        )  # fmt: skip
        self.pattern, self.scale = pattern, scale
        self.factor = LOG2_E if bias or tables else scale * LOG2_E

    @property
    def table_precision(self) -> str:
        """Of the products with tables of relative logits."""
        return "ieee" if self.sizes.precision == "tf32x3" else self.sizes.precision

    def of(self, kernel: str) -> KernelLaunch:
        return plan_launch(kernel, self.sizes)

    def arguments(self, kernel: KernelLaunch) -> tuple:
        """The numbers that forward, dq and dkv take between their strides and their constants."""
        sizes, dilation = self.sizes, self.pattern.dilation
        return sizes.heads, kernel.tiles, dilation, sizes.queries, sizes.keys, self.scale, self.factor


def _contiguous_dim(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Return a unit and the strides of maps in that unit."""
    return _in_units(16 // tensors[0].element_size(), tuple(t.stride()[:4] for t in tensors))


@lru_cache(maxsize=1024)
def _in_units(vector: int, strides: tuple[tuple[int, ...], ...]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Return a unit and strides in that unit: one number, or a vector of 16 bytes.

    Triton knows of a number whether 16 divides it. Where it does not, but whole vectors fit between tokens (head_dim 24
    in 16 bits), the unit is such a vector, so that kernels load vectors.
    """
    common = math.gcd(*(step for steps in strides for step in steps))
    if common % 16 == 0 or common % vector:
        return 1, strides
    return vector, tuple(tuple(step // vector for step in steps) for steps in strides)


def _tiles_of(bias: Tensor | None, plan: Plan, q: Tensor) -> Tensor:
    """The bias laid out for the tiles of a plan; q replaces a pointer that is not read."""
    return q if bias is None else bias_tiles(bias, plan)


def _cells(bias: Tensor | None) -> int:
    """Cells of the table of a head, 0 without a bias."""
    return 0 if bias is None else bias.numel() // bias.shape[0]


def _rel_logits(launch: Launch, q: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor | None:
    if tables is None:
        return None
    return halo_logits(q, tables, _per_block(launch.pattern), launch.table_precision)


def _per_block(pattern: Pattern) -> tuple[int, int]:
    return pattern.keys[0] // pattern.stride[0], pattern.keys[1] // pattern.stride[1]


def launch_forward(launch: Launch, q, k, v, bias, rel, out, lse) -> None:
    if plan_one_pass("forward", launch.sizes) is not None:
        launch_closed_forward(launch, q, k, v, bias, out, lse)
        return
    kernel = launch.of("forward")
    rel_or_q = q if rel is None else rel
    unit, strides = _strides(q, k, v, rel_or_q, out)
    local_forward_kernel[kernel.grid](
        q, k, v, rel_or_q, _tiles_of(bias, kernel.plan, q), out, lse, *strides,
        *launch.arguments(kernel),
        HAS_BIAS=bias is not None, PLACES=0 if rel is None else rel.shape[-1] // 2, UNIT=unit, **kernel.constants,
    )  # fmt: skip


def launch_dq(launch: Launch, q, k, v, bias, rel, out, grad, lse, dq, drel, delta, grad_lse=None) -> None:
    kernel = launch.of("dq")
    rel_or_q, drel_or_dq = (q, dq) if rel is None else (rel, drel)
    unit, strides = _strides(q, k, v, rel_or_q, out, grad, dq)
    local_dq_kernel[kernel.grid](
        q, k, v, rel_or_q, _tiles_of(bias, kernel.plan, q), out, grad, lse, lse if grad_lse is None else grad_lse,
        dq, drel_or_dq, delta, *strides, *launch.arguments(kernel),
        HAS_BIAS=bias is not None, HAS_GRAD_LSE=grad_lse is not None,
        PLACES=0 if rel is None else rel.shape[-1] // 2, UNIT=unit, **kernel.constants,
    )  # fmt: skip


def launch_dkv(launch: Launch, q, k, v, bias, rel, grad, lse, delta, dk, dv) -> None:
    kernel = launch.of("dkv")
    rel_or_q = q if rel is None else rel
    unit, strides = _strides(q, k, v, rel_or_q, grad, dk, dv)
    local_dkv_kernel[kernel.grid](
        q, k, v, rel_or_q, _tiles_of(bias, kernel.plan, q), grad, lse, delta, dk, dv,
        *strides, *launch.arguments(kernel),
        HAS_BIAS=bias is not None, PLACES=0 if rel is None else rel.shape[-1] // 2, UNIT=unit, **kernel.constants,
    )  # fmt: skip


def launch_dbias(launch: Launch, q, k, v, bias, grad, lse, delta, dbias) -> None:
    """Write the gradient of the bias table."""
    kernel, sizes, shares = launch.of("dbias"), launch.sizes, plan_shares(launch.sizes)
    plan = kernel.plan
    sums = q.new_empty(shares.works, sizes.heads, plan.steps, plan.owners, plan.walked, dtype=torch.float32)
    unit, strides = _strides(q, k, v, grad)
    local_bias_kernel[(shares.works * sizes.heads * plan.steps,)](
        q, k, v, bias, grad, lse, delta, sums, *strides,
        sizes.heads, launch.pattern.dilation, sizes.queries, sizes.images, shares.images, *shares.numbers,
        launch.scale, launch.factor, CELLS=_cells(bias), DILATED=launch.pattern.dilation != (1, 1), UNIT=unit,
        **kernel.constants,
    )  # fmt: skip
    table_gradient(sums, dbias, launch.pattern, plan, sizes.queries, shares)


def launch_closed_forward(launch: Launch, q, k, v, bias, out, lse) -> None:
    """Launch the forward pass of tiles that see only themselves."""
    planned, sizes = plan_one_pass("forward", launch.sizes), launch.sizes
    assert planned is not None
    kernel, units, shares = planned
    unit, strides = _strides(q, k, v, out)
    local_closed_forward_kernel[kernel.grid](
        q, k, v, q if bias is None else bias, out, lse, *strides, sizes.heads, kernel.tiles,
        launch.pattern.dilation, sizes.queries, units, shares, launch.scale * LOG2_E,
        CELLS=_cells(bias), ALIKE=len({*strides[:3]}) == 1, UNIT=unit, **kernel.constants,
    )  # fmt: skip


def launch_one_pass(launch: Launch, q, k, v, bias, out, grad, lse, dq, dk, dv, dbias: Tensor | None) -> None:
    """Launch the backward pass as one kernel; where `dbias` is given, write the gradient of the bias table too."""
    planned, sizes = plan_one_pass("backward", launch.sizes), launch.sizes
    assert planned is not None
    kernel, units, shares = planned
    owners = kernel.plan.owners
    unit, strides = _strides(q, k, v, out, grad, dq, dk, dv)
    parts = (kernel.grid[0] // sizes.heads, sizes.heads, 1, owners, owners)
    sums = None if dbias is None else q.new_empty(parts, dtype=torch.float32)
    local_backward_kernel[kernel.grid](
        q, k, v, q if bias is None else bias, out, grad, lse, dq, dk, dv, dq if sums is None else sums,
        *strides, sizes.heads, kernel.tiles, launch.pattern.dilation, sizes.queries,
        units, shares, launch.scale, launch.scale * LOG2_E, CELLS=_cells(bias), BIAS_GRAD=dbias is not None,
        ALIKE=len({*strides[:3]}) == len({*strides[3:5]}) == len({*strides[5:]}) == 1 and strides[5] in strides[:5],
        PACKED=strides[5] == strides[0], UNIT=unit, **kernel.constants,
    )  # fmt: skip
    if sums is not None and dbias is not None:
        table_gradient(sums, dbias, launch.pattern, kernel.plan, sizes.queries, None)


@torch.library.custom_op("foveate::local_attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_h: Tensor | None, rel_w: Tensor | None,
    kind: str, keys: list[int], reach: list[int], stride: list[int], dilation: list[int], causal: list[bool],
    shift: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = empty_results(q, v)
    if out.numel() > 0:
        q, k, v = (_contiguous_dim(t) for t in (q, k, v))
        tables = None if rel_h is None or rel_w is None else (rel_h.contiguous(), rel_w.contiguous())
        pattern, bias = _pattern(kind, keys, reach, stride, dilation, causal, shift), _contiguous(bias)
        launch = Launch(q, k, v, pattern, scale, bias is not None, tables is not None)
        with on_device(q):
            launch_forward(launch, q, k, v, bias, _rel_logits(launch, q, tables), out, lse)
    return out, lse


def _pattern(kind, keys, reach, stride, dilation, causal, shift) -> Pattern:
    return pattern_of(kind, tuple(keys), tuple(reach), tuple(stride), tuple(dilation), tuple(causal), tuple(shift))


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, cols, heads, _ = q.shape
    out = q.new_empty(batch, rows, cols, heads, v.shape[-1])
    return out, q.new_empty(batch, heads, rows, cols, dtype=torch.float32)


@_forward.register_fake
def _(q, k, v, bias, rel_h, rel_w, kind, keys, reach, stride, dilation, causal, shift, scale):
    return empty_results(q, v)


@torch.library.custom_op("foveate::local_attention_backward", mutates_args=())
@without_autocast
def _backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rel_h: Tensor | None, rel_w: Tensor | None,
    out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, bias_grad: bool,
    kind: str, keys: list[int], reach: list[int], stride: list[int], dilation: list[int], causal: list[bool],
    shift: list[int], scale: float, packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of q, k, v, bias, rel_h, rel_w; an empty tensor for what is not given or not needed.

    Those of q, k and v are contiguous, or in one buffer as q, k and v are, where `packed` is allowed.
    """
    dq, dk, dv = empty_gradients(q, k, v, packed=packed)
    dbias, drel_h, drel_w = _empty_tables(q, bias if bias_grad else None, rel_h, rel_w)
    if out.numel() == 0:
        return dq, dk, dv, dbias.zero_(), drel_h.zero_(), drel_w.zero_()
    q, k, v, grad = (_contiguous_dim(t) for t in (q, k, v, grad))
    grad_lse, bias = _contiguous(grad_lse), _contiguous(bias)
    tables = None if rel_h is None or rel_w is None else (rel_h.contiguous(), rel_w.contiguous())
    pattern = _pattern(kind, keys, reach, stride, dilation, causal, shift)
    launch = Launch(q, k, v, pattern, scale, bias is not None, tables is not None)
    with on_device(q):
        if grad_lse is None and plan_one_pass("backward", launch.sizes) is not None:
            wanted = dbias if bias is not None and bias_grad else None
            launch_one_pass(launch, q, k, v, bias, out, grad, lse, dq, dk, dv, wanted)
            return dq, dk, dv, dbias, drel_h, drel_w
        delta, rel = torch.empty_like(lse), _rel_logits(launch, q, tables)
        drel = None if rel is None else torch.empty_like(rel)
        launch_dq(launch, q, k, v, bias, rel, out, grad, lse, dq, drel, delta, grad_lse)
        launch_dkv(launch, q, k, v, bias, rel, grad, lse, delta, dk, dv)
        if bias is not None and bias_grad:
            launch_dbias(launch, q, k, v, bias, grad, lse, delta, dbias)
        if tables is not None:
            sums = halo_logits_backward(q, tables, drel, dq, _per_block(launch.pattern), launch.table_precision)
            drel_h.copy_(sums[0])
            drel_w.copy_(sums[1])
    return dq, dk, dv, dbias, drel_h, drel_w


def _empty_tables(q: Tensor, *tables: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in tables)


@_backward.register_fake
def _(q, k, v, bias, rel_h, rel_w, out, lse, grad, grad_lse, bias_grad, *pattern):
    return *separate(q, k, v), *_empty_tables(q, bias if bias_grad else None, rel_h, rel_w)


refuse_second_derivative(_backward, "local_attention")
call_backward = eager_backward(_backward, packed=True)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # most callers use no lse
    ctx.pattern = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output)


def _differentiate(ctx, grad, grad_lse):
    saved = ctx.saved_tensors  # read once: checkpointing refuses a second read
    grad = torch.zeros_like(saved[6]) if grad is None else grad  # of the output
    grads = call_backward(*saved, grad, grad_lse, ctx.needs_input_grad[3], *ctx.pattern)
    wanted = [t is not None and needed for t, needed in zip(saved[:6], ctx.needs_input_grad, strict=False)]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None for _ in ctx.pattern)


call_forward = eager_forward(_forward, _save, _differentiate)


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
    return call_forward(q, k, v, bias, rel_h, rel_w, *fields(pattern), scale)[0]


def local_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend as `local_attention` does, and return the log-sum-exp of the logits too, (B, H, W, heads) fp32."""
    rel_h, rel_w = (None, None) if tables is None else tables
    out, lse = call_forward(q, k, v, bias, rel_h, rel_w, *fields(pattern), scale)
    return out, (lse * math.log(2)).permute(0, 2, 3, 1)


@lru_cache(maxsize=1024)
def fields(p: Pattern) -> tuple:
    """The arguments of the ops that `_pattern` makes a pattern of."""
    return p.kind, p.keys, p.reach, p.stride, p.dilation, p.causal, p.shift
