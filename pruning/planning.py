"""Make a plan: check the request, score, select, count."""

import math
from collections.abc import Sequence
from types import MappingProxyType

from torch import nn

from .counts import check_runs, count_masked, example_image
from .criteria import CRITERIA, Batches, Scope
from .criteria import weight_scores as score_weights
from .errors import PruningError
from .groups import declared, group_of_weights
from .plan import Plan
from .structured import plan_structures
from .unstructured import keep_highest, two_of_four

PATTERNS = ("2:4",)


def plan(
    model: nn.Module,
    method: str = "dimap",
    ratio: float = 0.5,
    *,
    structure: Sequence[str] = (),
    groups: Sequence[str] | None = None,
    scope: Scope | None = None,
    pattern: str | None = None,
    batches: Batches | None = None,
    img_size: int | tuple[int, int] | None = None,
    seed: int = 0,
) -> Plan:
    """Decide what is removed; the model is left unchanged.

    Cost: a sort per layer and two forward passes (to check and to count). taylor needs a backward pass per batch,
    head_importance a forward pass per head and batch.

    Args:
        model: of a family with a pruning declaration: ours, and timm's swin, davit, vit, convnext, resnet.
        method: "dimap", "lamp", "magnitude", "taylor", "random"; "head_importance" for structure ("heads",).
        ratio: share to remove, 0 to below 1, of the weights or structures that are ranked together.
        structure: remove whole structures instead of single weights: "heads", "channels", "mlp", "conv", "width".
        groups: module groups of the single weights; None: QKV, PRJ, MLP and convolutions.
        scope: rank within each "layer", module "group" (or kind of structure), or the whole "model". None: the
            method's own scope for single weights, "group" for structures.
        pattern: "2:4" keeps two of every four neighboring weights; ratio must be 0.5.
        batches: images and classes, for taylor and head_importance.
        img_size: height and width for the count of multiply-adds; None: the model's own size.
        seed: random seed of the method random.

    Raises:
        PruningError: invalid request.
    """
    _check(method, ratio, structure, scope, pattern, groups)
    declared(model)  # refuses families without a declaration
    check_runs(model, example_image(model, img_size))
    if structure:
        return plan_structures(
            model, method, ratio, structure, scope=scope, batches=batches, img_size=img_size, seed=seed
        )
    group_of = group_of_weights(model, groups)
    scores = score_weights(model, group_of, method, batches=batches, seed=seed)
    scope = CRITERIA[method].scope if scope is None else scope
    if pattern is None:
        masks, thresholds = keep_highest(scores, group_of, ratio, scope)
    else:
        masks, thresholds, scope = two_of_four(scores), {}, "layer"
    return Plan(
        architecture=type(model).__name__,
        method=method,
        ratio=ratio,
        scope=scope,
        masks=MappingProxyType({name: masks[name] for name in group_of if name in masks}),
        groups=MappingProxyType({name: group for name, group in group_of.items() if name in masks}),
        thresholds=MappingProxyType(thresholds),
        counts=count_masked(model, masks, example_image(model, img_size)),
        pattern=pattern,
    )


def _check(
    method: str,
    ratio: float,
    structure: Sequence[str],
    scope: str | None,
    pattern: str | None,
    groups: Sequence[str] | None,
) -> None:
    if method not in CRITERIA:
        raise PruningError(f"unknown method {method!r}; known: {', '.join(CRITERIA)}")
    if not (isinstance(ratio, float | int) and math.isfinite(ratio) and 0 <= ratio < 1):
        raise PruningError(f"ratio must be 0 to below 1, got {ratio}")
    if scope not in (None, "layer", "group", "model"):
        raise PruningError(f"scope must be layer, group or model, got {scope!r}")
    if pattern is not None and (pattern not in PATTERNS or ratio != 0.5 or structure):
        raise PruningError(f"pattern: wanted 2:4 at ratio 0.5 without structures, got {pattern!r} at {ratio:g}")
    if structure and groups is not None:
        raise PruningError(f"groups ({', '.join(groups)}) select single weights, not {', '.join(structure)}")
    if method == "head_importance" and tuple(structure) != ("heads",):
        raise PruningError("head_importance scores heads: structure must be ('heads',)")
