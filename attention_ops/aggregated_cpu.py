"""Aggregated attention on a CPU: chunks of map rows, and only the pairs of a token and a head whose gate is not 0.

A chunk holds the logits of some rows of some images, so that memory grows with the map and not with its square; the
backward pass computes a chunk again, unless one chunk of pooled keys is all. Where gates leave out enough pairs, the
tokens that each head keeps are put side by side: heads of about equal numbers of tokens form one batch of products.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import EagerBody, accumulator
from ._graph.aggregated import aggregated_attention_graph, gated, log_keys_seen, offsets, pair_bias
from .aggregated_parts import Local, Pooled
from .neighbors import NeighborDots, Neighbors, NeighborSums, PutRows, TakeRows, sums

CHUNK_LOGITS = 1 << 19  # alive at once, per thread: they stay in a CPU's cache (see tiled_attention.py)
MOST_KEPT = 0.3  # of the pairs: above, putting tokens side by side costs more than it saves
MOST_EXPONENT = 60.0  # of a local logit above the pooled ones, before float32 overflows
MOST_FILLED = 1.25  # a group in a batch of groups is filled up to at most about so many times its tokens


class Part(NamedTuple):
    """A chunk: some images, and some rows of their maps."""

    images: slice
    first: int
    last: int
    height: int  # of the whole map
    halo: int  # rows of local keys past the chunk's own

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    @property
    def key_rows(self) -> slice:
        return slice(max(self.first - self.halo, 0), min(self.last + self.halo, self.height))

    def of(self, tensors: Sequence[Any]) -> list[Any]:
        """Views of q, pooled k and v, local k and v, gates; the other tensors are parameters, whole."""
        q, k, v, local_k, local_v, gates, *parameters = tensors
        keys = [None if t is None else t[self.images, self.key_rows] for t in (local_k, local_v)]
        of_gates = None if gates is None else gates[self.images, self.rows]
        return [q[self.images, self.rows], k[self.images], v[self.images], *keys, of_gates, *parameters]


class AggregatedBody(EagerBody):
    """Tensors: q, pooled k and v, local k and v, gates, embedding, temperature, pooled bias, local bias, tokens,
    token bias.

    Args:
        rows, cols: the cells of the pooled bias, as the op takes them.
    """

    def __init__(self, rows: Tensor, cols: Tensor) -> None:
        self.rows, self.cols = rows, cols

    def forward(self, *tensors: Any) -> Tensor:
        q, v = tensors[0], tensors[2]
        out, bias, of_rows = q.new_empty(*q.shape[:4], v.shape[3]), None, None
        for part in self._parts(*tensors):
            if of_rows != part.rows:  # else the bias of the images before
                bias, of_rows = self._bias(part, tensors[8]), part.rows
            out[part.images, part.rows] = _Chunk(part, part.of(tensors), bias).attend()
        return out

    def _bias(self, part: Part, table: Tensor) -> Tensor:
        """(heads, n, P): the bias of every token of a chunk and every pooled key."""
        return pair_bias(table.to(accumulator(table.dtype)), self.rows[part.rows], self.cols)

    def backward(self, out: Any, grad: Tensor, *tensors: Any) -> list[Tensor | None]:
        wide = accumulator(tensors[0].dtype)
        totals = [None if t is None else torch.zeros_like(t, dtype=wide) for t in tensors]
        for part in self._parts(*tensors):
            leaves = [None if t is None else t.detach().requires_grad_() for t in part.of(tensors)]
            with torch.enable_grad():
                result = _Chunk(part, leaves, self._bias(part, leaves[8])).attend()
            given = [t for t in leaves if t is not None]
            grads = torch.autograd.grad(result, given, grad[part.images, part.rows], allow_unused=True)
            places = [t for t in part.of(totals) if t is not None]
            for place, more in zip(places, grads, strict=True):
                if more is not None:
                    place += more
        return [
            None if total is None else total.to(t.dtype) for total, t in zip(totals, tensors, strict=True)
        ]  # fmt: skip

    def graph(self, *tensors: Any) -> Tensor:
        q, k, v, local_k, local_v, gates, embedding, temperature, table, bias, tokens, token_bias = tensors
        pooled, local = Pooled(k, v, table, self.rows, self.cols), Local(local_k, local_v, bias, tokens, token_bias)
        return aggregated_attention_graph(q, pooled, local, embedding, temperature, gates)

    def _parts(self, *tensors: Any) -> Iterator[Part]:
        q, k, bias = tensors[0], tensors[1], tensors[9]
        batch, height, width, heads, _ = q.shape
        halo, near = (0, 0) if bias is None else (bias.shape[1] // 2, bias[0].numel())
        most = torch.get_num_threads() * CHUNK_LOGITS
        of_row = max(heads * width * (k.shape[1] + near), 1)
        rows = max(1, min(height, most // of_row))
        images = max(1, most // (of_row * height)) if rows == height else 1
        for image in range(0, batch, images):
            for first in range(0, height, rows):
                yield Part(slice(image, image + images), first, min(first + rows, height), height, halo)


class Places(NamedTuple):
    """Where the local keys of a chunk lie, by pair: pair = (image * heads + head) * tokens + token."""

    index: Tensor  # (pairs, places) int32, rows of the table of local keys; any row where there is none
    inverse: Tensor  # (table rows, places) int32, the pair that sees a row at a place; -1 where there is none
    mask: Tensor  # (tokens, places) float32: 0, or -inf where a place lies outside the map


@lru_cache(maxsize=32)
def _places(
    batch: int, first: int, last: int, keys: tuple[int, int], width: int, heads: int, kernel: tuple[int, int],
    device: torch.device,
) -> Places:  # fmt: skip
    """Tables of the queries of rows `first` to `last`, whose keys are the rows `keys` of a map."""
    with torch.inference_mode(False):
        steps = torch.tensor(offsets(kernel), device=device)
        lines, height = last - first, keys[1] - keys[0]
        token, key = (torch.arange(n * width, device=device)[:, None] for n in (lines, height))
        image, head = torch.arange(batch, device=device), torch.arange(heads, device=device)

        def moved(place: Tensor, sign: int, shift: int, rows: int) -> tuple[Tensor, Tensor]:
            row, col = place // width + sign * steps[:, 0] + shift, place % width + sign * steps[:, 1]
            outside = (row < 0) | (row >= rows) | (col < 0) | (col >= width)
            return row.clamp(0, rows - 1) * width + col.clamp(0, width - 1), outside

        seen, outside = moved(token, 1, first - keys[0], height)
        per_image = height * width * heads
        index = image[:, None, None, None] * per_image + (seen * heads)[None, None] + head[None, :, None, None]
        seeing, none = moved(key, -1, keys[0] - first, lines)
        pair = (image[:, None, None, None] * heads + head[None, None, :, None]) * (lines * width) + seeing[
            None, :, None
        ]
        inverse = pair.masked_fill(none[None, :, None], -1).flatten(0, 2).to(torch.int32)
        return Places(index.flatten(0, 2).to(torch.int32), inverse, (~outside).float().log())


class _Chunk:
    """One chunk's tensors, in the dtype of sums; heads of images are groups, group = image * heads + head."""

    def __init__(self, part: Part, tensors: Sequence[Any], pooled_bias: Tensor) -> None:
        q, k, v, local_k, local_v, gates, embedding, temperature, _, bias, tokens, token_bias = tensors
        wide = accumulator(q.dtype)
        self.part, self.dtype, self.q, self.gates = part, q.dtype, q, gates
        self.batch, self.lines, self.width, self.heads, self.dim = q.shape
        self.near = None if bias is None else bias.flatten(1).to(wide)
        kernel = (0, 0) if bias is None else (bias.shape[1], bias.shape[2])
        self.keys = F.normalize(k.to(wide), dim=-1).transpose(1, 2).flatten(0, 1)  # (groups, P, d)
        self.values = v.to(wide).transpose(1, 2).flatten(0, 1)
        size, pooled = (part.height, self.width), k.shape[1]
        self.logs = log_keys_seen(size, kernel, pooled, q.device, wide)[part.rows].reshape(-1, 1)  # (n, 1)
        self.bias = pooled_bias.to(wide)  # (heads, n, P)
        self.embedding, self.temperature = embedding.to(wide), temperature.to(wide)
        if bias is not None:
            self.local_keys = F.normalize(local_k.to(wide), dim=-1).reshape(-1, self.dim)  # row by row, then heads
            self.local_values = local_v.to(wide).reshape(-1, local_v.shape[-1])
            self.tokens, self.token_bias = tokens.to(wide), token_bias.to(wide)
            keys = (part.key_rows.start, part.key_rows.stop)
            self.places = _places(self.batch, part.first, part.last, keys, self.width, self.heads, kernel, q.device)

    @property
    def tokens_of_group(self) -> int:
        return self.lines * self.width

    def attend(self) -> Tensor:
        buckets = None if self.gates is None else self._buckets()
        if buckets is None:
            queries = self.q.to(self.logs.dtype).permute(0, 3, 1, 2, 4).reshape(-1, self.tokens_of_group, self.dim)
            out = self._heads(queries, None, None).unflatten(0, (self.batch, self.heads))
            out = out.unflatten(2, (self.lines, self.width)).permute(0, 2, 3, 1, 4)
            return gated(out, self.gates).to(self.dtype)
        rows = self.q.to(self.logs.dtype).reshape(-1, self.dim)  # (image, token, head)
        outs, places = [], []
        for groups, tokens in buckets:
            image, head = groups // self.heads, groups % self.heads
            place = ((image[:, None] * self.tokens_of_group + tokens) * self.heads + head[:, None]).flatten()
            queries = TakeRows.apply(rows, place).view(*tokens.shape, self.dim)
            outs.append(self._heads(queries, groups, tokens).flatten(0, 1))
            places.append(place)
        place = torch.cat(places)
        gates = TakeRows.apply(self.gates.to(rows.dtype).reshape(-1, 1), place)
        kept = PutRows.apply(gated(torch.cat(outs), gates[:, 0]), place, len(rows))
        return kept.view(*self.q.shape[:4], -1).to(self.dtype)

    def _buckets(self) -> list[tuple[Tensor, Tensor]] | None:
        """Groups with about equally many kept tokens, and those tokens, (groups, tokens); None where most are kept.

        A shorter group is filled up with a token that it does not keep: the gate of 0 takes it out again.
        """
        kept = (self.gates != 0).permute(0, 3, 1, 2).reshape(-1, self.tokens_of_group)
        counts = kept.sum(1)
        if not kept.numel() or int(counts.sum()) > MOST_KEPT * kept.numel():
            return None
        order = counts.argsort(descending=True, stable=True)
        sizes = counts[order].tolist()
        full = sum(size == self.tokens_of_group for size in sizes)
        some = sum(size > 0 for size in sizes)
        middle = (full + some) // 2
        uneven = full < some and sizes[full] > MOST_FILLED * sizes[middle]
        cuts = {0, full, some, middle if uneven else some}
        found = []
        for start, end in pairwise(sorted(cuts)):
            groups, longest = order[start:end].sort()[0], sizes[start]  # images after each other stay in a cache
            part = kept.index_select(0, groups)
            if longest == self.tokens_of_group:
                tokens = torch.arange(longest, device=kept.device).expand(end - start, -1)
            else:
                group, token = part.nonzero(as_tuple=True)
                tokens = part.to(torch.uint8).argmin(1, keepdim=True).repeat(1, longest)  # a token that is not kept
                tokens[group, part.cumsum(1)[group, token] - 1] = token
            found.append((groups, tokens))
        return found or [(order[:0], order.new_empty(0, 1))]

    def _heads(self, queries: Tensor, groups: Tensor | None, tokens: Tensor | None) -> Tensor:
        """(groups, n, d) -> (groups, n, value_dim); all groups and tokens in order where none are given."""
        u, shape = F.normalize(queries, dim=-1), queries.shape[:2]
        keys, values = self.keys, self.values
        if groups is not None:
            keys, values = (x.index_select(0, groups) for x in (keys, values))
        logs = self._of_tokens(self.logs, tokens)
        factor = self._of_heads(self.temperature, groups)[:, None, None] * logs
        scaled = (u + self._of_heads(self.embedding, groups)[:, None]) * factor
        bias = self._bias_of(groups, tokens)
        fast = queries.device.type == "cpu" and not torch.is_grad_enabled() and values.shape[-1] == self.dim
        if self.near is None:
            if fast:
                return self._by_flash(scaled, keys, values, bias)[0]
            return torch.matmul(self._plus(torch.matmul(scaled, keys.mT), bias).softmax(-1), values)
        near, count = self._neighbors(groups, tokens), self.near.shape[1]
        local = NeighborDots.apply(scaled.flatten(0, 1), self.local_keys, near).view(*shape, count)
        mask = self._of_tokens(self.places.mask, tokens).to(u.dtype)
        local = self._plus(local, self._of_heads(self.near, groups, whole=False)[:, None] + mask)
        linear = torch.baddbmm(self._of_heads(self.token_bias, groups)[:, None], u, self._of_heads(self.tokens, groups))
        linear = torch.where(mask == 0, linear, 0)
        if fast:
            out, lse = self._by_flash(scaled, keys, values, bias)
            return self._joined(out, lse, local, linear, near)
        logits = self._plus(torch.matmul(scaled, keys.mT), bias)
        probs = torch.cat([local, logits], -1).softmax(-1)
        weights = (linear + probs[..., :count]).flatten(0, 1)
        out = NeighborSums.apply(weights, self.local_values, near).view(*shape, -1)
        return torch.baddbmm(out, probs[..., count:], values)

    def _joined(self, out: Tensor, lse: Tensor, local: Tensor, linear: Tensor, near: Neighbors) -> Tensor:
        """Attention to pooled keys with this log-sum-exp, and to local keys with these logits, in one softmax."""
        if not out.numel():
            return out
        local = local.sub_(lse[..., None])
        if float(local.max()) > MOST_EXPONENT:
            total = torch.logaddexp(local.logsumexp(-1, keepdim=True), torch.zeros_like(lse[..., None]))
            local, rest = (local - total).exp_(), (-total).exp_()
        else:
            local = local.exp_()
            rest = local.sum(-1, keepdim=True).add_(1).reciprocal_()
            local = local.mul_(rest)
        near_out = sums(linear.add_(local).flatten(0, 1), self.local_values, near.index)
        return near_out.view_as(out).addcmul_(out, rest)

    def _by_flash(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the pooled keys by torch's kernel for CPUs, which keeps no logits; also the log-sum-exp."""
        if not q.numel():
            return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[:2])
        q, k, v = (x.unflatten(0, (-1, len(bias))) for x in (q, k, v))  # all images have one bias
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, attn_mask=bias[None], scale=1.0)
        return out.flatten(0, 1), lse.flatten(0, 1)

    def _plus(self, x: Tensor, more: Tensor) -> Tensor:
        """Add what all images share: (groups, n, m) and (heads or groups, n, m)."""
        return (x.unflatten(0, (-1, len(more))) + more).flatten(0, 1) if len(more) else x

    def _of_heads(self, x: Tensor, groups: Tensor | None, whole: bool = True) -> Tensor:
        """(heads, ...) -> (groups, ...); with `whole=False`, all heads in order stay as they are."""
        if groups is not None:
            return x.index_select(0, groups % self.heads)
        return x.repeat(self.batch, *[1] * (x.dim() - 1)) if whole else x

    def _of_tokens(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """(n, m) -> (groups, tokens, m); all tokens in order stay as they are."""
        return x if tokens is None else x.index_select(0, tokens.flatten()).view(*tokens.shape, -1)

    def _bias_of(self, groups: Tensor | None, tokens: Tensor | None) -> Tensor:
        """(heads, n, P), or (groups, n, P): the bias of some tokens of some heads."""
        if groups is None or tokens is None:
            return self.bias
        place = (groups % self.heads)[:, None] * self.tokens_of_group + tokens
        return self.bias.flatten(0, 1).index_select(0, place.flatten()).view(*tokens.shape, -1)

    def _neighbors(self, groups: Tensor | None, tokens: Tensor | None) -> Neighbors:
        if groups is None or tokens is None:
            inverse = self.places.inverse
            return Neighbors(self.places.index, lambda: (inverse.clamp(min=0), inverse >= 0))
        pairs, index = (groups[:, None] * self.tokens_of_group + tokens).flatten(), self.places.index

        def inverse_of_some() -> tuple[Tensor, Tensor]:
            order = torch.full((len(index) + 1,), -1, device=index.device, dtype=index.dtype)  # the last one: none
            order[pairs] = torch.arange(len(pairs), device=index.device, dtype=index.dtype)
            found = order[self.places.inverse.long()]
            return found.clamp(min=0), found >= 0

        return Neighbors(index.index_select(0, pairs), inverse_of_some)


def aggregated_attention_tiled(
    q: Tensor, pooled: Pooled, local: Local, embedding: Tensor, temperature: Tensor, gates: Tensor | None
) -> Tensor:
    """Chunks of map rows, without the pairs whose gate is 0."""
    body = AggregatedBody(pooled.rows, pooled.cols)
    maps = (q, pooled.k, pooled.v, local.k, local.v, gates)
    tensors = (*maps, embedding, temperature, pooled.table, local.bias, local.tokens, local.token_bias)
    logits = q.shape[:4].numel() * pooled.k.shape[1]
    small = not local.given and logits <= torch.get_num_threads() * CHUNK_LOGITS and q.dtype == accumulator(q.dtype)
    return body.graph(*tensors) if small else body(*tensors)
