"""Run a model on one image, and return all that can be drawn of it."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import RequestError
from .._modes import evaluating
from ..backbones.dependencyvit import DroppingBlock
from ..backbones.sparsifiner import PruningBlock
from .capture import Call, watching
from .gates import gates_of_call, watching_gates
from .maps import maps_of
from .places import Surroundings
from .views import AttentionView, Canvas, GateView, Grid, View, view_of


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
    known, canvas, left = Surroundings.of(model, image), Canvas.of(model, image), _TokensLeft()

    def see(call: Call, out: Any) -> Any:
        views = [left.placed(view_of(one, canvas), call, known.prefix, canvas) for one in maps_of(call, known)]
        found.extend([*views, *gates_of_call(call, views[0].queries)])
        return out

    with evaluating(model), torch.no_grad(), watching_gates(model, canvas, found.extend), left.followed(model):
        with watching(model, see):
            model(image)
    kept = [view for view in _numbered(found) if layers is None or view.layer in layers]
    missing = sorted(set(layers or ()) - {view.layer for view in kept})
    if missing or not kept:
        where = f"layers {', '.join(missing)}" if missing else "any layer"
        raise RequestError(f"saw neither attention nor gates in {where} of {type(model).__name__}")
    return kept


class _TokensLeft:
    """The places of the tokens that Sparsifiner and DependencyViT have not dropped so far."""

    def __init__(self) -> None:
        self.numbers: Tensor | None = None  # of the tokens on the map; None: all are left

    @contextlib.contextmanager
    def followed(self, model: nn.Module) -> Iterator[None]:
        """Inside, note what every block that drops tokens leaves."""

        def note(module: nn.Module, args: tuple, out: tuple[Tensor, ...]) -> None:
            if isinstance(module, PruningBlock):
                self.numbers = out[1][0].cpu()
            else:
                chosen = out[2][0].cpu()  # among those that were left
                self.numbers = chosen if self.numbers is None else self.numbers[chosen]

        dropping = [m for m in model.modules() if isinstance(m, PruningBlock | DroppingBlock) and m.drops]
        handles = [module.register_forward_hook(note) for module in dropping]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def placed(self, view: AttentionView, call: Call, prefix: int, canvas: Canvas) -> AttentionView:
        """A view with its tokens on the map, where they are what is left of it."""
        size = next((frame.size for frame in reversed(call.frames) if frame.size is not None), None)
        if self.numbers is None or size is None or int(self.numbers.max()) >= math.prod(size):
            return view
        of_map = torch.stack([self.numbers // size[1], self.numbers % size[1]], 1)

        def on_map(grid: Grid) -> Grid:
            before = len(grid.places) - len(of_map)
            if grid.is_placed or before not in (0, prefix):
                return replace(grid, prefix=prefix) if len(grid.places) == prefix else grid
            return Grid(size, canvas.cell(size), torch.cat([torch.full((before, 2), -1), of_map]), before)

        return replace(view, queries=on_map(view.queries), keys=on_map(view.keys))


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
