"""Agent attention, backward (Triton): two walks over the tokens, the queries' and then the keys'.

Paper      Han et al. 2023, arXiv:2312.08874 (Agent Attention).
Tensors    as in the forward pass; dgathered: (B, n, heads, D) fp32, the gradient of the gathered values.
Grid       B * heads * splits of the queries, or of the keys, once for each block of agents. Biases: heads * tiles of
           tokens * blocks of agents * shares of the images.
Numerics   fp32 inside, one rounding on store; no atomics, so a run gives the bits of the last one.
Memory     no logits reach HBM. With several blocks of agents, dq, dk and dv are summed in fp32, block by block. Splits
           and shares write fp32 parts: of agents' gradients, and of the biases' gradients.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import cdiv, eager_backward, on_device, refuse_second_derivative, without_autocast
from .plan import Plan, constants, make_plan, part_of
from .tiles import gradient_step, load_bias, load_rows, logit_gradients, program, store_rows

LOG2_E = math.log2(math.e)


@triton.jit
def queries_kernel(
    q_ptr, agents_ptr, gathered_ptr, bias_ptr, out_ptr, grad_ptr, lse_ptr, dq_ptr, dagents_ptr, dgathered_ptr,
    q_strides, agents_strides, gathered_strides, bias_strides, out_strides, grad_strides, dq_strides, part_strides,
    scale, scale_log2, images, heads, agents, queries, first_agent, chunk, splits,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head, split = program(heads, splits)
    a = first_agent + tl.arange(0, BLOCK)
    t = load_rows(agents_ptr, agents_strides, image, head, a, agents, DIM, PAD)  # [A, D]
    values = load_rows(gathered_ptr, gathered_strides, image, head, a, agents, DIM, PAD)
    dt = tl.zeros((BLOCK, PAD), tl.float32)
    dvalues = tl.zeros((BLOCK, PAD), tl.float32)
    lse_ptr += (image * heads + head) * queries
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, queries), TILE):
        m = first + tl.arange(0, TILE)
        q = load_rows(q_ptr, q_strides, image, head, m, queries, DIM, PAD)  # [M, D]
        grad = load_rows(grad_ptr, grad_strides, image, head, m, queries, DIM, PAD)
        out = load_rows(out_ptr, out_strides, image, head, m, queries, DIM, PAD)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        lse = tl.load(lse_ptr + m, mask=m < queries, other=float("inf"))  # exp2(-inf): no share
        if HAS_BIAS:
            bias = load_bias(bias_ptr, bias_strides, head, m, queries, a, agents)
        else:
            bias = 0.0
        probs, dlogits = gradient_step(
            q, t, grad, values, bias, (a < agents)[None, :], lse[:, None], delta[:, None], scale_log2, PRECISION
        )  # [M, A]
        dvalues = tl.dot(tl.trans(probs.to(grad.dtype)), grad, dvalues, input_precision=PRECISION)
        rounded = dlogits.to(q.dtype)
        dt = tl.dot(tl.trans(rounded), q, dt, input_precision=PRECISION)
        dq = tl.dot(rounded, t, input_precision=PRECISION) * scale
        if ADD:
            dq += load_rows(dq_ptr, dq_strides, image, head, m, queries, DIM, PAD)
        store_rows(dq_ptr, dq, dq_strides, image, head, m, queries, DIM, PAD)
    place = split * images + image
    store_rows(dagents_ptr, dt * scale, part_strides, place, head, a, agents, DIM, PAD)
    store_rows(dgathered_ptr, dvalues, part_strides, place, head, a, agents, DIM, PAD)


@triton.jit
def keys_kernel(
    k_ptr, v_ptr, agents_ptr, gathered_ptr, dgathered_ptr, bias_ptr, lse_ptr, dk_ptr, dv_ptr, dagents_ptr,
    k_strides, v_strides, agents_strides, gathered_strides, dgathered_strides, bias_strides, dk_strides, dv_strides,
    part_strides, scale, scale_log2, images, heads, agents, keys, first_agent, chunk, splits,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head, split = program(heads, splits)
    a = first_agent + tl.arange(0, BLOCK)
    t = load_rows(agents_ptr, agents_strides, image, head, a, agents, DIM, PAD)  # [A, D]
    values = load_rows(gathered_ptr, gathered_strides, image, head, a, agents, DIM, PAD)
    dvalues = load_rows(dgathered_ptr, dgathered_strides, image, head, a, agents, DIM, PAD)  # fp32
    delta = tl.sum(dvalues * values.to(tl.float32), 1)
    dvalues = dvalues.to(v_ptr.dtype.element_ty)
    lse = tl.load(lse_ptr + (image * heads + head) * agents + a, mask=a < agents, other=float("inf"))
    dt = tl.zeros((BLOCK, PAD), tl.float32)
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, keys), TILE):
        n = first + tl.arange(0, TILE)
        k = load_rows(k_ptr, k_strides, image, head, n, keys, DIM, PAD)  # [N, D]
        v = load_rows(v_ptr, v_strides, image, head, n, keys, DIM, PAD)
        if HAS_BIAS:
            bias = load_bias(bias_ptr, bias_strides, head, n, keys, a, agents)
        else:
            bias = 0.0
        probs, dlogits = gradient_step(
            k, t, v, dvalues, bias, (n < keys)[:, None], lse[None, :], delta[None, :], scale_log2, PRECISION
        )  # [N, A]
        dv = tl.dot(probs.to(v.dtype), dvalues, input_precision=PRECISION)
        rounded = dlogits.to(k.dtype)
        dk = tl.dot(rounded, t, input_precision=PRECISION) * scale
        dt = tl.dot(tl.trans(rounded), k, dt, input_precision=PRECISION)
        if ADD:
            dk += load_rows(dk_ptr, dk_strides, image, head, n, keys, DIM, PAD)
            dv += load_rows(dv_ptr, dv_strides, image, head, n, keys, DIM, PAD)
        store_rows(dk_ptr, dk, dk_strides, image, head, n, keys, DIM, PAD)
        store_rows(dv_ptr, dv, dv_strides, image, head, n, keys, DIM, PAD)
    store_rows(dagents_ptr, dt * scale, part_strides, split * images + image, head, a, agents, DIM, PAD)


@triton.jit
def bias_gradient_kernel(
    x_ptr, agents_ptr, gathered_ptr, dgathered_ptr, other_ptr, out_ptr, lse_ptr, bias_ptr, sums_ptr,
    x_strides, agents_strides, gathered_strides, dgathered_strides, other_strides, out_strides, bias_strides,
    sums_strides, scale_log2, images, heads, agents, tokens, shares,
    OF_KEYS: tl.constexpr, PART: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum a tile of logit gradients, [tokens, agents], over a share of the images.

    x and other: k and v (OF_KEYS), or q and the gradient of out. PART: channels of a step.
    """
    blocks, pid = tl.cdiv(agents, BLOCK), tl.program_id(0)
    share, block = pid % shares, pid // shares % blocks
    head, tile = pid // (shares * blocks) % heads, pid // (shares * blocks * heads)
    a, n = block * BLOCK + tl.arange(0, BLOCK), tile * TILE + tl.arange(0, TILE)
    bias = load_bias(bias_ptr, bias_strides, head, n, tokens, a, agents)
    seen = (n < tokens)[:, None] & (a < agents)[None, :]
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for number in range(share, images, shares):
        image = tl.cast(number, tl.int64)
        logits, dprobs = tl.zeros((TILE, BLOCK), tl.float32), tl.zeros((TILE, BLOCK), tl.float32)
        delta = tl.zeros((BLOCK if OF_KEYS else TILE,), tl.float32)
        for first in range(0, PAD, PART):
            x = load_rows(x_ptr, x_strides, image, head, n, tokens, DIM, PART, first)
            t = load_rows(agents_ptr, agents_strides, image, head, a, agents, DIM, PART, first)
            values = load_rows(gathered_ptr, gathered_strides, image, head, a, agents, DIM, PART, first)
            other = load_rows(other_ptr, other_strides, image, head, n, tokens, DIM, PART, first)
            if OF_KEYS:
                dvalues = load_rows(dgathered_ptr, dgathered_strides, image, head, a, agents, DIM, PART, first)
                delta += tl.sum(dvalues * values.to(tl.float32), 1)
                values = dvalues.to(values.dtype)
            else:
                out = load_rows(out_ptr, out_strides, image, head, n, tokens, DIM, PART, first)
                delta += tl.sum(out.to(tl.float32) * other.to(tl.float32), 1)
            logits = tl.dot(x, tl.trans(t), logits, input_precision=PRECISION)
            dprobs = tl.dot(other, tl.trans(values), dprobs, input_precision=PRECISION)
        if OF_KEYS:
            places = lse_ptr + (image * heads + head) * agents + a
            lse, delta = tl.load(places, mask=a < agents, other=float("inf"))[None, :], delta[None, :]
        else:
            places = lse_ptr + (image * heads + head) * tokens + n
            lse, delta = tl.load(places, mask=n < tokens, other=float("inf"))[:, None], delta[:, None]
        _, dlogits = logit_gradients(logits, dprobs, bias, seen, lse, delta, scale_log2)
        total += dlogits
    sums_ptr += (share * heads + head).to(tl.int64) * sums_strides[0]
    offs = n[:, None].to(tl.int64) * sums_strides[1] + (a * sums_strides[2])[None, :]
    tl.store(sums_ptr + offs, total, mask=seen)


def launch_queries(plan: Plan, q, agents, gathered, bias, out, grad, lse, dq, parts, first_agent, scale) -> None:
    """Write the gradients of the queries, and parts (splits, B, n, heads, D) of those of agents and gathered values."""
    given, (splits, chunk) = q if bias is None else bias, plan.splits(plan.queries)
    queries_kernel[(plan.images * plan.heads * splits,)](
        q, agents, gathered, given, out, grad, lse, dq, *parts,
        q.stride(), agents.stride(), gathered.stride(), given.stride(), out.stride(), grad.stride(), dq.stride(),
        parts[0].stride()[1:], scale, scale * LOG2_E, plan.images, plan.heads, plan.agents, plan.queries, first_agent,
        chunk, splits, HAS_BIAS=bias is not None, ADD=first_agent > 0, num_stages=1, **constants(q, plan, back=True),
    )  # fmt: skip


def launch_keys(plan: Plan, k, v, agents, gathered, dgathered, bias, lse, dk, dv, part, first_agent, scale) -> None:
    """Write the gradients of keys and values, and parts (splits, B, n, heads, D) of those of the agents."""
    given, (splits, chunk) = k if bias is None else bias.mT, plan.splits(plan.keys)
    keys_kernel[(plan.images * plan.heads * splits,)](
        k, v, agents, gathered, dgathered, given, lse, dk, dv, part,
        k.stride(), v.stride(), agents.stride(), gathered.stride(), dgathered.stride(), given.stride(), dk.stride(),
        dv.stride(), part.stride()[1:], scale, scale * LOG2_E, plan.images, plan.heads, plan.agents, plan.keys,
        first_agent, chunk, splits, HAS_BIAS=bias is not None, ADD=first_agent > 0, num_stages=1,
        **constants(k, plan, back=True),
    )  # fmt: skip


def launch_bias_gradient(
    plan: Plan, x, other, agents, gathered, dgathered, out, lse, bias, scale, of_keys: bool
) -> Tensor:
    """Return the gradient of a bias given as (heads, tokens, n): of keys, or of queries."""
    tokens = x.shape[1]
    shares = plan.shares(tokens)
    sums = x.new_empty(shares, plan.heads, tokens, plan.agents, dtype=torch.float32)
    grid = (cdiv(tokens, plan.back_tile) * plan.heads * plan.back_blocks * shares,)
    bias_gradient_kernel[grid](
        x, agents, gathered, dgathered, other, out, lse, bias, sums,
        x.stride(), agents.stride(), gathered.stride(), dgathered.stride(), other.stride(), out.stride(),
        bias.stride(), sums.stride()[1:], scale * LOG2_E, plan.images, plan.heads, plan.agents, tokens, shares,
        OF_KEYS=of_keys, PART=part_of(x), num_stages=1, **constants(x, plan, back=True),
    )  # fmt: skip
    return sums.sum(0).to(bias.dtype)


@torch.library.custom_op("foveate::agent_attention_backward", mutates_args=())
@without_autocast
def agent_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, bias_to: Tensor | None, bias_from: Tensor | None,
    out: Tensor, lse: Tensor, gathered: Tensor, gathered_lse: Tensor, grad: Tensor,
    to_grad: bool, from_grad: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of q, k, v, agents, bias_to, bias_from; an empty tensor for a bias not given or not needed."""
    if not q.numel():
        found = _empty_gradients(q, k, v, agents, bias_to if to_grad else None, bias_from if from_grad else None)
        dq, dk, dv, dagents, dto, dfrom = (t.zero_() for t in found)
        return dq, dk, dv, dagents, dto, dfrom
    plan, wide = make_plan(q, k, agents), torch.float32
    dq, dk, dv = (x.new_empty(x.shape, dtype=x.dtype if plan.back_blocks == 1 else wide) for x in (q, k, v))
    parts = [q.new_empty(plan.splits(plan.queries)[0], *agents.shape, dtype=wide) for _ in range(2)]
    part_of_keys = q.new_empty(plan.splits(plan.keys)[0], *agents.shape, dtype=wide)
    firsts = range(0, plan.agents, plan.back_block)
    dto, dfrom = q.new_empty(0), q.new_empty(0)
    with on_device(q):
        for first in firsts:
            launch_queries(plan, q, agents, gathered, bias_from, out, grad, lse, dq, parts, first, scale)
        dgathered = parts[1].sum(0)
        for first in firsts:
            launch_keys(
                plan, k, v, agents, gathered, dgathered, bias_to, gathered_lse, dk, dv, part_of_keys, first, scale
            )
        if bias_from is not None and from_grad:
            dfrom = launch_bias_gradient(
                plan, q, grad, agents, gathered, dgathered, out, lse, bias_from, scale, of_keys=False
            )
        if bias_to is not None and to_grad:
            dto = launch_bias_gradient(
                plan, k, v, agents, gathered, dgathered, out, gathered_lse, bias_to.mT, scale, of_keys=True
            ).mT.contiguous()
    dagents = (parts[0].sum(0) + part_of_keys.sum(0)).to(agents.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dagents, dto, dfrom


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    maps = (x.new_empty(x.shape) for x in (q, k, v, agents))
    return *maps, *(q.new_empty(0) if bias is None else bias.new_empty(bias.shape) for bias in biases)


@agent_attention_backward.register_fake
def _(q, k, v, agents, bias_to, bias_from, out, lse, gathered, gathered_lse, grad, to_grad, from_grad, scale):
    return _empty_gradients(q, k, v, agents, bias_to if to_grad else None, bias_from if from_grad else None)


refuse_second_derivative(agent_attention_backward, "agent_attention")
call_backward = eager_backward(agent_attention_backward)
