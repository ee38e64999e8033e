"""softmax(q k^T + bias) v, spelled out, becomes torch's fused attention; smaller passes over memory merge."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .graphs import Captured, argument, aten, calls, dtype, inputs, shape, sole_user, terms

MOST_HEAD_DIM = 256  # wider products are no attention over tokens: torch's kernel is slow there
_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def fuse_attention(captured: Captured) -> int:
    """Find softmax over the product of two tensors, with constants added between, times a third."""
    return sum(_fuse(captured, node) for node in calls(captured.graph, aten.softmax.int))


def _fuse(captured: Captured, softmax: fx.Node) -> bool:
    out = sole_user(softmax)
    if out is None or out.target not in _PRODUCTS or inputs(out)[0] is not softmax:
        return False
    if argument(softmax, 1, "dim") not in (-1, len(shape(softmax)) - 1) or argument(softmax, 2, "dtype") is not None:
        return False
    between, logits = _walk_to_product(softmax)
    if logits is None or len(shape(logits)) not in (3, 4) or shape(softmax) != shape(logits):
        return False
    q, k = inputs(logits)
    v = inputs(out)[1]
    if k.target not in (aten.transpose.int, aten.permute.default, aten.mT.default) or shape(q)[-1] > MOST_HEAD_DIM:
        return False
    if shape(v)[-1] > MOST_HEAD_DIM or not (len(shape(q)) == len(shape(k)) == len(shape(v))):
        return False
    q, scale = _scale_of(q)
    bias = _bias(captured, between, logits)
    with captured.graph.inserting_before(out):
        keys = captured.call(aten.transpose.int, k, -2, -1, like=k)
        constant = None if bias is None else captured.constant(bias)
        captured.replace(out, captured.call(attend, q, keys, v, constant, scale, like=out))
    return True


def _walk_to_product(softmax: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The nodes between the product and the softmax, first to last: views and sums with constants only."""
    between: list[fx.Node] = []
    node, user = inputs(softmax)[0], softmax
    while isinstance(node, fx.Node) and sole_user(node) is user:
        if node.target in _PRODUCTS:
            return between[::-1], node
        if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            inner = [t for t in inputs(node) if isinstance(t, fx.Node) and t.op != "get_attr"]
        elif node.target in _VIEWS:
            inner = [t for t in inputs(node) if isinstance(t, fx.Node)]
        else:
            break
        if len(inner) != 1:
            break
        between.append(node)
        node, user = inner[0], node
    return between, None


def _scale_of(q: fx.Node) -> tuple[fx.Node, float]:
    if q.target is aten.mul.Tensor and isinstance(inputs(q)[1], int | float):
        return inputs(q)[0], float(inputs(q)[1])
    return q, 1.0


def _bias(captured: Captured, between: list[fx.Node], logits: fx.Node) -> Tensor | None:
    """What is added to the logits, by adding it to zeros; one image's where all have the same."""
    if not any(node.target is aten.add.Tensor for node in between):
        return None
    total = torch.zeros(shape(logits), dtype=dtype(logits))
    inner = logits
    for node in between:
        args = fx.node.map_arg(inputs(node), partial(_at, captured, inner, total))
        operation: Any = node.target
        total, inner = operation(*args), node
    first = total[:1]
    return first.clone() if len(total) > 1 and torch.equal(first.expand_as(total), total) else total


def _at(captured: Captured, inner: fx.Node, total: Tensor, node: fx.Node) -> Tensor | None:
    return total if node is inner else captured.value(node)


def multiply_and_add(captured: Captured) -> int:
    """a * b + c in one pass."""
    merged = 0
    for node in calls(captured.graph, aten.add.Tensor):
        for product, rest in terms(node):
            if product.target is aten.mul.Tensor and sole_user(product) is node and shape(rest) == shape(node):
                if all(isinstance(t, fx.Node) for t in inputs(product)) and dtype(product) == dtype(rest):
                    with captured.graph.inserting_before(node):
                        captured.replace(node, captured.call(torch.addcmul, rest, *inputs(product), like=node))
                    merged += 1
                    break
    return merged
