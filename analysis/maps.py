"""The attention probabilities of every layer of a model, from the queries and keys that its layers compute.

Our ops    the reference body is linear in the values: its derivative by the values of a key is the probability of that
           key. So every op is covered, biases, masks and padding included, without a second definition.
Agents     the two softmaxes of agent attention, and their product.
timm's     the softmax of scaled_dot_product_attention's arguments; where a layer spells its softmax out, that.
Gates      are no part of the probabilities: those of gated and of mixture-of-head attention multiply what comes out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import evaluating
from ..attention_ops._attend import accumulator
from .capture import SDPA, SOFTMAX, Call, Part, folded_heads, parts_of, watching
from .places import Places, Size, Surroundings, as_pair, attribute, places_of_maps, places_of_tokens, unrolled
from .weights import value_weights

GATHER, READ = "gather", "read"  # branches of agent attention


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one layer (or branch of a layer) on some images; probabilities are computed when asked for.

    Attributes:
        layer: name of the module.
        op: name of our op, "scaled_dot_product_attention", or "softmax" where a layer spells attention out.
        branch: "high" or "low" of HiLo; "local" or "pooled", the two kinds of keys of aggregated attention, which share
            a softmax; "gather" (agents to keys) or "read" (queries to agents) of agent attention; "" elsewhere.
        images, heads: numbers of them.
        query_size, key_size: (rows, columns) of the tokens of one window; None where tokens have no place on a map.
        query_prefix, prefix: tokens before those of the map, class token and registers: of queries, of keys.
        windows: (rows, columns) of windows that attend by themselves, (1, 1) where the whole map does.
        shift: (rows, columns) by which the map was rolled up and left before it was padded and cut into windows.
        map_size: (rows, columns) of the layer's map without padding, in tokens of the finer of both maps.
    """

    layer: str
    op: str
    branch: str
    images: int
    heads: int
    queries: int
    keys: int
    query_size: Size | None
    key_size: Size | None
    query_prefix: int
    prefix: int
    windows: Size
    shift: Size
    map_size: Size | None
    _rows: Callable[[Tensor], Tensor] = field(repr=False)

    def probabilities(self, queries: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return how much each query attends to each key, float32 at least.

        Cost: memory for images * windows * heads * queries * keys numbers. Ops on maps run their reference body once,
        and backward once per head_dim queries, or sets of queries that lie apart where attention is local.

        Args:
            queries: places in the window, prefix tokens first; all when None.

        Returns:
            (images * windows, heads, queries, keys), windows of an image row by row. Rows sum to 1, but for: halo
            attention, which also attends to zeros outside of the map; a clipped softmax; "local" and "pooled", which
            sum to 1 together; text tokens and memories, which are no keys of the map; reversed attention (what a token
            receives), flow attention and clusters, which have other weights than a softmax.

        Raises:
            ValueError: a query is not there.
        """
        rows = torch.arange(self.queries) if queries is None else torch.as_tensor(queries, dtype=torch.int64)
        if rows.dim() != 1 or bool(((rows < 0) | (rows >= self.queries)).any()):
            raise ValueError(f"probabilities: {self.layer} has queries 0 to {self.queries - 1}, got {queries}")
        return self._rows(rows)

    def positions(self, of: str = "key") -> Tensor | None:
        """Return where the tokens are on the map of the layer, in tokens of the finer of both maps, or None.

        Args:
            of: "key" or "query".

        Returns:
            (windows, tokens, 2) float64: row and column; NaN for prefix tokens.
        """
        if of not in ("key", "query"):
            raise ValueError(f"positions: of must be 'key' or 'query', got {of!r}")
        size, before = (self.key_size, self.prefix) if of == "key" else (self.query_size, self.query_prefix)
        if size is None:
            return None
        other = (self.query_size if of == "key" else self.key_size) or size
        axes = []
        for i in (0, 1):
            window = max(size[i], other[i])
            inside = (torch.arange(size[i], dtype=torch.float64) + 0.5) * window / size[i] - 0.5
            of_windows = torch.arange(self.windows[i], dtype=torch.float64)[:, None] * window + inside
            length = window * self.windows[i] if self.map_size is None else self.map_size[i]
            axes.append(unrolled(of_windows, self.shift[i], length) if self.shift[i] else of_windows)
        rows = axes[0][:, None, :, None].expand(-1, self.windows[1], -1, size[1])
        cols = axes[1][None, :, None, :].expand(self.windows[0], -1, size[0], -1)
        places = torch.stack([rows, cols], -1).flatten(2, 3).flatten(0, 1)
        return torch.cat([torch.full((len(places), before, 2), torch.nan, dtype=torch.float64), places], 1)


def attention_maps(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> list[AttentionMap]:
    """Run a model on images, and return the attention of every layer in the order of the calls.

    Works for our families that attend (gates and large kernels have no queries and keys), and for models that call
    scaled_dot_product_attention, or a softmax in a module with `num_heads`, such as timm's ViTs and Swins. A layer of
    agent attention gives three maps, a layer with two branches or kinds of keys gives two.

    Cost: one forward pass, in eval mode; the queries and keys of all layers stay in memory as long as the result does.

    Args:
        images: (B, C, H, W), preprocessed.
        layers: names of modules; None: all.

    Raises:
        ValueError: a named layer makes no call of attention, or no layer does.
    """
    found: list[AttentionMap] = []
    known = Surroundings.of(model, images)

    def see(call: Call, out: Any) -> Any:
        if layers is None or call.layer in layers:
            found.extend(maps_of(call, known))
        return out

    with evaluating(model), torch.no_grad(), watching(model, see):
        model(images)
    missing = sorted(set(layers or ()) - {one.layer for one in found})
    if missing or not found:
        where = f"layers {', '.join(missing)}" if missing else "any layer"
        raise ValueError(f"attention_maps: saw no attention in {where} of {type(model).__name__}")
    return found


def maps_of(call: Call, known: Surroundings) -> list[AttentionMap]:
    """Return the maps of one call."""
    if call.op == SDPA:
        return [_of_sdpa(call, known)]
    if call.op == SOFTMAX:
        return [_of_softmax(call, known)]
    if call.op == "channel_attention":
        return [_of_channels(call, known)]
    if call.op == "agent_attention":
        return _of_agents(call, known)
    return [_of_part(call, part, known) for part in parts_of(call)]


def _made(
    call: Call, known: Surroundings, shape: tuple[int, int, int, int], places: Places,
    rows_of: Callable[[Tensor], Tensor], branch: str = "",
) -> AttentionMap:  # fmt: skip
    """`shape`: (images * windows, heads, queries, keys)."""
    _, heads, queries, keys = shape
    return AttentionMap(
        call.layer, call.op, branch, len(known.images), heads, queries, keys, **vars(places), _rows=rows_of
    )


# Our ops


def _of_part(call: Call, part: Part, known: Surroundings) -> AttentionMap:
    def rows_of(rows: Tensor) -> Tensor:
        return value_weights(call.op, part, rows)

    batch, heads = part.q.shape[0], part.heads.stop - part.heads.start
    count = batch // len(known.images)
    if part.q.dim() == 4:  # tokens: (B, N, heads, d)
        shape = (batch, heads, part.q.shape[1], part.k.shape[1])
        return _made(call, known, shape, places_of_tokens(call, count, *shape[2:], known), rows_of)
    q_size, k_size = as_pair(part.q.shape[1:3]), part.key_size or as_pair(part.k.shape[1:3])
    shape = (batch, heads, math.prod(q_size), math.prod(k_size))
    return _made(call, known, shape, places_of_maps(call, count, q_size, k_size, known), rows_of, part.branch)


def _of_channels(call: Call, known: Surroundings) -> AttentionMap:
    """Channel attention: queries and keys are the channels of a head."""
    q, k = call.arguments["q"].detach(), call.arguments["k"].detach()
    scale = q.shape[-1] ** -0.5 if call.arguments["scale"] is None else call.arguments["scale"]
    wide, width = accumulator(q.dtype), q.shape[-1]

    def rows_of(rows: Tensor) -> Tensor:
        queries = q.to(wide)[..., rows.to(q.device)]
        return (torch.einsum("bhwni,bhwnj->bnij", queries, k.to(wide)) * scale).softmax(-1)

    places = Places(windows=(len(q) // len(known.images), 1))
    return _made(call, known, (len(q), q.shape[3], width, width), places, rows_of)


def _of_agents(call: Call, known: Surroundings) -> list[AttentionMap]:
    """The product of both softmaxes, what agents gather from keys, and what queries read from agents."""
    given = call.arguments
    wide = accumulator(given["q"].dtype)
    q, k, agents = (given[name].detach().to(wide).transpose(1, 2) for name in ("q", "k", "agents"))
    scale = q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]

    def softmax(rows: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        rows = rows.to(queries.device)
        logits = torch.matmul(queries[:, :, rows], keys.mT) * scale
        return (logits if bias is None else logits + bias.detach().to(wide)[:, rows]).softmax(-1)

    def read(rows: Tensor) -> Tensor:
        return softmax(rows, q, agents, given["bias_from"])

    def gather(rows: Tensor) -> Tensor:
        return softmax(rows, agents, k, given["bias_to"])

    def both(rows: Tensor) -> Tensor:
        return torch.matmul(read(rows), gather(torch.arange(agents.shape[2])))

    (batch, heads, queries), keys, few = q.shape[:3], k.shape[2], agents.shape[2]
    of_tokens = places_of_tokens(call, batch // len(known.images), queries, keys, known)
    grid = attribute(call.frames, "agent_shape", None)
    grid = as_pair(grid) if grid is not None and math.prod(as_pair(grid)) == few and of_tokens.key_size else None
    gathers = {"query_size": grid, "query_prefix": 0}
    reads = {"key_size": grid, "prefix": 0}
    return [
        _made(call, known, (batch, heads, queries, keys), of_tokens, both),
        _made(call, known, (batch, heads, few, keys), Places(**vars(of_tokens) | gathers), gather, GATHER),
        _made(call, known, (batch, heads, queries, few), Places(**vars(of_tokens) | reads), read, READ),
    ]


# Attention of tokens


def _of_softmax(call: Call, known: Surroundings) -> AttentionMap:
    spelled = call.arguments["probabilities"].detach()
    batch, _, queries, keys = spelled.shape
    count = batch // len(known.images)
    if count == 1 and math.prod(call.frames[-1].first_shape[1:-1]) not in (queries, keys):  # of channels, say
        places = Places(windows=(count, 1))
    else:
        places = places_of_tokens(call, count, queries, keys, known)
    return _made(call, known, spelled.shape, places, lambda rows: spelled[:, :, rows.to(spelled.device)])


def _of_sdpa(call: Call, known: Surroundings) -> AttentionMap:
    given = call.arguments
    q, k, mask = given["query"].detach(), given["key"].detach(), given.get("attn_mask")
    if heads := folded_heads(call):  # (B * heads, N, d)
        if mask is not None and mask.dim() == 3 and len(mask) == len(q):
            mask = mask.unflatten(0, (-1, heads))
        q, k = (tokens.unflatten(0, (-1, heads)) for tokens in (q, k))
    scale = q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    wide = accumulator(q.dtype)
    if given.get("enable_gqa"):
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)

    def rows_of(rows: Tensor) -> Tensor:
        rows = rows.to(q.device)
        logits = torch.matmul(q[..., rows, :].to(wide) * scale, k.to(wide).mT)
        if given.get("is_causal"):
            later = torch.arange(k.shape[-2], device=q.device) > rows[:, None]
            logits = logits.masked_fill(later, -torch.inf)
        if mask is not None:
            part = mask.detach().expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])[..., rows, :]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part.to(wide)
        return logits.softmax(-1).flatten(0, -4)

    batch, queries, keys = math.prod(q.shape[:-3]), q.shape[-2], k.shape[-2]
    places = places_of_tokens(call, batch // len(known.images), queries, keys, known)
    return _made(call, known, (batch, q.shape[-3], queries, keys), places, rows_of)
