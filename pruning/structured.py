"""Plan whole structures: score, rank, and keep at least one in each layer."""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .._modes import evaluating
from ..attention_ops.macs import count_macs
from .counts import Counts, example_image, size_of_one
from .criteria import Batches, Scope, weight_scores
from .errors import PruningError
from .groups import group_of_weights
from .heads import head_scores
from .plan import Cuts, Plan
from .structures import Structures, find_structures
from .surgery import cut
from .unstructured import Thresholds, lowest

DEPENDENT = "dependent"  # group of biases, norms, tables...: parameters cut along with the weights of a group


def plan_structures(
    model: nn.Module,
    method: str,
    ratio: float,
    structure: Sequence[str],
    *,
    scope: Scope | None = None,
    batches: Batches | None = None,
    img_size: int | tuple[int, int] | None = None,
    seed: int = 0,
) -> Plan:
    """Plan to remove `ratio` of the structures of each kind; see `plan` for arguments and errors."""
    group_of = group_of_weights(model)
    by_heads = method == "head_importance"
    scores = weight_scores(model, group_of, "magnitude" if by_heads else method, batches=batches, seed=seed)
    found = [s for s in find_structures(model, structure, scores) if s.scored(scores)]
    totals = head_scores(model, found, batches) if by_heads else [s.scores(scores) for s in found]
    scope = "group" if scope is None else scope
    removed, thresholds = remove_lowest(found, totals, ratio, scope)
    cuts, numbers = _cuts(model, found, removed)
    masks = masks_of(model, cuts)
    image = example_image(model, img_size)
    smaller = cut(model, cuts, numbers, image)
    with evaluating(model), torch.no_grad():
        before = count_macs(model, image)
    with evaluating(smaller), torch.no_grad():
        after = count_macs(smaller, image)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (model, smaller)]
    return Plan(
        architecture=type(model).__name__,
        method=method,
        ratio=ratio,
        scope=scope,
        masks=MappingProxyType(masks),
        groups=MappingProxyType({name: group_of.get(name, DEPENDENT) for name in masks}),
        thresholds=MappingProxyType(thresholds),
        counts=Counts(sizes[0], sizes[1], before, after, size_of_one(image)),
        structure=tuple(structure),
        cuts=MappingProxyType(cuts),
        widths=MappingProxyType(numbers),
        removed=MappingProxyType(_tally(found, removed)),
    )


def remove_lowest(
    found: Sequence[Structures], totals: Sequence[Tensor], ratio: float, scope: Scope
) -> tuple[list[Tensor], Thresholds]:
    """Return the indices of the removed structures of every layer, and the lowest kept score of each ranking.

    The best structure of a layer is never removed.

    Raises:
        PruningError: the ratio would leave a layer without a structure.
    """
    buckets: dict[str, list[int]] = {}
    for i, s in enumerate(found):
        label = {"layer": f"{s.kind} {s.name}", "group": s.kind, "model": "model"}[scope]
        buckets.setdefault(label, []).append(i)
    gone: list[Tensor] = [torch.empty(0, dtype=torch.int64) for _ in found]
    thresholds = {}
    for label, layers in buckets.items():
        sizes = [found[i].size for i in layers]
        ranked = torch.cat([_spare_best(totals[i]) for i in layers])
        wanted, free = round(ratio * sum(sizes)), sum(sizes) - len(sizes)
        if wanted > free and scope != "layer":
            raise PruningError(
                f"ratio {ratio:g} asks for {wanted} of {sum(sizes)} {label}, and one must stay in each of "
                f"{len(sizes)} layers"
            )
        kept = torch.ones(len(ranked), dtype=torch.bool)
        kept[lowest(ranked, min(wanted, free))] = False
        for i, part in zip(layers, kept.split(sizes), strict=True):
            gone[i] = (~part).nonzero().flatten()
        thresholds[label] = min(float(totals[i][_others(gone[i], found[i].size)].min()) for i in layers)
    return gone, thresholds


def _spare_best(scores: Tensor) -> Tensor:
    spared = scores.clone()
    spared[scores.argmax()] = torch.inf
    return spared


def _others(gone: Tensor, size: int) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[gone] = False
    return kept.nonzero().flatten()


def _cuts(
    model: nn.Module, found: Sequence[Structures], removed: Sequence[Tensor]
) -> tuple[dict[str, dict[int, Tensor]], dict[str, int]]:
    """Return the kept indices of every axis that is cut, and the new values of the attributes that count them."""
    tensors = model.state_dict(keep_vars=True)
    kept: dict[tuple[str, int], Tensor] = {}
    numbers: dict[str, int] = {}
    lengths: dict[str, tuple[str, int]] = {}
    for structures, gone in zip(found, removed, strict=True):
        if not len(gone):
            continue
        for part in structures.slices:
            size = tensors[part.tensor].shape[part.axis]
            stays = kept.setdefault((part.tensor, part.axis), torch.ones(size, dtype=torch.bool))
            stays[part.index[gone].flatten()] = False
        for attribute, step in structures.numbers.items():
            numbers.setdefault(attribute, _get(model, attribute))
            numbers[attribute] -= step * len(gone) if isinstance(step, int) else sum(step[i] for i in gone.tolist())
        lengths |= structures.lengths
    numbers |= {attribute: int(kept[place].sum()) for attribute, place in lengths.items()}
    cuts: dict[str, dict[int, Tensor]] = {}
    for (tensor, axis), stays in kept.items():
        cuts.setdefault(tensor, {})[axis] = stays.nonzero().flatten()
    return cuts, numbers


def _get(model: nn.Module, attribute: str) -> int:
    owner, _, name = attribute.rpartition(".")
    return int(getattr(model.get_submodule(owner), name))


def masks_of(model: nn.Module, cuts: Cuts) -> dict[str, Tensor]:
    """Return the cuts as masks of the parameters; an entry is kept if it is kept on every axis."""
    masks = {}
    for name, parameter in model.named_parameters():
        if name not in cuts:
            continue
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        for axis, stays in cuts[name].items():
            keep = torch.zeros(parameter.shape[axis], dtype=torch.bool)
            keep[stays] = True
            mask &= keep.view([-1 if a == axis else 1 for a in range(parameter.dim())])
        masks[name] = mask
    return masks


def _tally(found: Sequence[Structures], removed: Sequence[Tensor]) -> dict[str, tuple[int, int]]:
    tally: dict[str, tuple[int, int]] = {}
    for s, gone in zip(found, removed, strict=True):
        before = tally.get(s.kind, (0, 0))
        tally[s.kind] = (before[0] + len(gone), before[1] + s.size)
    return tally
