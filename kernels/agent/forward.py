"""Agent attention, forward (Triton): few agents gather from all keys, and all queries read from the agents.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention).
Tensors    q, out: (B, Nq, heads, D); k, v: (B, Nk, heads, D); agents, gathered values: (B, n, heads, D); of any
           strides, and so are the biases.
Grid       one pass: B * heads. Else B * heads * splits of the keys * blocks of agents; then of tiles of queries.
Numerics   logits, softmax and sums in fp32; gathered values are rounded once to the dtype of v; exp2.
Memory     no logits reach HBM. In one pass agents and gathered values stay on chip; otherwise n * D gathered values a
           head, and fp32 parts of them for splits, go through the L2 cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, eager_forward, on_device
from .backward import call_backward
from .plan import Plan, constants, make_plan
from .tiles import attend_step, load_bias, load_rows, program, store_rows

LOG2_E = math.log2(math.e)


@triton.jit
def gather(
    t, k_ptr, v_ptr, bias_ptr, k_strides, v_strides, bias_strides, scale_log2, image, head, a, agents,
    start, stop, keys, HAS_BIAS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Values that a block of agents gathers from keys `start` to `stop`, [BLOCK, PAD] fp32, and its log-sum-exp."""
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, PAD), tl.float32)
    for first in range(start, stop, TILE):
        n = first + tl.arange(0, TILE)
        k = load_rows(k_ptr, k_strides, image, head, n, keys, DIM, PAD)  # [N, D]
        v = load_rows(v_ptr, v_strides, image, head, n, keys, DIM, PAD)
        if HAS_BIAS:
            bias = load_bias(bias_ptr, bias_strides, head, a, agents, n, keys)
        else:
            bias = 0.0
        top, total, acc = attend_step(t, k, v, bias, n < keys, scale_log2, top, total, acc, PRECISION)
    return acc / total[:, None], top + tl.log2(total)


@triton.jit
def one_pass_kernel(
    q_ptr, k_ptr, v_ptr, agents_ptr, to_ptr, from_ptr, out_ptr, lse_ptr, gathered_ptr, gathered_lse_ptr,
    q_strides, k_strides, v_strides, agents_strides, to_strides, from_strides, out_strides, gathered_strides,
    scale_log2, heads, agents, queries, keys,
    HAS_TO: tl.constexpr, HAS_FROM: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head, _ = program(heads, 1)
    a = tl.arange(0, BLOCK)
    t = load_rows(agents_ptr, agents_strides, image, head, a, agents, DIM, PAD)  # [A, D]
    values, lse = gather(
        t, k_ptr, v_ptr, to_ptr, k_strides, v_strides, to_strides, scale_log2, image, head, a, agents, 0, keys, keys,
        HAS_TO, DIM, PAD, BLOCK, TILE, PRECISION,
    )  # fmt: skip
    store_rows(gathered_ptr, values, gathered_strides, image, head, a, agents, DIM, PAD)  # for the backward pass
    tl.store(gathered_lse_ptr + (image * heads + head) * agents + a, lse, mask=a < agents)
    values = values.to(v_ptr.dtype.element_ty)
    lse_ptr += (image * heads + head) * queries
    for first in range(0, queries, TILE):
        m = first + tl.arange(0, TILE)
        q = load_rows(q_ptr, q_strides, image, head, m, queries, DIM, PAD)  # [M, D]
        if HAS_FROM:
            bias = load_bias(from_ptr, from_strides, head, m, queries, a, agents)
        else:
            bias = 0.0
        top, total, acc = attend_step(
            q, t, values, bias, a < agents, scale_log2,
            tl.full((TILE,), -1e30, tl.float32), tl.zeros((TILE,), tl.float32), tl.zeros((TILE, PAD), tl.float32),
            PRECISION,
        )  # fmt: skip
        store_rows(out_ptr, acc / total[:, None], out_strides, image, head, m, queries, DIM, PAD)
        tl.store(lse_ptr + m, top + tl.log2(total), mask=m < queries)


@triton.jit
def gather_kernel(
    k_ptr, v_ptr, agents_ptr, bias_ptr, parts_ptr, lse_ptr,
    k_strides, v_strides, agents_strides, bias_strides, parts_strides,
    scale_log2, images, heads, agents, keys, chunk, splits,
    HAS_BIAS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(agents, BLOCK)
    image, head, part = program(heads, splits * blocks)
    split = part // blocks
    a = part % blocks * BLOCK + tl.arange(0, BLOCK)
    t = load_rows(agents_ptr, agents_strides, image, head, a, agents, DIM, PAD)
    stop = tl.minimum((split + 1) * chunk, keys)
    values, lse = gather(
        t, k_ptr, v_ptr, bias_ptr, k_strides, v_strides, bias_strides, scale_log2, image, head, a, agents,
        split * chunk, stop, keys, HAS_BIAS, DIM, PAD, BLOCK, TILE, PRECISION,
    )  # fmt: skip
    place = split * images + image
    store_rows(parts_ptr, values, parts_strides, place, head, a, agents, DIM, PAD)
    tl.store(lse_ptr + (place * heads + head) * agents + a, lse, mask=a < agents)


@triton.jit
def combine_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, parts_strides, out_strides, images, heads, agents, splits,
    DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join what a block of agents gathered from the splits of the keys."""
    blocks = tl.cdiv(agents, BLOCK)
    image, head, block = program(heads, blocks)
    a = block * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, PAD), tl.float32)
    for split in range(splits):
        place = split * images + image
        lse = tl.load(part_lse_ptr + (place * heads + head) * agents + a, mask=a < agents, other=0.0)
        part = load_rows(parts_ptr, parts_strides, place, head, a, agents, DIM, PAD)
        new_top = tl.maximum(top, lse)
        shrink, share = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        total = total * shrink + share
        acc = acc * shrink[:, None] + part * share[:, None]
        top = new_top
    store_rows(out_ptr, acc / total[:, None], out_strides, image, head, a, agents, DIM, PAD)
    tl.store(lse_ptr + (image * heads + head) * agents + a, top + tl.log2(total), mask=a < agents)


@triton.jit
def read_kernel(
    q_ptr, agents_ptr, gathered_ptr, bias_ptr, out_ptr, lse_ptr,
    q_strides, agents_strides, gathered_strides, bias_strides, out_strides,
    scale_log2, heads, agents, queries,
    HAS_BIAS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    image, head, tile = program(heads, tl.cdiv(queries, TILE))
    m = tile * TILE + tl.arange(0, TILE)
    q = load_rows(q_ptr, q_strides, image, head, m, queries, DIM, PAD)
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, PAD), tl.float32)
    for first in range(0, agents, BLOCK):
        a = first + tl.arange(0, BLOCK)
        t = load_rows(agents_ptr, agents_strides, image, head, a, agents, DIM, PAD)
        values = load_rows(gathered_ptr, gathered_strides, image, head, a, agents, DIM, PAD)
        if HAS_BIAS:
            bias = load_bias(bias_ptr, bias_strides, head, m, queries, a, agents)
        else:
            bias = 0.0
        top, total, acc = attend_step(q, t, values, bias, a < agents, scale_log2, top, total, acc, PRECISION)
    store_rows(out_ptr, acc / total[:, None], out_strides, image, head, m, queries, DIM, PAD)
    tl.store(lse_ptr + (image * heads + head) * queries + m, top + tl.log2(total), mask=m < queries)


def launch_one_pass(plan: Plan, q, k, v, agents, bias_to, bias_from, out, lse, gathered, gathered_lse, scale) -> None:
    to, of = q if bias_to is None else bias_to, q if bias_from is None else bias_from
    one_pass_kernel[(plan.images * plan.heads,)](
        q, k, v, agents, to, of, out, lse, gathered, gathered_lse,
        q.stride(), k.stride(), v.stride(), agents.stride(), to.stride(), of.stride(), out.stride(), gathered.stride(),
        scale * LOG2_E, plan.heads, plan.agents, plan.queries, plan.keys,
        HAS_TO=bias_to is not None, HAS_FROM=bias_from is not None, num_stages=2, **constants(q, plan),
    )  # fmt: skip


def launch_gather(plan: Plan, k, v, agents, bias, gathered, lse, scale) -> None:
    """Write what the agents gather; long sums over keys are made in splits, which are joined in a fixed order."""
    splits, chunk = plan.splits(plan.keys)
    parts, part_lse = gathered, lse
    if splits > 1:
        parts = k.new_empty(splits * plan.images, *gathered.shape[1:], dtype=torch.float32)
        part_lse = k.new_empty(splits * plan.images, *lse.shape[1:], dtype=torch.float32)
    given, heads = k if bias is None else bias, plan.images * plan.heads * plan.blocks
    gather_kernel[(heads * splits,)](
        k, v, agents, given, parts, part_lse,
        k.stride(), v.stride(), agents.stride(), given.stride(), parts.stride(),
        scale * LOG2_E, plan.images, plan.heads, plan.agents, plan.keys, chunk, splits,
        HAS_BIAS=bias is not None, num_stages=2, **constants(k, plan),
    )  # fmt: skip
    if splits > 1:
        shape = {name: value for name, value in constants(k, plan).items() if name not in ("TILE", "PRECISION")}
        combine_kernel[(heads,)](
            parts, part_lse, gathered, lse, parts.stride(), gathered.stride(),
            plan.images, plan.heads, plan.agents, splits, **shape,
        )  # fmt: skip


def launch_read(plan: Plan, q, agents, gathered, bias, out, lse, scale) -> None:
    given = q if bias is None else bias
    read_kernel[(plan.images * plan.heads * cdiv(plan.queries, plan.tile),)](
        q, agents, gathered, given, out, lse,
        q.stride(), agents.stride(), gathered.stride(), given.stride(), out.stride(),
        scale * LOG2_E, plan.heads, plan.agents, plan.queries,
        HAS_BIAS=bias is not None, num_stages=2, **constants(q, plan),
    )  # fmt: skip


@torch.library.custom_op("foveate::agent_attention_forward", mutates_args=())
def agent_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out, the log-sum-exp of the queries (B, heads, Nq), gathered values, and that of the agents (B, heads, n).

    out and gathered values are contiguous, the log-sum-exps fp32, base 2.
    """
    out, lse, gathered, gathered_lse = _empty_results(q, agents)
    if out.numel():
        plan = make_plan(q, k, agents)
        with on_device(q):
            if plan.one_pass:
                launch_one_pass(plan, q, k, v, agents, bias_to, bias_from, out, lse, gathered, gathered_lse, scale)
            else:
                launch_gather(plan, k, v, agents, bias_to, gathered, gathered_lse, scale)
                launch_read(plan, q, agents, gathered, bias_from, out, lse, scale)
    return out, lse, gathered, gathered_lse


def _empty_results(q: Tensor, agents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    count = agents.shape[1]
    return (
        q.new_empty(q.shape),
        q.new_empty(batch, heads, queries, dtype=torch.float32),
        q.new_empty(agents.shape),
        q.new_empty(batch, heads, count, dtype=torch.float32),
    )


@agent_attention_forward.register_fake
def _(q, k, v, agents, bias_to, bias_from, scale):
    return _empty_results(q, agents)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad, *_):
    saved = ctx.saved_tensors  # read once: checkpointing refuses a second read
    grad = torch.zeros_like(saved[6]) if grad is None else grad
    grads = call_backward(*saved, grad, *ctx.needs_input_grad[4:6], ctx.scale)
    wanted = [t is not None and needed for t, needed in zip(saved[:6], ctx.needs_input_grad, strict=False)]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None


agent_attention = eager_forward(agent_attention_forward, _save, _differentiate)
