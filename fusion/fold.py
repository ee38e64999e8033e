"""Fold norms with fixed statistics, scales and shifts into the layers beside them; only rounding changes."""

import torch
from torch import Tensor, fx

from .graphs import Captured, argument, aten, calls, inputs, shape, sole_user, terms

CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
LINEAR = aten.linear.default


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift in one pass."""
    return torch.addcmul(shift, x, scale)


def fold_norms(captured: Captured) -> int:
    """BatchNorm in eval mode: into the convolution before it, else one affine pass."""
    folded = 0
    for node in calls(captured.graph, aten.batch_norm.default):
        x, weight, bias, mean, var = inputs(node)[:5]
        mean, var = captured.value(mean), captured.value(var)
        if argument(node, 5, "training") or mean is None or var is None:
            continue
        weight, bias = captured.value(weight), captured.value(bias)
        scale, shift = _scale_and_shift(weight, bias, mean, var, argument(node, 7, "eps"))
        if _scale_into(captured, x, scale, node) and _shift_into(captured, x, shift):
            captured.replace(node, x)
        else:
            sizes = (-1, *(1,) * (len(shape(node)) - 2))
            with captured.graph.inserting_before(node):
                constants = (captured.constant(t.view(sizes)) for t in (scale, shift))
                captured.replace(node, captured.call(affine, x, *constants, like=node))
        folded += 1
    return folded


def _scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y = x * scale + shift, computed in float64."""
    scale = (var.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    return scale.to(mean.dtype), shift.to(mean.dtype)


def is_layer(node: object, *users: fx.Node) -> bool:
    """Say whether a node is a convolution or a product with constant weights, which only `users` read."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target in (*CONVOLUTIONS, LINEAR)
        and inputs(node)[1].op == "get_attr"
        and (argument(node, 2, "bias") is None or argument(node, 2, "bias").op == "get_attr")
        and set(node.users) <= set(users)
    )


def _scale_into(captured: Captured, layer: fx.Node, scale: Tensor, user: fx.Node) -> bool:
    """Multiply a layer's outputs, channel by channel, if only `user` reads them."""
    if not is_layer(layer, user):
        return False
    weight, bias = captured.held(inputs(layer)[1]), argument(layer, 2, "bias")
    with captured.graph.inserting_before(layer):
        new = captured.constant(weight * scale.view(-1, *(1,) * (weight.dim() - 1)))
        new_bias = None if bias is None else captured.constant(captured.held(bias) * scale)
    _set_weights(layer, new, new_bias)
    return True


def _shift_into(captured: Captured, layer: fx.Node, shift: Tensor) -> bool:
    bias = argument(layer, 2, "bias")
    with captured.graph.inserting_before(layer):
        _set_weights(layer, inputs(layer)[1], captured.constant(shift if bias is None else captured.held(bias) + shift))
    return True


def _set_weights(layer: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    kwargs = {name: value for name, value in layer.kwargs.items() if name not in ("weight", "bias")}
    layer.args, layer.kwargs = (inputs(layer)[0], weight, bias, *inputs(layer)[3:]), kwargs


def fold_scales(captured: Captured) -> int:
    """Multiplications by constants, per channel or for all, into the layer before them; layer scale is one."""
    folded = 0
    for node in calls(captured.graph, aten.mul.Tensor, aten.div.Tensor):
        folded += _fold_product(captured, node)
    return folded


def _fold_product(captured: Captured, node: fx.Node) -> bool:
    found = factor_of(captured, node)
    if found is None:
        return False
    x, factor = found
    if is_layer(x, node):
        _scale_into(captured, x, factor, node)
        captured.replace(node, x)
        return True
    if x.target is affine and sole_user(x) is node:
        sizes = captured.held(inputs(x)[1]).shape
        with captured.graph.inserting_before(x):
            constants = [captured.constant(captured.held(c) * factor.view(sizes)) for c in inputs(x)[1:]]
        x.args = (inputs(x)[0], *constants)
        captured.replace(node, x)
        return True
    return _distribute(captured, node, x, factor)


def _distribute(captured: Captured, node: fx.Node, x: fx.Node, factor: Tensor) -> bool:
    """(a + b) * c -> a * c + b * c, where both sums' products cost nothing."""
    both = terms(x)[0] if terms(x) and sole_user(x) is node else ()
    if not both or not all(shape(t) == shape(x) for t in both):
        return False
    layers = [t for t in both if is_layer(t, x) and t.target in CONVOLUTIONS]  # whose channels are axis 1, as x's
    if not layers or not all(t in layers or t.target is affine for t in both):
        return False
    sizes = (-1, *(1,) * (len(shape(x)) - 2))
    parts = []
    with captured.graph.inserting_before(node):
        for t in both:
            if t in layers:
                _scale_into(captured, t, factor, x)
                parts.append(t)
            else:  # an affine map that others read too: one of its own, of the same input
                scale, shift = (captured.constant(captured.held(c) * factor.view(sizes)) for c in inputs(t)[1:])
                parts.append(captured.call(affine, inputs(t)[0], scale, shift, like=t))
        captured.replace(node, captured.call(aten.add.Tensor, *parts, like=x))
    captured.graph.erase_node(x)
    return True


def factor_of(captured: Captured, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """(x, one factor per channel) where a node multiplies or divides x by a constant that no other axis varies."""
    a, b = inputs(node)[:2]
    divides = node.target is aten.div.Tensor
    if isinstance(a, fx.Node) and a.op != "get_attr":
        x, constant = a, b
    elif isinstance(b, fx.Node) and b.op != "get_attr" and not divides:
        x, constant = b, a
    else:
        return None
    if not node.meta["val"].is_floating_point() or shape(x) != shape(node):
        return None
    axis = -1 if x.target is LINEAR else 1
    channels = shape(x)[axis]
    if isinstance(constant, int | float):
        factor = torch.full((channels,), float(constant), dtype=torch.float64)
    else:
        value = captured.value(constant)
        if value is None or not _is_per_channel(value, len(shape(x)), axis):
            return None
        factor = value.reshape(-1).expand(channels)
    return x, (1 / factor if divides else factor).to(x.meta["val"].dtype)


def _is_per_channel(value: Tensor, dims: int, axis: int) -> bool:
    sizes = (1,) * (dims - value.dim()) + tuple(value.shape)
    return all(size == 1 for i, size in enumerate(sizes) if i != axis % dims)


def merge_shortcuts(captured: Captured) -> int:
    """x + (x * scale + shift) -> x * (1 + scale) + shift: one pass less. A third term may stand in the sum."""
    merged = 0
    for node in calls(captured.graph, aten.add.Tensor):
        if (found := _shortcut(node)) is not None:
            norm, rest = found
            with captured.graph.inserting_before(node):
                scale = captured.constant(1 + captured.held(inputs(norm)[1]))
                total = captured.call(affine, inputs(norm)[0], scale, inputs(norm)[2], like=node)
                if rest is not None:
                    total = captured.call(aten.add.Tensor, total, rest, like=node)
                captured.replace(node, total)
            merged += 1
    return merged


def _shortcut(node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """(affine map of x, third term) where a node adds x, that map and perhaps a third term."""
    for x, y in terms(node):
        if y.target is affine and inputs(y)[0] is x and sole_user(y) is node:
            return y, None
        for rest, norm in terms(y) if sole_user(y) is node else ():
            if norm.target is affine and inputs(norm)[0] is x and sole_user(norm) is y and shape(rest) == shape(node):
                return norm, rest
    return None


def fold_into_next(captured: Captured) -> int:
    """x * scale + shift into the 1x1 convolution that alone reads it."""
    folded = 0
    for node in calls(captured.graph, affine):
        layer = sole_user(node)
        if layer is None or layer.target is not aten.conv2d.default or inputs(layer)[0] is not node:
            continue
        if not is_layer(layer, *layer.users) or shape(inputs(layer)[1])[2:] != (1, 1):
            continue
        if any(argument(layer, 4, "padding", (0, 0))) or argument(layer, 6, "groups", 1) != 1:
            continue
        scale, shift = (captured.held(c).flatten() for c in inputs(node)[1:])
        weight, bias = captured.held(inputs(layer)[1]), captured.value(argument(layer, 2, "bias"))
        added = (weight.flatten(1).double() @ shift.double()).to(weight.dtype)
        with captured.graph.inserting_before(layer):
            new = captured.constant(weight * scale.view(1, -1, 1, 1))
            new_bias = captured.constant(added if bias is None else bias + added)
        _set_weights(layer, new, new_bias)
        layer.replace_input_with(node, inputs(node)[0])
        captured.graph.erase_node(node)
        folded += 1
    return folded
