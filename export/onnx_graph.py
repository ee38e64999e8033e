"""Simplify an ONNX graph with onnxscript's rules, so that files stay small and large graphs take minutes, not hours.

onnxscript's own `optimize` differs in two points. One of its rules, which joins slices, tries all pairs of nodes: for a
graph of 23,000 nodes it took longer than ten minutes. And it stores what constants amount to, also where that is larger
than they are: a table of position biases resized to a map, or one entry for each pair of tokens. Here the file holds
the table, and the runtime computes the rest when it loads the file.
"""

import math
from typing import Any

ROUNDS = 3  # at most, of folding and rewriting
LEAST_GROWN = 4096  # numbers; smaller results are stored whatever they come from
MOST_NUMBERS = 2**31  # of a stored tensor: equal ones of any size are stored once


def simplify(model: Any) -> None:
    """Simplify an onnx_ir.Model in place: fold constants, drop what has no effect, merge batch norms and reshapes.

    What the exporter notes at each node goes too: it names source files of this machine, and can be half of a file.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.rewriter import RewritePass

    of_constants = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    rewrite = Sequential(RewritePass(_rules()), common.RemoveUnusedNodesPass())
    common.InlinePass()(model)
    for _ in range(ROUNDS):
        folded = _fold(model)
        of_constants(model)
        rewritten = rewrite(model).modified
        if not (folded or rewritten):
            break
    Sequential(
        of_constants,
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.DeduplicateInitializersPass(size_limit=MOST_NUMBERS),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)


def _fold(model: Any) -> bool:
    from onnxscript.optimizer import fold_constants_ir

    return fold_constants_ir(model, onnx_shape_inference=True, should_fold=_choice).modified


def _choice(node: Any) -> bool | None:
    """Say whether to store what a node makes of constants; None leaves it to onnxscript's limits on sizes."""
    if node.op_type == "Transpose":  # of a weight that several products read: quantizers look for stored weights
        return True if all(other.op_type == "Transpose" for other in node.inputs[0].consumers()) else None
    given = sum(_numbers(value) or 0 for value in set(node.inputs) if value is not None)
    made = [_numbers(value) for value in node.outputs]
    return False if any(count is not None and count > max(given, LEAST_GROWN) for count in made) else None


def _numbers(value: Any) -> int | None:
    """Return how many numbers a value holds; None where its shape is not known."""
    if value.shape is None or not all(isinstance(side, int) for side in value.shape):
        return None
    return math.prod(value.shape)


def _rules() -> list[Any]:
    """onnxscript's rules for graphs that torch exports, without the one that tries all pairs of nodes."""
    from onnxscript.rewriter.rules import common as rules

    return [
        *(rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule),
        *(rules.dropout_zero_rule, rules.dropout_inference_rule),
        *(rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule, rules.cast_cast_rule),
        *(rules.cast_constant_of_shape_rule, rules.cast_constant_of_shape_without_value_rule),
        *(rules.collapse_slice_rule, rules.collapse_slice2_rule, *rules.expand_before_binary_op_rules),
        *(rules.one_reshape_matmul_reshape_rule, rules.two_reshapes_matmul_reshape_rule),
        *(rules.materialize_reshape_shape_rule, rules.reshape_reshape_rule, rules.flatten_to_reshape_rule),
        *(rules.squeeze_reshape_1d_rule, rules.unsqueeze_unsqueeze_rule, rules.transpose_transpose_rule),
        *(rules.min_min_rule, rules.min_max_rule, rules.max_min_rule, rules.max_max_rule),
        *(rules.successive_relu_rule, rules.successive_clip_rule),
        *(rules.successive_clip_relu_rule, rules.successive_relu_clip_rule),
        *(rules.no_op_static_scatter_nd_rule, rules.no_op_dynamic_scatter_nd_rule),
        *(rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule),
        *(rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_conv_transpose_rule),
        *(rules.fuse_batchnorm_into_gemm_rule, rules.remove_optional_bias_from_conv_rule),
        *(rules.remove_optional_bias_from_gemm_rule,),
    ]
