"""Where the tokens of attention lie: maps, windows, tokens before a map, from what the modules around a call say."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Call, Frame

Size = tuple[int, int]
MOST_APART = 1.3  # of the proportions of a guessed map and of the image


@dataclass(frozen=True)
class Places:
    """Where the queries and the keys of a call lie; the fields are those of `AttentionMap`."""

    query_size: Size | None = None
    key_size: Size | None = None
    query_prefix: int = 0
    prefix: int = 0
    windows: Size = (1, 1)
    shift: Size = (0, 0)
    map_size: Size | None = None


@dataclass(frozen=True)
class Surroundings:
    """What is known of a model before any call.

    Attributes:
        images: (B, C, H, W).
        prefix: tokens before those of a map.
        grid: (rows, columns) of the model's patches; None: not known.
        is_reordered: tokens do not lie row by row (Hiera), so that tokens have no place.
    """

    images: Tensor
    prefix: int
    grid: Size | None
    is_reordered: bool = False

    @staticmethod
    def of(model: nn.Module, images: Tensor) -> "Surroundings":
        counts = (getattr(module, "num_prefix_tokens", None) for module in model.modules())
        prefix = next((count for count in counts if isinstance(count, int)), 0)
        embeds: Iterator[Any] = (m for m in model.modules() if hasattr(m, "dynamic_feat_size"))
        embed = next(embeds, None)
        grid = None if embed is None else as_pair(embed.dynamic_feat_size(tuple(images.shape[-2:])))
        return Surroundings(images, prefix, grid, any(hasattr(module, "unroll") for module in model.modules()))

    def shape_apart(self, size: Size) -> float:
        """How far the proportions of a map are from those of the images, as a logarithm."""
        return abs(math.log(size[0] / size[1]) - math.log(self.images.shape[-2] / self.images.shape[-1]))


def unrolled(places: Tensor, shift: int, length: int) -> Tensor:
    """Return where the tokens of an axis that was rolled by -shift, and then padded, lie on the map.

    Args:
        places: on the rolled axis, in tokens.
        length: of the axis without padding, tokens; padding stays behind its end.
    """
    return torch.where(places < length, (places + shift) % length, places)


def as_pair(value: Any) -> Size:
    both = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    return both[0], both[1]


def places_of_maps(call: Call, count: int, query_size: Size, key_size: Size, known: Surroundings) -> Places:
    """Places of an op on maps, each of `count` windows of an image."""
    windows = tiles_of(call.frames, count, query_size, known)
    if windows is None:
        return Places(windows=(count, 1))
    whole = [windows[i] * max(query_size[i], key_size[i]) for i in (0, 1)]
    size = _unpadded(call.frames, (whole[0], whole[1]), known)
    return Places(query_size, key_size, windows=windows, map_size=size)


def places_of_tokens(call: Call, count: int, queries: int, keys: int, known: Surroundings) -> Places:
    """Places of attention of tokens, each of `count` windows of an image."""
    if known.is_reordered:
        return Places(windows=(count, 1))
    if count > 1:
        return _of_tiles(call.frames, count, queries, keys, known)
    of_layer = attribute(call.frames, "prefix_tokens", None)
    counts = dict.fromkeys(n for n in (of_layer, known.prefix, 0) if isinstance(n, int))
    most = max(queries, keys)
    for find in (_stated, _guessed):
        for before in counts:
            if (size := find(call.frames, most - before, known)) is not None:
                (of_queries, first), (of_keys, prefix) = (_side(n, size, before) for n in (queries, keys))
                return Places(of_queries, of_keys, first, prefix, map_size=size)
    return Places()


def tiles_of(frames: Sequence[Frame], count: int, window: Size, known: Surroundings) -> Size | None:
    """How many windows, by rows and columns, the map of an image is cut into; its size is that of a module's input."""
    if count == 1:
        return 1, 1
    for frame in reversed(frames):
        for height, width in _readings(frame.first_shape, known):
            cut = -(-height // window[0]), -(-width // window[1])
            if math.prod(cut) == count:
                return cut
    return None


def attribute(frames: Sequence[Frame], name: str, default: Any) -> Any:
    """An attribute of the innermost module that has it."""
    return next((getattr(f.module, name) for f in reversed(frames) if hasattr(f.module, name)), default)


def _readings(shape: tuple[int, ...], known: Surroundings) -> list[Size]:
    """The maps that (B, H, W, C) or (B, C, H, W) may be, for all images."""
    return [as_pair(shape[1:3]), as_pair(shape[2:4])] if len(shape) == 4 and shape[0] == len(known.images) else []


def _inputs(frames: Sequence[Frame], known: Surroundings) -> Iterator[Size]:
    """The maps that go into the modules around a call, innermost first; the image is none."""
    for frame in reversed(frames[1:]):
        if readings := _readings(frame.first_shape, known):
            yield min(readings, key=known.shape_apart)


def _unpadded(frames: Sequence[Frame], whole: Size, known: Surroundings) -> Size:
    """The map that was padded to `whole`."""
    inside = (size for size in _inputs(frames, known) if size[0] <= whole[0] and size[1] <= whole[1])
    return min(inside, key=math.prod, default=whole)


def _stated(frames: Sequence[Frame], tokens: int, known: Surroundings) -> Size | None:
    """The map of so many tokens that a module around the call was given, or that the patches form."""
    given = [frame.size for frame in reversed(frames) if frame.size is not None]
    sizes = [*given, *_inputs(frames, known), *([] if known.grid is None else [known.grid])]
    return next((size for size in sizes if math.prod(size) == tokens), None)


def _guessed(frames: Sequence[Frame], tokens: int, known: Surroundings) -> Size | None:
    """The map of so many tokens in the proportion of the images; None where no rectangle is like them.

    A module that was given a size says of how many tokens its map is: others are what is left of it.
    """
    pairs = [(n, tokens // n) for n in range(1, max(tokens, 0) + 1) if tokens % n == 0]
    if not pairs or any(frame.size is not None for frame in frames):
        return None
    best = min(pairs, key=known.shape_apart)
    return best if known.shape_apart(best) < math.log(MOST_APART) else None


def _side(tokens: int, size: Size, before: int) -> tuple[Size | None, int]:
    """The map and the tokens before it, of the queries or the keys of a layer with such a map."""
    whole = math.prod(size)
    if tokens in (whole, whole + before):
        return size, tokens - whole
    if tokens <= before:
        return None, tokens
    for step in range(2, max(size) + 1):
        for pooled in ((size[0] // step, size[1] // step), (-(-size[0] // step), -(-size[1] // step))):
            if math.prod(pooled) == tokens:
                return pooled, 0
    return None, 0


def _of_tiles(frames: Sequence[Frame], count: int, queries: int, keys: int, known: Surroundings) -> Places:
    for window in _window_sizes(frames, known):
        windows = tiles_of(frames, count, window, known)
        if math.prod(window) == queries == keys and windows is not None:
            shift = as_pair(attribute(frames, "shift_size", attribute(frames, "shift", 0)))
            whole = windows[0] * window[0], windows[1] * window[1]
            return Places(window, window, windows=windows, shift=shift, map_size=_unpadded(frames, whole, known))
    return Places(windows=(count, 1))


def _window_sizes(frames: Sequence[Frame], known: Surroundings) -> Iterator[Size]:
    """The windows that the modules around a call may cut: Swin's, squares, CSwin's stripes."""
    if (size := attribute(frames, "window_size", None)) is not None:
        yield as_pair(size)
    if isinstance(side := attribute(frames, "side", None), int):
        yield side, side
    if isinstance(stripe := attribute(frames, "stripe", None), int):
        for height, width in _inputs(frames, known):
            yield (height, stripe) if attribute(frames, "upright", False) else (stripe, width)
