"""From a model to a graph of torch operations with its weights as constants, and helpers to rewrite it."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch import pytree
from .errors import FuseError

aten = torch.ops.aten


class Captured:
    """A model's forward pass for one input: a graph whose only placeholder is the image.

    graph_module   holds the graph, and the constants as attributes
    values         node -> the FakeTensor that export saw: shape and dtype; strides are those of the plain forward
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
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
        self.root = nn.Module()
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
        name = f"c{len(vars(self.root))}"
        while hasattr(self.root, name):
            name += "_"
        setattr(self.root, name, tensor)
        node = self.graph.get_attr(name)
        node.meta["val"] = tensor
        return node

    def value(self, node: Any) -> Tensor | None:
        """The tensor that a constant node holds, or None."""
        return self.held(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def held(self, node: Any) -> Tensor:
        """The tensor of a node that is known to be a constant."""
        return getattr(self.root, node.target)

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
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for name in [name for name in vars(self.root) if name.startswith("c") and name not in used]:
            if isinstance(getattr(self.root, name), Tensor):
                delattr(self.root, name)
        return fx.GraphModule(self.root, self.graph, "Fused")

    def unflatten(self, outputs: Any) -> Any:
        return pytree.tree_unflatten(list(outputs), self.out_spec)


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


def used_later(graph: fx.Graph, memory: fx.Node, after: fx.Node, but: fx.Node | None = None) -> bool:
    """Say whether memory is read after a node, other than through the node `but` and its views."""
    seen_after = False
    for node in graph.nodes:
        if node is after:
            seen_after = True
        elif seen_after and node is not but:
            for arg in node.all_input_nodes:
                if arg is not but and arg is not after and owner(arg) is memory:
                    return True
    return False
