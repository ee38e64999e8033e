"""What can be drawn of every layer of a model on one image: what its queries see, and the gates that it sets.

Attention  the maps of `attention_maps`, placed on the image; windows of a layer are joined.
Fields     large kernels, and the token mixers of NiNformer: the gradient of an output by the layer's input (gates.py).
Gates      of channels, rows and columns, tokens, heads: numbers that no query chooses (gates.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import RequestError
from .maps import READ, AttentionMap
from .places import Size, unrolled

PROBABILITY, WEIGHT = "probability", "weight"
NOT_SOFTMAX = ("reversed_attention", "flow_attention", "cluster_attention")


@dataclass(frozen=True)
class Grid:
    """Where the tokens of a layer lie on the image.

    Attributes:
        size: (rows, columns) of the layer's map, padding included; (0, 0) where tokens have no place.
        cell: (height, width) of a token, px. Cells begin at the upper left corner of the image.
        places: (tokens, 2) int64, row and column of every token; -1 for those without a place.
        prefix: tokens before those of the map; they come first.
    """

    size: Size
    cell: tuple[float, float]
    places: Tensor
    prefix: int = 0

    def at(self, x: float, y: float) -> int | None:
        """Return the token whose cell holds a pixel (past the last cell: of the last row or column), or None."""
        row, col = min(int(y // self.cell[0]), self.size[0] - 1), min(int(x // self.cell[1]), self.size[1] - 1)
        here = ((self.places[:, 0] == row) & (self.places[:, 1] == col)).nonzero()
        return int(here[0]) if len(here) else None

    def on_map(self, values: Tensor) -> Tensor:
        """(..., tokens) -> (..., rows, columns); NaN where there is no token. Tokens without a place are left out."""
        out = torch.full((*values.shape[:-1], *self.size), torch.nan, dtype=values.dtype)
        placed = self.places[:, 0] >= 0
        rows, cols = self.places[placed].unbind(1)
        out[..., rows, cols] = values[..., placed]
        return out

    @property
    def is_placed(self) -> bool:
        """Whether any token has a place."""
        return math.prod(self.size) > 0


@dataclass(frozen=True)
class AttentionView:
    """What every query of one layer (or branch of a layer) sees on one image.

    Attributes:
        layer, op, branch: as in `AttentionMap`; op is "effective field" where there are no queries and keys.
        heads: number of heads.
        queries, keys: where they lie.
        unit: what a weight is: "probability", "weight" (its rows need not sum to 1) or "gradient norm".
        token: what a query or key without a place is: "token", "channel" or "agent".
    """

    layer: str
    op: str
    branch: str
    heads: int
    queries: Grid
    keys: Grid
    unit: str
    token: str
    _rows: Callable[[Tensor], Tensor] = field(repr=False)

    def weights(self, queries: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return how much each query sees of each key of the whole layer: (heads, queries, keys), float32 at least.

        Cost: memory for heads * queries * keys numbers; time as in `AttentionMap.probabilities`. A field takes a
        forward and a backward pass of its layer per query.

        Args:
            queries: numbers of tokens; all when None.

        Raises:
            ValueError: a query is not there.
            RequestError: a weight is not finite: the model's parameters, or the image, are not.
        """
        count = len(self.queries.places)
        rows = torch.arange(count) if queries is None else torch.as_tensor(queries, dtype=torch.int64)
        if rows.dim() != 1 or bool(((rows < 0) | (rows >= count)).any()):
            raise ValueError(f"weights: {self.layer} has queries 0 to {count - 1}, got {queries}")
        found = self._rows(rows).cpu()
        if not bool(found.isfinite().all()):
            raise RequestError(f"{self.title} has weights that are not finite")
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def query_at(self, x: float, y: float) -> int:
        """Return the query whose cell holds a pixel of the image; 0 where queries have no place.

        Raises:
            RequestError: the layer has no query there.
        """
        found = self.queries.at(x, y) if self.queries.is_placed else 0
        if found is None:
            raise RequestError(f"{self.title} has no query at x {x:g}, y {y:g}")
        return found

    @property
    def title(self) -> str:
        """The layer with its branch."""
        return f"{self.layer or 'model'} {self.branch}".strip()


@dataclass(frozen=True)
class GateView:
    """Numbers that a layer multiplies with on one image, whatever the query.

    Attributes:
        layer, op, branch: name of the module, what it is, and which of its gates.
        values: (maps, rows, columns) float32.
        names: one for each map ("head 0", "group 1", ...).
        axes: what rows and columns are: ("y", "x") on the image, or for example ("channel", "row"); ("", "channel")
            for one row.
        cell: (height, width) of an entry in px, for those on the image.
        unit: what a number is.
    """

    layer: str
    op: str
    branch: str
    values: Tensor
    names: tuple[str, ...]
    axes: tuple[str, str]
    cell: tuple[float, float] | None
    unit: str

    @property
    def heads(self) -> int:
        """Number of maps."""
        return len(self.values)

    @property
    def title(self) -> str:
        """The layer with its branch."""
        return f"{self.layer or 'model'} {self.branch}".strip()


View = AttentionView | GateView


@dataclass(frozen=True)
class Canvas:
    """The image that a model sees, and how many pixels its layers count as one token."""

    size: Size  # rows and columns, px
    reductions: tuple[int, ...]

    @staticmethod
    def of(model: nn.Module, image: Tensor) -> "Canvas":
        """`image`: (1, C, H, W)."""
        infos: Any = getattr(model, "feature_info", None) or ()
        found = (info.get("reduction") for info in infos if isinstance(info, dict))
        return Canvas((image.shape[-2], image.shape[-1]), tuple(sorted({n for n in found if type(n) is int})))

    def cell(self, size: Size) -> tuple[float, float]:
        """Return the (height, width) in px of a token of a map: a reduction of the model, if it gives such a map."""
        for step in self.reductions:
            cuts = [(length // step, -(-length // step)) for length in self.size]
            if all(count in cut for count, cut in zip(size, cuts, strict=True)):
                return float(step), float(step)
        return self.size[0] / size[0], self.size[1] / size[1]


def view_of(one: AttentionMap, canvas: Canvas) -> AttentionView:
    """Place the attention of a layer on the image."""
    of_channels = one.op == "channel_attention"
    queries, keys = _grid(one, "query", canvas), _grid(one, "key", canvas)
    whole = one.branch == READ or one.op not in NOT_SOFTMAX
    token = "channel" if of_channels else "token"
    unit = PROBABILITY if whole else WEIGHT
    return AttentionView(one.layer, one.op, one.branch, one.heads, queries, keys, unit, token, _joined(one))


def _joined(one: AttentionMap) -> Callable[[Tensor], Tensor]:
    """Rows over the keys of all windows: (heads, queries, windows * keys)."""
    windows = math.prod(one.windows)

    def rows_of(rows: Tensor) -> Tensor:
        if windows == 1:
            return one.probabilities(rows)[0]
        inside, index = torch.unique(rows % one.queries, return_inverse=True)
        window = rows // one.queries
        of_windows = one.probabilities(inside).cpu()[window, :, index]  # (rows, heads, keys of a window)
        out = of_windows.new_zeros(one.heads, len(rows), windows, one.keys)
        out[:, torch.arange(len(rows)), window] = of_windows.transpose(0, 1)
        return out.flatten(2)

    return rows_of


def _grid(one: AttentionMap, of: str, canvas: Canvas) -> Grid:
    size, prefix = (one.key_size, one.prefix) if of == "key" else (one.query_size, one.query_prefix)
    count = math.prod(one.windows) * (one.keys if of == "key" else one.queries)
    if size is None:
        return Grid((0, 0), (1.0, 1.0), torch.full((count, 2), -1), prefix)
    finer = [max(a, b) for a, b in zip(size, (one.query_size if of == "key" else one.key_size) or size, strict=True)]
    axes, cell, wholes = [], [], []
    whole_map = one.map_size or (finer[0] * one.windows[0], finer[1] * one.windows[1])
    px = canvas.cell(whole_map)
    for i in (0, 1):
        whole = size[i] * one.windows[i]
        shift, length = (tokens * size[i] // finer[i] for tokens in (one.shift[i], whole_map[i]))
        axes.append(unrolled(torch.arange(whole), shift, length) if shift else torch.arange(whole))
        cell.append(px[i] * finer[i] / size[i])
        wholes.append(whole)
    rows = axes[0].view(one.windows[0], 1, size[0], 1).expand(-1, one.windows[1], -1, size[1])
    cols = axes[1].view(1, one.windows[1], 1, size[1]).expand(one.windows[0], -1, size[0], -1)
    places = torch.stack([rows, cols], -1).flatten(0, 3)
    return Grid((wholes[0], wholes[1]), (cell[0], cell[1]), torch.cat([torch.full((prefix, 2), -1), places]), prefix)
