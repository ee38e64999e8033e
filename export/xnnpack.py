"""What ExecuTorch's XNNPACK backend takes of a program, and how the rest of the program is cut around it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from .strips import decompositions, fold_weights

_MOST_DIMENSIONS = 6


def executorch_bytes(program: torch.export.ExportedProgram, constants: Mapping[str, str] | None) -> bytes:
    """Return the content of an ExecuTorch file.

    Args:
        program: of torch's own operations.
        constants: texts that methods without arguments return, by name.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    class Checked(XnnpackPartitioner):
        def get_matched_nodes_from_configs(self, exported: Any) -> list[list[fx.Node]]:
            found = super().get_matched_nodes_from_configs(exported)
            return [nodes for nodes in found if all(map(_takes, nodes))]

        def generate_partitions(self, exported: Any) -> list[Any]:
            found = super().generate_partitions(exported)
            parts = without_cycles(exported.graph, [list(partition.nodes) for partition in found])
            return found if parts is None else [type(found[0])(id=i, nodes=nodes) for i, nodes in enumerate(parts)]

    splits = {torch.ops.aten.split_with_sizes.default: _slices, torch.ops.aten.split.Tensor: _pieces}
    program = fold_weights(program.run_decompositions({**splits, **decompositions()}))
    edge = to_edge_transform_and_lower(
        program, partitioner=[Checked()], constant_methods=None if constants is None else dict(constants)
    )
    return bytes(edge.to_executorch().buffer)


def _slices(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """What split_with_sizes gives. ExecuTorch copies its results in an op that makes the free batch a constant."""
    starts = accumulate(sizes, initial=0)
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=False)]


def _pieces(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    """What split gives, and chunk, which is decomposed to it."""
    length = x.shape[dim]
    return _slices(x, [min(size, length - start) for start in range(0, length, size)], dim)


def _takes(node: fx.Node) -> bool:
    """XNNPACK fails on tensors of more dimensions when it loads the program, not when it is written."""
    values = (part.meta.get("val") for part in (node, *node.all_input_nodes))
    return all(not isinstance(value, Tensor) or value.dim() <= _MOST_DIMENSIONS for value in values)


def without_cycles(graph: fx.Graph, parts: Sequence[Sequence[fx.Node]]) -> list[list[fx.Node]] | None:
    """Split parts of a graph so that each can run as one node; None where they can already.

    ExecuTorch joins nodes to parts that have no cycle one by one, but two parts may wait for each other.

    Args:
        parts: disjoint; the placeholders among their nodes are weights.
    """
    owner = {node: i for i, nodes in enumerate(parts) for node in nodes}
    if not _has_cycle(graph, owner):
        return None
    depth: dict[fx.Node, int] = {}  # of a node: most crossings from one part, or from a node without, to another
    for node in graph.nodes:
        inputs = [other for other in node.all_input_nodes if other.op != "placeholder"]
        depth[node] = max((depth[other] + (_unit(other, owner) != _unit(node, owner)) for other in inputs), default=0)
    split = defaultdict(list)
    for node, part in owner.items():
        readers = [depth[user] for user in node.users if owner.get(user) == part]
        split[part, min(readers) if node.op == "placeholder" and readers else depth[node]].append(node)
    return list(split.values())


def _unit(node: fx.Node, owner: Mapping[fx.Node, int]) -> object:
    return owner.get(node, node)


def _has_cycle(graph: fx.Graph, owner: Mapping[fx.Node, int]) -> bool:
    """Say whether parts, each seen as one node, wait for each other. Removes what waits for nothing, over and over."""
    waits: dict[object, set[object]] = defaultdict(set)
    wakes: dict[object, set[object]] = defaultdict(set)
    for node in graph.nodes:
        for other in node.all_input_nodes:
            one, two = _unit(other, owner), _unit(node, owner)
            if other.op != "placeholder" and one != two:
                waits[two].add(one)
                wakes[one].add(two)
    ready = [unit for unit in wakes if not waits[unit]]
    while ready:
        done = ready.pop()
        for unit in wakes.pop(done, ()):
            waits[unit].discard(done)
            if not waits[unit]:
                ready.append(unit)
    return any(waits.values())
