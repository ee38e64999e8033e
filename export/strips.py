"""1-D convolutions and batch norms of a program as 2-D ones, on maps of width 1.

XNNPACK has 2-D convolutions only. ExecuTorch's own rewriting of 1-D ones fails where two of them have the same weight,
as those of a layer that is called twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

_ATEN = torch.ops.aten
_CONVOLUTION, _UNSQUEEZE = _ATEN.convolution.default, _ATEN.unsqueeze.default
_NORM = _ATEN._native_batch_norm_legit_no_training.default
_OF_ONE_AXIS = (
    _ATEN.conv1d.default,
    _ATEN.conv1d.padding,
    _ATEN._convolution_mode.default,
    _ATEN.conv_transpose1d.default,
)


def decompositions() -> dict[Any, Callable]:
    """Return decompositions to 2-D layers for `run_decompositions`; `fold_weights` completes their work."""
    known = torch.export.default_decompositions()
    return {_CONVOLUTION: _convolution, _NORM: _batch_norm, **{op: known[op] for op in _OF_ONE_AXIS}}


def fold_weights(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Store the weights of rewritten convolutions with four dimensions, in place: XNNPACK takes constant weights only.

    A weight that something else reads stays as it is; its convolutions run in ExecuTorch's own kernels.
    """
    named = {s.arg.name: s for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT}
    for node in program.graph.find_nodes(op="placeholder"):
        readers = list(node.users)
        if node.name not in named or not readers or not all(map(_widens, readers)):
            continue
        target = named[node.name].target
        tensors = program.state_dict if target in program.state_dict else program.constants
        wide = tensors[target].detach().unsqueeze(-1)
        tensors[target] = nn.Parameter(wide, requires_grad=False) if isinstance(tensors[target], nn.Parameter) else wide
        node.meta["val"] = readers[0].meta["val"]
        for reader in readers:
            reader.replace_all_uses_with(node)
            program.graph.erase_node(reader)
    program.graph_module.recompile()
    return program


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if weight.dim() != 3:
        return NotImplemented
    wide = [[*given, other] for given, other in ((stride, 1), (padding, 0), (dilation, 1), (output_padding, 0))]
    *steps, more = wide
    out = _CONVOLUTION(x.unsqueeze(-1), weight.unsqueeze(-1), bias, *steps, transposed, more, groups)
    return out.squeeze(-1)


def _batch_norm(x: Tensor, *args: Any) -> Any:
    """XNNPACK computes it as a convolution with a weight per channel."""
    if x.dim() != 3:
        return NotImplemented
    out, *statistics = _NORM(x.unsqueeze(-1), *args)
    return out.squeeze(-1), *statistics


def _widens(node: torch.fx.Node) -> bool:
    return node.target is _UNSQUEEZE and node.args[1] in (-1, 3)
