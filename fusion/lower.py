"""Convolutions and products become oneDNN's, with the activation and the sum behind them in the same pass."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..attention_ops import _onednn as onednn
from ..attention_ops._onednn import NONE, POINT, RELU, RELU6, SILU, Activation, Place
from .fold import CONVOLUTIONS, LINEAR, is_layer
from .graphs import Captured, argument, aten, calls, dtype, inputs, is_read_later, owner, shape, sole_user

Chooser = Callable[[int, int, int, torch.dtype], bool]  # rows, inputs, outputs, dtype -> whether oneDNN multiplies
_ACTIVATIONS: dict[Any, Activation] = {
    aten.relu.default: RELU,
    aten.relu6.default: RELU6,
    aten.silu.default: SILU,
    aten.sigmoid.default: Activation("sigmoid"),
    aten.tanh.default: Activation("tanh"),
    aten.hardswish.default: Activation("hardswish"),
}


def lower(captured: Captured, takes_product: Chooser) -> Counter[str]:
    """Lower every convolution, and the products that `takes_product` accepts; count what was fused."""
    done: Counter[str] = Counter()
    for node in calls(captured.graph, *CONVOLUTIONS, LINEAR):
        if not is_layer(node, *node.users) or not onednn.works(dtype(node)):
            continue
        if node.target is LINEAR:
            *lead, outputs = shape(node)
            rows = torch.Size(lead).numel()
            if takes_product(rows, shape(inputs(node)[0])[-1], outputs, dtype(node)):
                _lower_product(captured, node, rows, done)
        elif (place := _place(node)) is not None:
            _lower_convolution(captured, node, place, done)
    return done


def _place(node: fx.Node) -> Place | None:
    padding = argument(node, 4, "padding", (0, 0))
    if isinstance(padding, str):
        return None
    pair = (_pair(argument(node, 3, "stride", 1)), _pair(argument(node, 5, "dilation", 1)))
    return Place(_pair(padding), pair[0], pair[1], argument(node, 6, "groups", 1))


def _pair(number: int | list[int]) -> tuple[int, int]:
    numbers = (number,) if isinstance(number, int) else tuple(number)
    return (numbers[0], numbers[-1])


def _lower_convolution(captured: Captured, node: fx.Node, place: Place, done: Counter[str]) -> None:
    kernel, size = captured.held(inputs(node)[1]), shape(inputs(node)[0])
    if _is_dilated_depthwise(kernel, place) and shape(node) == size:
        _lower_by_groups(captured, node, place, done)
        return
    weight = onednn.pack(kernel, place, size)
    done["convolution"] += 1
    _emit(captured, node, weight, (tuple(place),), (onednn.convolve, onednn.convolve_onto), done)


def _is_dilated_depthwise(kernel: torch.Tensor, place: Place) -> bool:
    """Say whether oneDNN has no fast kernel for a convolution, but has one for its dilation groups."""
    odd = kernel.shape[2] % 2 == 1 and kernel.shape[3] % 2 == 1
    return place.groups == len(kernel) and kernel.shape[1] == 1 and odd and max(place.dilation) > 1


def _lower_by_groups(captured: Captured, node: fx.Node, place: Place, done: Counter[str]) -> None:
    kernel, (batch, channels, *size) = captured.held(inputs(node)[1]), shape(inputs(node)[0])
    rows, cols = place.dilation
    inner = Place((kernel.shape[2] // 2, kernel.shape[3] // 2), (1, 1), (1, 1), channels)
    weight = onednn.pack(kernel, inner, (batch * rows * cols, channels, -(-size[0] // rows), -(-size[1] // cols)))
    done["convolution by dilation groups"] += 1
    activation, last = _activation(node, done)
    with captured.graph.inserting_before(last):
        args = (inputs(node)[0], captured.constant(weight), argument(node, 2, "bias"), tuple(inner), tuple(activation))
        call = captured.call(onednn.convolve_groups, *args, place.dilation, like=last)
    captured.replace(last, call)
    if last is not node:
        captured.graph.erase_node(node)


def _lower_product(captured: Captured, node: fx.Node, rows: int, done: Counter[str]) -> None:
    matrix = captured.held(inputs(node)[1])
    weight = onednn.pack(matrix[:, :, None, None], POINT, (1, matrix.shape[1], 1, rows))
    done["product"] += 1
    _emit(captured, node, weight, (), (onednn.multiply, onednn.multiply_onto), done)


def _emit(
    captured: Captured, node: fx.Node, weight: torch.Tensor, place: tuple, kinds: tuple, done: Counter[str]
) -> None:
    """Put one call in the place of a layer and of what directly follows it."""
    activation, last = _activation(node, done)
    total = None if activation != NONE else _combination(last)
    rest: tuple[Any, ...] = ()
    if total is not None:
        other = next(t for t in inputs(total) if t is not last)
        if total.target is aten.mul.Tensor:
            rest, last = (other, "mul", False), total
            done["gate"] += 1
        else:
            rest = (other, "add", _may_write(captured.graph, other, node, total))
            done["sum in place" if rest[2] else "sum"] += 1
            activation, last = _relu(total, done)
    with captured.graph.inserting_before(last):
        args = (inputs(node)[0], captured.constant(weight), argument(node, 2, "bias"), *place, tuple(activation))
        call = captured.call(kinds[1 if rest else 0], *args, *rest, like=last)
    last.replace_all_uses_with(call)
    for old in dict.fromkeys((last, *([total] if total is not None else []), node)):
        if not old.users:
            captured.graph.erase_node(old)


def _activation(node: fx.Node, done: Counter[str]) -> tuple[Activation, fx.Node]:
    """The activation that alone reads a layer, and the node whose answer the fused call gives."""
    user = sole_user(node)
    if user is None or user.op != "call_function" or (found := _in_onednns_terms(user)) is None:
        return NONE, node
    operation: Any = user.target
    done[f"{operation._opname} in the layer"] += 1
    return found, user


def _in_onednns_terms(node: fx.Node) -> Activation | None:
    if node.target is aten.gelu.default:
        kind = argument(node, 1, "approximate", "none")
        return Activation("gelu", (), kind)
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)
        return Activation("hardtanh", (float(low), float(high)))
    return _ACTIVATIONS.get(node.target)


def _combination(node: fx.Node) -> fx.Node | None:
    """The sum or product of a layer's answer and another map of its shape, where only it reads the answer."""
    user = sole_user(node)
    if user is None or user.target not in (aten.add.Tensor, aten.mul.Tensor) or user.kwargs.get("alpha", 1) != 1:
        return None
    if not all(isinstance(t, fx.Node) for t in inputs(user)):
        return None
    other = inputs(user)[1] if inputs(user)[0] is node else inputs(user)[0]
    fits = other is not node and shape(other) == shape(node) and dtype(other) == dtype(node) and other.op != "get_attr"
    return user if fits else None


def _relu(node: fx.Node, done: Counter[str]) -> tuple[Activation, fx.Node]:
    user = sole_user(node)
    if user is None or user.target is not aten.relu.default:
        return NONE, node
    done["relu in the layer"] += 1
    return RELU, user


def _may_write(graph: fx.Graph, other: fx.Node, layer: fx.Node, total: fx.Node) -> bool:
    """Say whether the sum may be written where `other` lies: nothing reads it later, nor does the layer itself."""
    memory = owner(other)
    if memory.op != "call_function" or owner(inputs(layer)[0]) is memory:
        return False
    return not is_read_later(graph, memory, total)
