"""Attention rollout: how much the tokens of the input take part in a token of the last layer.

Paper      Abnar and Zuidema 2020, arXiv:2005.00928: the product of all layers' attention, each averaged with the
           identity for the shortcut: R = S'_L ... S'_1, S' = (S + I) / 2, with S the mean over heads.
Local      layers count as the dense matrix that they imply, 0 where a query does not see a key; so do agents.
We differ  rows of S are divided by their sum: those of halos, clipped softmax, flow and reversed attention do not sum
           to 1. Gates are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import RequestError
from .gates import FIELD
from .maps import GATHER, READ
from .views import AttentionView, Grid, View

OP = "attention rollout"
MOST_TOKENS = 1 << 13


def attention_rollout(views: Sequence[View]) -> AttentionView:
    """Return the rollout of a model as one more view: queries are the tokens of the last layer, keys the input's.

    Defined for models all of whose attention works on the same tokens: ViTs of any attention, isotropic NATs. Models in
    stages, which merge tokens, are refused.

    Cost: the dense N x N matrix of every layer, one after the other, and a product of N x N matrices per layer.

    Args:
        views: all of a model's, from `layer_views`.

    Raises:
        RequestError: no layer attends, layers attend to different maps, a layer has tokens without a place, or there
            are more than 8192 tokens.
    """
    attending = [v for v in views if isinstance(v, AttentionView) and v.op != FIELD and v.branch not in (GATHER, READ)]
    if not attending:
        raise RequestError("rollout: no layer of the model attends")
    grid = next((view.keys for view in attending if view.keys.is_placed), attending[0].keys)
    for view in attending:
        _check(view, attending[0], grid)
    if len(grid.places) > MOST_TOKENS:
        raise RequestError(f"rollout: wanted at most {MOST_TOKENS} tokens, the model has {len(grid.places)}")
    steps: list[_Step] = []
    for view in attending:
        rows, cols = _numbers(view.queries, grid), _numbers(view.keys, grid)
        if not steps or not steps[-1].takes(view, rows):
            steps.append(_Step.of(view, len(grid.places)))
        steps[-1].add(view, rows, cols)
    rolled = torch.eye(len(grid.places))
    for step in steps:
        rolled = 0.5 * (step.matrix() @ rolled) + 0.5 * rolled
    return AttentionView(OP, OP, "", 1, grid, grid, "share", "token", lambda rows: rolled[None, rows])


def _check(view: AttentionView, first: AttentionView, grid: Grid) -> None:
    for tokens, other in ((view.queries, "queries"), (view.keys, "keys")):
        unknown = int((tokens.places[tokens.prefix :, 0] < 0).sum())
        if unknown or (tokens.prefix and tokens.prefix != grid.prefix):
            raise RequestError(f"rollout: {other} of {view.title} have no place on the map of {first.title}")
        if tokens.is_placed and tokens.size != grid.size:
            sizes = f"{tokens.size[0]} x {tokens.size[1]} and {grid.size[0]} x {grid.size[1]}"
            raise RequestError(
                f"rollout: wanted one map of tokens in all layers, {view.title} and {first.title} attend on maps of "
                f"{sizes} tokens"
            )


def _numbers(tokens: Grid, grid: Grid) -> Tensor:
    """The numbers of a layer's tokens among those of the model: prefix tokens, then the map row by row."""
    of_map = grid.prefix + tokens.places[:, 0] * grid.size[1] + tokens.places[:, 1]
    return torch.where(tokens.places[:, 0] < 0, torch.arange(len(tokens.places)), of_map)


@dataclass
class _Step:
    """The attention of one layer, from one or more views of it."""

    layer: str
    branches: set[str]
    total: Tensor  # (N, N), sums over heads
    heads: Tensor  # (N,) heads of each query so far

    @staticmethod
    def of(view: AttentionView, tokens: int) -> "_Step":
        return _Step(view.layer, set(), torch.zeros(tokens, tokens), torch.zeros(tokens))

    def takes(self, view: AttentionView, rows: Tensor) -> bool:
        """Whether a view is of this layer too: other queries, or another branch's heads."""
        is_branch = view.branch not in self.branches and "(call " not in view.branch
        return view.layer == self.layer and (is_branch or not bool(self.heads[rows].any()))

    def add(self, view: AttentionView, rows: Tensor, cols: Tensor) -> None:
        self.branches.add(view.branch)
        step = max(1, (1 << 24) // max(view.heads * len(cols), 1))
        for few in torch.arange(len(rows)).split(step):
            self.total[rows[few][:, None], cols] += view.weights(few).float().sum(0)
        self.heads[rows] += view.heads

    def matrix(self) -> Tensor:
        """(N, N) with rows that sum to 1; tokens that the layer does not change attend to themselves."""
        sums = self.total.sum(1, keepdim=True)
        idle = sums[:, 0] <= 0
        out = self.total / torch.where(sums > 0, sums, math.inf)
        out[idle, idle.nonzero().flatten()] = 1.0
        return out
