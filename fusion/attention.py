"""softmax(scale q k^T + bias) v, spelled out, becomes torch's fused attention; smaller passes over memory merge."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..attention_ops._op import OPS
from ..attention_ops.neighborhood_cpu import Neighborhood, neighborhood_attention_biased, tile_biases
from .graphs import Captured, argument, aten, calls, dtype, inputs, shape, sole_user, terms

MOST_BIAS = 2**22  # numbers of a layer's bias tiles that are kept; larger maps make them at every call
MOST_HEAD_DIM = 256  # wider products are no attention over tokens: torch's kernel is slow there
_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints)
_TILED = ("auto", "tiled")
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def fuse_attention(captured: Captured) -> int:
    """Find softmax over the product of two tensors, scaled, with biases added, times a third."""
    return sum(_fuse(captured, node) for node in calls(captured.graph, aten.softmax.int))


def _fuse(captured: Captured, softmax: fx.Node) -> bool:
    out = sole_user(softmax)
    if out is None or out.target not in _PRODUCTS or inputs(out)[0] is not softmax:
        return False
    if argument(softmax, 1, "dim") not in (-1, len(shape(softmax)) - 1) or argument(softmax, 2, "dtype") is not None:
        return False
    logits, between = _walk_to_product(softmax)
    if logits is None or len(shape(logits)) not in (3, 4) or shape(softmax) != shape(logits):
        return False
    (product, factor), v = _unscaled(logits), inputs(out)[1]
    q, k = inputs(product)
    if k.target not in (aten.transpose.int, aten.permute.default, aten.mT.default) or shape(q)[-1] > MOST_HEAD_DIM:
        return False
    if shape(v)[-1] > MOST_HEAD_DIM or not (len(shape(q)) == len(shape(k)) == len(shape(v))):
        return False
    q, scale = _unscaled(q)
    with captured.graph.inserting_before(out):
        keys = captured.call(aten.transpose.int, k, -2, -1, like=k)
        bias = _bias(captured, between, logits)
        captured.replace(out, captured.call(attend, q, keys, v, bias, scale * factor, like=out))
    return True


def _walk_to_product(softmax: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The product, or its multiple, under a softmax, and the sums and views between, first to last."""
    between: list[fx.Node] = []
    node, user = inputs(softmax)[0], softmax
    while isinstance(node, fx.Node) and sole_user(node) is user:
        if _is_product(node):
            return node, between[::-1]
        inner = inputs(node)[0] if node.target in _VIEWS else _logits_in(node, between)
        if inner is None:
            break
        between.append(node)
        node, user = inner, node
    return None, between


def _logits_in(node: fx.Node, after: list[fx.Node]) -> fx.Node | None:
    """The logits in a sum with a bias. A bias that depends on the image is the first, and no views come after it."""
    for logits, bias in terms(node):
        if bias.op == "get_attr":
            return logits
        if _is_product(logits) and len(shape(bias)) == len(shape(node)) and dtype(bias) == dtype(node):
            return None if any(later.target in _VIEWS for later in after) else logits
    return None


def _is_product(node: fx.Node) -> bool:
    product = _unscaled(node)[0]
    return product.target in _PRODUCTS and (product is node or sole_user(product) is node)


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """A tensor and the number by which a node multiplies it."""
    if node.target is aten.mul.Tensor and isinstance(inputs(node)[1], int | float):
        return inputs(node)[0], float(inputs(node)[1])
    return node, 1.0


def _bias(captured: Captured, between: list[fx.Node], logits: fx.Node) -> fx.Node | None:
    """What is added to the logits, at the insertion point."""
    varying = None
    if between and between[0].target is aten.add.Tensor:
        varying = next((b for a, b in terms(between[0]) if a is logits and b.op != "get_attr"), None)
    if varying is not None:
        logits, between = between[0], between[1:]
    if not any(node.target is aten.add.Tensor for node in between):
        return varying
    constant = captured.constant(_constant_bias(captured, between, logits))
    return constant if varying is None else captured.call(aten.add.Tensor, varying, constant, like=logits)


def _constant_bias(captured: Captured, between: list[fx.Node], logits: fx.Node) -> Tensor:
    """What is added to the logits, by adding it to zeros; one image's where all have the same."""
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


def lay_out_biases(captured: Captured) -> int:
    """Make the tiles of constant position biases once, where neighborhood attention makes them at every call."""
    op, done = OPS["neighborhood_attention"], 0
    for node in calls(captured.graph, torch.ops.foveate.neighborhood_attention.default):
        arguments = op.bind(*node.args, **node.kwargs)
        q, k, v, rpb = (arguments[name] for name in ("q", "k", "v", "rpb"))
        neighborhood = Neighborhood(**{name: arguments[name] for name in Neighborhood._fields})
        if rpb is None or captured.value(rpb) is None or arguments["impl"] not in _TILED:
            continue
        found = tile_biases(q.meta["val"], captured.held(rpb), neighborhood, MOST_BIAS)
        if found is None:
            continue
        scale = shape(q)[-1] ** -0.5 if arguments["scale"] is None else arguments["scale"]
        with captured.graph.inserting_before(node):
            biases = [captured.constant(tensor) for tensor in found]
            new = captured.call(neighborhood_attention_biased, q, k, v, *biases, neighborhood, scale, like=node)
            captured.replace(node, new)
        done += 1
    return done


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
