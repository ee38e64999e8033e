"""Where the attention of a head goes: distance, strength by distance, share of the class token, entropy.

The quantities are named after Li et al. 2023, arXiv:2303.13731 (How Does Attention Work in Vision Transformers?), whose
exact normalizations were not available; those here are defined below.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .maps import AttentionMap, attention_maps
from .places import Size

CHUNK = 1024  # queries whose probabilities are in memory at a time


@dataclass(frozen=True)
class Profile:
    """Where attention goes; every field is (images, heads), or (images, heads, hops), in float64.

    A hop is the Chebyshev distance between two tokens of the map, 0 for the token itself. Fields are None where tokens
    have no place on a map, or where there is no class token.

    Attributes:
        strength_sum: mean over the queries of the map, of the attention that a query puts on all tokens at a hop. With
            the attention on the tokens before the map, it sums to 1.
        strength_mean: mean over the queries that have tokens at a hop, of the attention per token at that hop.
        mean_distance: Euclidean distance in tokens, weighted by the attention to tokens of the map, mean over queries.
        patch_to_class: mean over the queries of the map, of the attention to the tokens before the map.
        class_to_class: attention of the first token to itself.
        entropy: mean over all queries, of the Shannon entropy in nats.
    """

    strength_sum: Tensor | None
    strength_mean: Tensor | None
    mean_distance: Tensor | None
    patch_to_class: Tensor | None
    class_to_class: Tensor | None
    entropy: Tensor


@dataclass(frozen=True)
class HeadProfile:
    """The profile of one layer, or of one branch of it."""

    layer: str
    op: str
    branch: str
    profile: Profile


def profile(probabilities: Tensor, size: Size | None, prefix: int = 0, key_size: Size | None = None) -> Profile:
    """Return the profile of given probabilities.

    Args:
        probabilities: (images, heads, queries, keys).
        size: (rows, columns) of the map of the queries; None: tokens have no place.
        prefix: tokens before those of the map, in queries and keys.
        key_size: of the map of the keys; as `size` when None.

    Raises:
        ValueError: the sizes do not fit the numbers of queries and keys.
    """
    queries, keys = probabilities.shape[2:]
    if size is not None:
        key_size = key_size or size
        if (size[0] * size[1] + prefix, key_size[0] * key_size[1] + prefix) != (queries, keys):
            raise ValueError(f"profile: {queries} queries, {keys} keys are not {prefix} + maps {size}, {key_size}")
    rows = torch.arange(queries)
    return _finished(_sums(probabilities, rows, (size, key_size), (prefix, prefix)), len(rows))


def head_profiles(
    model: nn.Module, images: Tensor, layers: Sequence[str] | None = None, most_queries: int | None = None
) -> list[HeadProfile]:
    """Return the profile of every layer that attends, in the order of the calls; windows of an image are averaged.

    Cost: that of `attention_maps`, and of all probabilities, of 1024 queries at a time.

    Args:
        images: (B, C, H, W), preprocessed.
        layers: names of modules; None: all.
        most_queries: of a window; if it has more, that many, evenly spaced, stand for all. The tokens before a map are
            always among them.

    Raises:
        ValueError: no layer attends, a named one does not, or most_queries is below 1.
    """
    if most_queries is not None and most_queries < 1:
        raise ValueError(f"head_profiles: most_queries must be at least 1, got {most_queries}")
    found = []
    for one in attention_maps(model, images, layers):
        rows = _chosen(one, most_queries)
        total: dict[str, Tensor] = {}
        for chunk in rows.split(CHUNK):
            sums = _sums(
                one.probabilities(chunk), chunk, (one.query_size, one.key_size), (one.query_prefix, one.prefix)
            )
            total = {name: value + total[name] if total else value for name, value in sums.items()}
        whole = _finished(total, len(rows))
        found.append(HeadProfile(one.layer, one.op, one.branch, _over_windows(whole, one.images)))
    return found


def _chosen(one: AttentionMap, most: int | None) -> Tensor:
    if most is None or one.queries - one.query_prefix <= most:
        return torch.arange(one.queries)
    of_map = torch.linspace(one.query_prefix, one.queries - 1, most).round().long().unique()
    return torch.cat([torch.arange(one.query_prefix), of_map])


def _over_windows(of_windows: Profile, images: int) -> Profile:
    values = {f.name: getattr(of_windows, f.name) for f in fields(of_windows)}
    means: dict[str, Any] = {n: None if v is None else v.unflatten(0, (images, -1)).mean(1) for n, v in values.items()}
    return Profile(**means)


def _places(size: Size, like: Size) -> Tensor:
    """(tokens, 2) float64: the tokens of a map in units of those of the finer of two maps."""
    axes = []
    for own, other in zip(size, like, strict=True):
        axes.append((torch.arange(own, dtype=torch.float64) + 0.5) * max(own, other) / own - 0.5)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


def _hops(size: Size, key_size: Size) -> int:
    return max(*size, *key_size)


def _rings(hop: Tensor, count: int) -> Iterator[Tensor]:
    yield from (hop == k for k in range(count))


def _sums(
    probs: Tensor, rows: Tensor, sizes: tuple[Size | None, Size | None], prefixes: tuple[int, int]
) -> dict[str, Tensor]:
    """Sums over the queries `rows`, whose probabilities are (B, heads, rows, keys), and counts of queries.

    `sizes` and `prefixes` are those of queries and of keys.
    """
    probs = probs.detach().double().cpu()
    (size, key_size), (query_prefix, prefix) = sizes, prefixes
    sums = {"entropy": torch.special.entr(probs).sum((-1, -2))}
    if prefix and query_prefix:
        of_class = probs[:, :, rows == 0, 0].sum(-1)
        sums["class"] = of_class if bool((rows == 0).any()) else torch.zeros_like(of_class)
    if size is None or key_size is None:
        return sums
    on_map = rows >= query_prefix
    places, key_places = _places(size, key_size), _places(key_size, size)
    away = places[rows[on_map] - query_prefix][:, None] - key_places  # (queries, keys, 2)
    hop, distance = away.abs().amax(-1).round().long(), away.norm(dim=-1)
    of_map = probs[:, :, on_map]
    weights = of_map[..., prefix:]
    if prefix:
        sums["prefix"] = of_map[..., :prefix].sum((-1, -2))
    sums["distance"] = ((weights * distance).sum(-1) / weights.sum(-1)).sum(-1)
    strength, mean, having = [], [], []
    for ring in _rings(hop, _hops(size, key_size)):
        by_query, count = (weights * ring).sum(-1), ring.sum(-1)
        strength.append(by_query.sum(-1))
        mean.append((by_query / count.clamp(min=1)).sum(-1))
        having.append((count > 0).sum())
    sums |= {"strength": torch.stack(strength, -1), "mean": torch.stack(mean, -1), "having": torch.stack(having)}
    sums["queries"] = on_map.sum()
    return sums


def _finished(sums: dict[str, Tensor], queries: int) -> Profile:
    of_map: Any = sums.get("queries")
    means = {name: None if name not in sums else sums[name] / of_map for name in ("strength", "distance", "prefix")}
    return Profile(
        strength_sum=means["strength"],
        strength_mean=None if of_map is None else sums["mean"] / sums["having"].clamp(min=1),
        mean_distance=means["distance"],
        patch_to_class=means["prefix"],
        class_to_class=sums.get("class"),
        entropy=sums["entropy"] / queries,
    )
