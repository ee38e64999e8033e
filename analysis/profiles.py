"""Where the attention of a head goes: distance, strength by distance, share of the class token, entropy.

The quantities are named after Li et al. 2023, arXiv:2303.13731 (How Does Attention Work in Vision Transformers?), whose
exact normalizations were not available; those here are defined below.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .maps import AttentionMap, Size, attention_maps

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
    return _finished(_sums(probabilities, rows, size, key_size, prefix), size, key_size, prefix, queries)


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
            sums = _sums(one.probabilities(chunk), chunk, one.query_size, one.key_size, one.prefix)
            total = {name: value + total[name] if total else value for name, value in sums.items()}
        whole = _finished(total, one.query_size, one.key_size, one.prefix, len(rows))
        found.append(HeadProfile(one.layer, one.op, one.branch, _over_windows(whole, one.images)))
    return found


def _chosen(one: AttentionMap, most: int | None) -> Tensor:
    if most is None or one.queries - one.prefix <= most:
        return torch.arange(one.queries)
    of_map = torch.linspace(one.prefix, one.queries - 1, most).round().long().unique()
    return torch.cat([torch.arange(one.prefix), of_map])


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


def _sums(probs: Tensor, rows: Tensor, size: Size | None, key_size: Size | None, prefix: int) -> dict[str, Tensor]:
    """Sums over the queries `rows`, whose probabilities are (B, heads, rows, keys), and counts of queries."""
    probs = probs.detach().double().cpu()
    sums = {"entropy": torch.special.entr(probs).sum((-1, -2))}
    if prefix and bool((rows == 0).any()):
        sums["class"] = probs[:, :, rows == 0, 0].sum(-1)
    if prefix:
        sums.setdefault("class", torch.zeros(probs.shape[:2], dtype=torch.float64))
    if size is None or key_size is None:
        return sums
    on_map = rows >= prefix
    places, key_places = _places(size, key_size), _places(key_size, size)
    away = places[rows[on_map] - prefix][:, None] - key_places  # (queries, keys, 2)
    hop, distance = away.abs().amax(-1).round().long(), away.norm(dim=-1)
    of_map = probs[:, :, on_map]
    weights = of_map[..., prefix:]
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


def _finished(sums: dict[str, Tensor], size: Size | None, key_size: Size | None, prefix: int, queries: int) -> Profile:
    mapped = size is not None and key_size is not None
    of_map: Any = sums["queries"] if mapped else None
    return Profile(
        strength_sum=sums["strength"] / of_map if mapped else None,
        strength_mean=sums["mean"] / sums["having"].clamp(min=1) if mapped else None,
        mean_distance=sums["distance"] / of_map if mapped else None,
        patch_to_class=sums["prefix"] / of_map if mapped and prefix else None,
        class_to_class=sums["class"] if prefix else None,
        entropy=sums["entropy"] / queries,
    )
