"""Rewrites that change no number: no-ops go, constants are computed, views move behind activations and sums."""

from torch import Tensor, fx

from .._torch import OpOverload
from .graphs import Captured, argument, aten, calls, dtype, inputs, is_read_later, owner, shape, sole_user, terms

# Elementwise operations of one tensor, which views may pass.
UNARY = (
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default),
)
_NOTHING = (aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default)
_DROPOUT = (aten.dropout.default, aten.feature_dropout.default)


def simplify(captured: Captured) -> None:
    _make_functional(captured)
    _drop_nothings(captured)
    fold_constants(captured)
    _move_views_behind_activations(captured)


def move_permutations_behind_sums(captured: Captured) -> int:
    """x + permute(y) -> permute(permute back(x) + y), where y is computed for this sum alone."""
    moves = 0
    for node in calls(captured.graph, aten.add.Tensor):
        for x, moved in terms(node):
            if moved.target is not aten.permute.default or sole_user(moved) is not node or shape(x) != shape(node):
                continue
            inner, order = inputs(moved)[0], [axis % len(shape(node)) for axis in inputs(moved)[1]]
            if set(inner.users) != {moved}:
                continue
            with captured.graph.inserting_before(node):
                back = captured.call(aten.permute.default, x, _inverse(order), like=inner)
                total = captured.call(aten.add.Tensor, back, inner, like=inner)
                captured.replace(node, captured.call(aten.permute.default, total, order, like=node))
            captured.graph.erase_node(moved)
            moves += 1
            break
    _cancel_permutations(captured)
    return moves


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _cancel_permutations(captured: Captured) -> None:
    for node in calls(captured.graph, aten.permute.default):
        source = inputs(node)[0]
        if isinstance(source, fx.Node) and source.target is aten.permute.default:
            order = [inputs(source)[1][axis] for axis in inputs(node)[1]]
            if [axis % len(order) for axis in order] == list(range(len(order))):
                captured.replace(node, inputs(source)[0])


def _drop_nothings(captured: Captured) -> None:
    """Remove what returns its input in eval mode. Copies that only change the memory layout go too."""
    for node in list(captured.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            captured.graph.erase_node(node)
        elif node.target is aten.pad.default and not any(inputs(node)[1]):  # a copy
            captured.replace(node, inputs(node)[0])
        elif node.target in _NOTHING or (node.target in _DROPOUT and not argument(node, 2, "train")):
            captured.replace(node, inputs(node)[0])
        elif node.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default):
            source = inputs(node)[0]
            if dtype(node) == dtype(source) and node.meta["val"].device == source.meta["val"].device:
                captured.replace(node, source)
        elif node.target is aten.view.default:  # which may not fit the memory layout any more
            node.target = aten.reshape.default


def _make_functional(captured: Captured) -> None:
    """Turn relu_, add_ and the like into relu and add where nothing else reads the memory that they change."""
    for node in list(captured.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
        if not (node.target.namespace == "aten" and name.endswith("_") and not name.startswith("_")):
            continue
        packet = getattr(aten, name[:-1], None)
        functional = getattr(packet, overload, None) if packet is not None else None
        memory = owner(inputs(node)[0])
        if functional is None or memory.op != "call_function" or is_read_later(captured.graph, memory, node):
            continue
        node.target = functional


def fold_constants(captured: Captured) -> int:
    """Compute what depends on constants only."""
    folded = 0
    changed = {owner(inputs(node)[0]) for node in captured.graph.nodes if _changes_memory(node)}
    for node in list(captured.graph.nodes):
        if node.op != "call_function" or owner(node) in changed:
            continue
        sources = node.all_input_nodes
        if not all(arg.op == "get_attr" for arg in sources) or not (sources or _is_creation(node)):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), captured.value)
        result = node.target(*args, **kwargs)
        if isinstance(result, Tensor):
            with captured.graph.inserting_before(node):
                captured.replace(node, captured.constant(result))
            folded += 1
    return folded


def _changes_memory(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _is_creation(node: fx.Node) -> bool:
    names = ("arange", "zeros", "ones", "full", "eye", "linspace", "scalar_tensor")
    return isinstance(node.target, OpOverload) and node.target._opname in names


def _move_views_behind_activations(captured: Captured) -> None:
    """gelu(permute(x)) -> permute(gelu(x)): the activation then stands beside the layer that feeds it."""
    views = (aten.permute.default, aten.transpose.int, aten.reshape.default, aten.flatten.using_ints)
    for node in calls(captured.graph, *UNARY):
        source = inputs(node)[0]
        while source.op == "call_function" and source.target in views and sole_user(source) is node:
            inner = inputs(source)[0]
            with captured.graph.inserting_before(source):
                moved = captured.call(node.target, inner, *inputs(node)[1:], like=inner, **node.kwargs)
            node.replace_all_uses_with(source)
            source.replace_input_with(inner, moved)
            captured.graph.erase_node(node)
            node, source = moved, inputs(moved)[0]
