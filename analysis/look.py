"""Run a model on one image, and return all that can be drawn of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import RequestError
from .._modes import evaluating
from .capture import Call, watching
from .gates import gates_of_call, watching_gates
from .maps import maps_of
from .places import Surroundings
from .views import AttentionView, Canvas, GateView, View, view_of


def layer_views(model: nn.Module, image: Tensor, layers: Sequence[str] | None = None) -> list[View]:
    """Run a model on one image, and return what its layers see and gate, in the order of the calls.

    Works for what `attention_maps` works for, and for layers without queries and keys: ECA, squeeze and excite, ELA,
    ULSAM, large kernels, NiNformer's token mixers, attention pooling. A layer may have several views: branches, agents,
    gates beside attention.

    Cost: one forward pass, in eval mode. Weights are computed when `AttentionView.weights` is called; until then the
    queries and keys of all layers stay in memory.

    Args:
        image: (1, C, H, W), preprocessed.
        layers: names of modules; None: all.

    Raises:
        RequestError: more than one image; or a named layer, or the model, has nothing that can be drawn.
    """
    if image.dim() != 4 or len(image) != 1:
        raise RequestError(f"layer_views: wanted one image (1, C, H, W), got {tuple(image.shape)}")
    found: list[View] = []
    known, canvas = Surroundings.of(model, image), Canvas.of(model, image)

    def see(call: Call, out: Any) -> Any:
        maps = maps_of(call, known)
        found.extend(view_of(one, canvas) for one in maps)
        found.extend(gates_of_call(call, maps[0], canvas))
        return out

    with evaluating(model), torch.no_grad(), watching_gates(model, canvas, found.extend), watching(model, see):
        model(image)
    kept = [view for view in _numbered(found) if layers is None or view.layer in layers]
    missing = sorted(set(layers or ()) - {view.layer for view in kept})
    if missing or not kept:
        where = f"layers {', '.join(missing)}" if missing else "any layer"
        raise RequestError(f"saw neither attention nor gates in {where} of {type(model).__name__}")
    return kept


def _numbered(views: Sequence[View]) -> list[View]:
    """Tell apart the calls of a module that is called more than once: "blocks.0 (call 2)"."""
    seen: dict[tuple[str, str, str], int] = {}
    out: list[View] = []
    for view in views:
        key = view.layer, view.op, view.branch
        seen[key] = seen.get(key, 0) + 1
        out.append(view if seen[key] == 1 else _renamed(view, f"{view.branch} (call {seen[key]})".strip()))
    return out


def _renamed(view: View, branch: str) -> View:
    """A view with another branch."""
    kind: type[AttentionView] | type[GateView] = type(view)
    return kind(**vars(view) | {"branch": branch})
