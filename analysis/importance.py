"""Effect of every attention head on the predictions: the outputs of one head at a time are set to 0.

Works for all attention that `attention_maps` sees, cut or not: `foveate.pruning.head_importance`
measures the heads that can be cut, by their weights.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import evaluating
from .capture import SDPA, SOFTMAX, Call, branches_of, folded_heads, watching


@dataclass(frozen=True)
class HeadEffect:
    """Effect of one head; means over all images.

    Attributes:
        layer, branch: of the head; branch is "high" or "low" of HiLo, else "".
        head: its number in the layer, or in the branch.
        probability_drop: probability of the true class with the head, minus that without it.
        divergence: Jensen-Shannon divergence between predictions with and without the head, in nats, 0 to ln 2.
        loss_increase: cross-entropy without the head, minus that with it, in nats.
        accuracy_drop: top-1 with the head, minus top-1 without it, as a share of the images.
    """

    layer: str
    branch: str
    head: int
    probability_drop: float
    divergence: float
    loss_increase: float
    accuracy_drop: float


Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, C, H, W) and classes (B,)


@torch.no_grad()
def head_effects(model: nn.Module, batches: Batches, layers: Sequence[str] | None = None) -> list[HeadEffect]:
    """Measure every head of every layer that attends, in the order of the calls.

    Cost: one forward pass per batch, and one per head and batch.

    Args:
        batches: images and classes; kept in memory.
        layers: names of modules; None: all.

    Raises:
        ValueError: there is no batch, no layer attends, or a named one does not.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("head_effects: wanted batches of images and classes, got none")
    found: list[HeadEffect] = []
    with evaluating(model):
        heads = _heads_of(model, batches[0][0], layers)
        full = [model(images).double().log_softmax(-1) for images, _ in batches]
        for layer, branch, first, count in heads:
            for head in range(count):
                measures = []
                with watching(model, _silence(layer, first + head)):
                    for logs, (images, classes) in zip(full, batches, strict=True):
                        measures.append(_compare(logs, model(images).double().log_softmax(-1), classes))
                found.append(HeadEffect(layer, branch, head, *torch.cat(measures).mean(0).tolist()))
    return found


def _heads_of(model: nn.Module, images: Tensor, layers: Sequence[str] | None) -> list[tuple[str, str, int, int]]:
    """(layer, branch, number of its first head in the output, heads) of all attention."""
    found: dict[tuple[str, str], tuple[int, int]] = {}

    def see(call: Call, out: Any) -> Any:
        if layers is None or call.layer in layers:
            if call.op in (SDPA, SOFTMAX):
                found[call.layer, ""] = 0, folded_heads(call) or out.shape[-3]
            else:
                for branch, heads in branches_of(call).items():
                    found[call.layer, branch] = heads.start, heads.stop - heads.start
        return out

    with watching(model, see):
        model(images)
    missing = sorted(set(layers or ()) - {layer for layer, _ in found})
    if missing or not found:
        where = f"layers {', '.join(missing)}" if missing else "any layer"
        raise ValueError(f"head_effects: saw no attention in {where} of {type(model).__name__}")
    return [(layer, branch, *places) for (layer, branch), places in found.items()]


def _silence(layer: str, head: int) -> Any:
    def see(call: Call, out: Any) -> Any:
        if call.layer != layer:
            return out
        first, folded = out[0] if isinstance(out, tuple) else out, folded_heads(call)
        axis = 0 if folded else -3 if call.op in (SDPA, SOFTMAX) else -2
        places = range(head, len(first), folded) if folded else [head]
        silent = first.index_fill(axis, torch.tensor(places, device=first.device), 0)
        return (silent, *out[1:]) if isinstance(out, tuple) else silent

    return see


def _compare(full: Tensor, without: Tensor, classes: Tensor) -> Tensor:
    """(B, classes) log probabilities -> (B, 4): the measures of each image."""
    own = classes[:, None]
    kept, lost = full.gather(1, own)[:, 0], without.gather(1, own)[:, 0]
    middle = torch.logaddexp(full, without) - math.log(2)
    apart = torch.stack([(logs.exp() * (logs - middle)).sum(1) for logs in (full, without)])
    hits = (full.argmax(1) == classes).double() - (without.argmax(1) == classes).double()
    return torch.stack([kept.exp() - lost.exp(), apart.mean(0), kept - lost, hits], 1)
