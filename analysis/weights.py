"""What one of our ops multiplies values with: the derivative of its reference body, which is linear in the values.

Local ops pull many queries at once: two queries whose keys cannot be the same share a channel of the values.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_ops._attend import accumulator
from ..attention_ops._op import OPS, Impl
from .capture import Part


def value_weights(op: str, part: Part, rows: Tensor) -> Tensor:
    """Return the weights of all values for the queries `rows`: (B, heads, rows, keys).

    out[query, channel] = sum over keys of P[query, key] * values[key, channel], so that the gradient of out[rows[c], c]
    by values[:, c] is P[rows[c]].

    Cost: one forward pass of the reference body, and one backward pass per head_dim queries; for local ops, per
    head_dim sets of queries that lie apart.
    """
    wide = accumulator(part.q.dtype)
    values = torch.zeros(part.v.shape, dtype=wide, device=part.v.device, requires_grad=True)
    arguments = {name: _widened(value, wide) for name, value in part.with_values(values).items()}
    with torch.enable_grad(), torch.autocast(part.v.device.type, enabled=False):
        out = OPS[op](**arguments | {"impl": Impl.REFERENCE.value})
    out, rows = out[0] if isinstance(out, tuple) else out, rows.to(part.v.device)
    heads = part.heads.stop - part.heads.start
    alone = part.v.shape[-2] == heads  # every query head has a key head of its own: all at once
    found = out.new_zeros(len(out), heads, len(rows), values.flatten(1, -3).shape[1])
    reach = reach_of(op, arguments, part)
    for places, channels in _passes(rows, part, reach):
        if alone:
            pulled = _pulled(out, values, rows[places], part.heads, channels)
        else:
            own = range(part.heads.start, part.heads.stop)
            pulled = torch.stack([_pulled(out, values, rows[places], h, channels).sum(2) for h in own], 2)
        by_head = pulled.permute(0, 2, 3, 1)  # (B, heads, places, keys)
        found[:, :, places] = by_head if reach is None else by_head * _near(rows[places], part, reach)
    return found.detach()


def reach_of(op: str, arguments: dict[str, Any], part: Part) -> tuple[int, int] | None:
    """Return how far, in rows and columns, a key may lie from its query; None: anywhere, or not on the query's map."""
    if part.q.dim() != 5 or part.k.shape[1:-2] != part.q.shape[1:-2]:
        return None
    name = op.removesuffix("_lse")
    if name == "neighborhood_attention":
        sizes = zip(arguments["kernel_size"], arguments["stride"], arguments["dilation"], strict=True)
        rows, cols = ((kernel + stride - 2) * dilation for kernel, stride, dilation in sizes)
    elif name == "circle_attention" and arguments["cell_weight"] is None:
        rows = cols = arguments["radius"] - 1
    elif name == "halo_attention" and arguments["stride"] == 1:
        rows, cols = (b - 1 + h for b, h in zip(arguments["block_size"], arguments["halo"], strict=True))
    elif name == "window_attention" or part.branch == "high":
        rows, cols = (side - 1 for side in arguments["window_size"])
    elif part.branch == "local":
        rows, cols = (side // 2 for side in arguments["local_bias"].shape[1:])
    else:
        return None
    return int(rows), int(cols)


def _passes(rows: Tensor, part: Part, reach: tuple[int, int] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each backward pass, places in `rows` and the channel of each: a channel has queries that lie apart."""
    width = part.v.shape[-1]
    number = torch.arange(len(rows), device=rows.device)
    if reach is not None:
        row, col = rows // part.q.shape[2], rows % part.q.shape[2]
        apart = 2 * reach[0] + 1, 2 * reach[1] + 1
        number = torch.unique((row % apart[0]) * apart[1] + col % apart[1], return_inverse=True)[1]
    last = int(number.max()) // width if len(rows) else -1
    for i in range(last + 1):
        places = (number // width == i).nonzero().flatten()
        yield places, number[places] % width


def _near(rows: Tensor, part: Part, reach: tuple[int, int]) -> Tensor:
    """(rows, keys) bool: the keys of the map that lie in reach of each query."""
    size = part.q.shape[1:3]
    places = rows // size[1], rows % size[1]
    down, right = (
        (torch.arange(length, device=rows.device) - place[:, None]).abs() <= most
        for length, place, most in zip(size, places, reach, strict=True)
    )
    return (down[:, :, None] & right[:, None]).flatten(1)


def _pulled(out: Tensor, values: Tensor, rows: Tensor, heads: slice | int, channels: Tensor) -> Tensor:
    """The derivative of out[rows, heads, channels] by the values: (B, keys, heads of the values, rows)."""
    probe = torch.zeros(out.shape, dtype=out.dtype, device=out.device)
    probe.flatten(1, -3)[:, rows, heads, channels] = 1
    (grad,) = torch.autograd.grad(out, values, probe, retain_graph=True)
    return grad.flatten(1, -3)[..., channels]


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`, as they are without a graph; values, which have one, stay."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return [_widened(v, dtype) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.to(dtype)
    return value if not isinstance(value, nn.Parameter) else value.detach().to(dtype)
