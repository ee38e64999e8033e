"""From a model to a graph of torch operations with its weights as constants, and helpers to rewrite it."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..attention_ops._graph.exporting import keeping_ops_whole
from .errors import FuseError

aten = torch.ops.aten


class Captured:
    """A model's forward pass for one input: a graph whose only placeholder is the image, and its constants by name.

    `meta["val"]` of a node has the shape and dtype of its answer; the strides are those of the plain forward pass.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        with keeping_ops_whole():
            program = torch.export.export(model, (x,), strict=False)
        signature = program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise FuseError("the model changes its buffers or its input in eval mode")
        tensors = {**program.state_dict, **program.constants}
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.constants: dict[str, Tensor] = {}
        self.graph = fx.Graph()
        self.out_spec = program.call_spec.out_spec
        copies: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                copies[node] = self.constant(tensors[names[node.name]].detach())
            elif node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], lambda n: copies[n]))
            else:
                copies[node] = self.graph.node_copy(node, lambda n: copies[n])

    def constant(self, tensor: Tensor) -> fx.Node:
        """Add a constant to the graph, at the insertion point."""
        name = f"c{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.get_attr(name)
        node.meta["val"] = tensor
        return node

    def value(self, node: Any) -> Tensor | None:
        """The tensor that a constant node holds, or None."""
        return self.held(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def held(self, node: Any) -> Tensor:
        """The tensor of a node that is known to be a constant."""
        return self.constants[node.target]

    def call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """Add a call whose answer has the shape and dtype of `like`'s."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = like.meta["val"]
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def compiled(self) -> fx.GraphModule:
        self.graph.eliminate_dead_code()
        self.graph.lint()
        root = nn.Module()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                setattr(root, node.target, self.constants[node.target])
        return fx.GraphModule(root, self.graph, "Fused")


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """The graph's calls of these operations, while it may be changed."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets and not node._erased:
            yield node


def inputs(node: fx.Node) -> tuple[Any, ...]:
    """The arguments by position; what they are follows from the operation, which fx's types do not know."""
    return node.args


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument that was given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def views_input(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one may share, or None where it has its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return inputs(node)[0]
    if node.target is aten.einsum.default and len(node.all_input_nodes) == 1:  # a permutation, a view
        return node.all_input_nodes[0]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(out.alias_info is not None for out in schema.returns):
        return None
    return next((arg for arg in node.args if isinstance(arg, fx.Node)), None)


def owner(node: fx.Node) -> fx.Node:
    """The node that owns the memory in which this one lies."""
    while (source := views_input(node)) is not None:
        node = source
    return node


def terms(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the two tensors that a node adds; none where it is no such sum."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return []
    if not all(isinstance(t, fx.Node) for t in node.args):
        return []
    a, b = inputs(node)
    return [(a, b), (b, a)]


def is_read_later(graph: fx.Graph, memory: fx.Node, writer: fx.Node) -> bool:
    """Say whether memory is read after the node that changes it, other than through that node's own answer."""
    through = {writer}
    started = False
    for node in graph.nodes:
        if node is writer:
            started = True
        elif started:
            if any(arg not in through and owner(arg) is memory for arg in node.all_input_nodes):
                return True
            if any(arg in through for arg in node.all_input_nodes) and owner(node) is memory:
                through.add(node)
    return False
