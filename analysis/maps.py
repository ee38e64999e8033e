"""The attention probabilities of every layer of a model, from the queries and keys that its layers compute.

Our ops    the reference body is linear in the values: its derivative by the values of a key is the probability of that
           key. So every op is covered, biases, masks and padding included, without a second definition.
timm's     the softmax of scaled_dot_product_attention's arguments; where a layer spells its softmax out, that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import evaluating
from ..attention_ops._attend import accumulator
from ..attention_ops._op import OPS, Impl
from .capture import SDPA, SOFTMAX, Call, Frame, Part, parts_of, watching

Size = tuple[int, int]


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one layer (or branch of a layer) on some images; probabilities are computed when asked for.

    Attributes:
        layer: name of the module.
        op: name of our op, "scaled_dot_product_attention", or "softmax" where a layer spells attention out.
        branch: "high" or "low" of HiLo, "" elsewhere.
        images, heads: numbers of them.
        query_size, key_size: (rows, columns) of the tokens of one window; None where tokens have no place on a map.
        prefix: tokens before those of the map: class token, registers.
        windows: (rows, columns) of windows that attend by themselves, (1, 1) where the whole map does.
        shift: (rows, columns) by which the map was rolled up and left before it was cut into windows.
    """

    layer: str
    op: str
    branch: str
    images: int
    heads: int
    query_size: Size | None
    key_size: Size | None
    prefix: int
    windows: Size
    shift: Size
    queries: int
    keys: int
    _rows: Callable[[Tensor], Tensor] = field(repr=False)

    def probabilities(self, queries: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return how much each query attends to each key, float32 at least.

        Cost: memory for images * windows * heads * queries * keys numbers. Ops on maps run their reference body once,
        and backward once per head_dim queries.

        Args:
            queries: places in the window, prefix tokens first; all when None.

        Returns:
            (images * windows, heads, queries, keys), windows of an image row by row. Rows sum to 1, but for halo
            attention, which also attends to zeros outside of the map.

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
        size = self.key_size if of == "key" else self.query_size
        if size is None or self.query_size is None or self.key_size is None:
            return None
        axes = []
        for i in (0, 1):
            window = max(self.query_size[i], self.key_size[i])
            inside = (torch.arange(size[i], dtype=torch.float64) + 0.5) * window / size[i] - 0.5
            of_windows = torch.arange(self.windows[i], dtype=torch.float64)[:, None] * window + inside
            axes.append((of_windows + self.shift[i]) % (window * self.windows[i]) if self.shift[i] else of_windows)
        rows = axes[0][:, None, :, None].expand(-1, self.windows[1], -1, size[1])
        cols = axes[1][None, :, None, :].expand(self.windows[0], -1, size[0], -1)
        places = torch.stack([rows, cols], -1).flatten(2, 3).flatten(0, 1)
        return torch.cat([torch.full((len(places), self.prefix, 2), torch.nan, dtype=torch.float64), places], 1)


def attention_maps(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> list[AttentionMap]:
    """Run a model on images, and return the attention of every layer in the order of the calls.

    Works for our families that attend (gates and large kernels have no queries and keys), and for models that call
    scaled_dot_product_attention, or a softmax in a module with `num_heads`, such as timm's ViTs and Swins.

    Cost: one forward pass, in eval mode; the queries and keys of all layers stay in memory as long as the result does.

    Args:
        images: (B, C, H, W), preprocessed.
        layers: names of modules; None: all.

    Raises:
        ValueError: a named layer makes no call of attention, or no layer does.
    """
    found: list[AttentionMap] = []

    def see(call: Call, out: Any) -> Any:
        if layers is None or call.layer in layers:
            found.extend(_maps_of(call, images, getattr(model, "num_prefix_tokens", 0)))
        return out

    with evaluating(model), torch.no_grad(), watching(model, see):
        model(images)
    missing = sorted(set(layers or ()) - {one.layer for one in found})
    if missing or not found:
        where = f"layers {', '.join(missing)}" if missing else "any layer"
        raise ValueError(f"attention_maps: saw no attention in {where} of {type(model).__name__}")
    return found


def _maps_of(call: Call, images: Tensor, prefix: int) -> list[AttentionMap]:
    if call.op == SDPA:
        return [_of_sdpa(call, images, prefix)]
    if call.op == SOFTMAX:
        spelled = call.arguments["probabilities"].detach()
        return [_of_tokens(call, images, prefix, spelled.shape, lambda rows: spelled[:, :, rows.to(spelled.device)])]
    if call.op == "channel_attention":
        return [_of_channels(call, images)]
    return [_of_part(call, part, images, prefix) for part in parts_of(call)]


# Our ops


def _of_part(call: Call, part: Part, images: Tensor, prefix: int) -> AttentionMap:
    def rows_of(rows: Tensor) -> Tensor:
        return _by_derivative(call.op, part, rows)

    if part.q.dim() == 4:  # tokens: (B, N, heads, d)
        shape = (part.q.shape[0], part.q.shape[2], part.q.shape[1], part.k.shape[1])
        return _of_tokens(call, images, prefix, shape, rows_of)
    q_size, k_size = _pair(part.q.shape[1:3]), _pair(part.k.shape[1:3])
    windows = _windows(call.frames, len(part.q) // len(images), q_size)
    return AttentionMap(
        call.layer, call.op, part.branch, len(images), part.q.shape[3], q_size if windows else None,
        k_size if windows else None, 0, windows or (len(part.q) // len(images), 1), (0, 0),
        math.prod(q_size), math.prod(k_size), rows_of,
    )  # fmt: skip


def _by_derivative(op: str, part: Part, rows: Tensor) -> Tensor:
    """Probabilities of the queries `rows` -> (B, heads, rows, keys): one channel of the values for each query.

    out[query, channel] = sum over keys of P[query, key] * values[key, channel], so that the gradient of out[rows[c], c]
    by values[:, c] is P[rows[c]].
    """
    wide = accumulator(part.q.dtype)
    width = part.v.shape[-1]
    values = torch.zeros(part.v.shape, dtype=wide, device=part.v.device, requires_grad=True)
    arguments = {name: _widened(value, wide) for name, value in part.with_values(values).items()}
    with torch.enable_grad(), torch.autocast(part.v.device.type, enabled=False):
        out = OPS[op](**arguments | {"impl": Impl.REFERENCE.value})
    out = out[0] if isinstance(out, tuple) else out
    own = range(part.heads.start, part.heads.stop)
    alone = part.v.shape[-2] == len(own)  # every query head has a key head of its own: all at once
    found = []
    for chunk in rows.to(out.device).split(width):
        grads = [_pulled(out, values, chunk, heads) for heads in ([part.heads] if alone else own)]
        by_head = grads[0] if alone else torch.stack([grad.sum(2) for grad in grads], 2)  # (B, keys, heads, chunk)
        found.append(by_head.permute(0, 2, 3, 1))
    return torch.cat(found, 2) if found else out.new_zeros(len(out), len(own), 0, values.flatten(1, -3).shape[1])


def _pulled(out: Tensor, values: Tensor, rows: Tensor, heads: slice | int) -> Tensor:
    """The derivative of out[rows[c], heads, c] by the values: (B, keys, heads of the values, len(rows))."""
    probe = torch.zeros(out.shape, dtype=out.dtype, device=out.device)
    probe.flatten(1, -3)[:, rows, heads, torch.arange(len(rows), device=out.device)] = 1
    (grad,) = torch.autograd.grad(out, values, probe, retain_graph=True)
    return grad.flatten(1, -3)[..., : len(rows)]


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`, as they are without a graph; values, which have one, stay."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return [_widened(v, dtype) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.to(dtype)
    return value if not isinstance(value, nn.Parameter) else value.detach().to(dtype)


def _of_channels(call: Call, images: Tensor) -> AttentionMap:
    """Channel attention: queries and keys are the channels of a head."""
    q, k = call.arguments["q"].detach(), call.arguments["k"].detach()
    scale = q.shape[-1] ** -0.5 if call.arguments["scale"] is None else call.arguments["scale"]
    wide, width = accumulator(q.dtype), q.shape[-1]

    def rows_of(rows: Tensor) -> Tensor:
        queries = q.to(wide)[..., rows.to(q.device)]
        return (torch.einsum("bhwni,bhwnj->bnij", queries, k.to(wide)) * scale).softmax(-1)

    windows = (len(q) // len(images), 1)
    return AttentionMap(
        call.layer, call.op, "", len(images), q.shape[3], None, None, 0, windows, (0, 0), width, width, rows_of
    )


# Attention of tokens


def _of_sdpa(call: Call, images: Tensor, prefix: int) -> AttentionMap:
    given = call.arguments
    q, k, mask = given["query"].detach(), given["key"].detach(), given.get("attn_mask")
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

    shape = (math.prod(q.shape[:-3]), q.shape[-3], q.shape[-2], k.shape[-2])
    return _of_tokens(call, images, prefix, shape, rows_of)


def _of_tokens(
    call: Call, images: Tensor, prefix: int, shape: tuple[int, ...], rows_of: Callable[[Tensor], Tensor]
) -> AttentionMap:
    """`shape`: (images * windows, heads, queries, keys)."""
    batch, heads, queries, keys = shape
    count = batch // len(images)
    size, windows, shift, before = None, None, (0, 0), 0
    if count > 1:
        size = _window_size(call.frames, queries)
        windows = None if size is None else _windows(call.frames, count, size)
        shift = _pair(_attribute(call.frames, "shift_size", 0)) if windows else (0, 0)
    elif queries == keys and not (call.op == SOFTMAX and math.prod(call.frames[-1].first_shape[1:-1]) != queries):
        before = next((n for n in dict.fromkeys((prefix, 0)) if _grid(queries - n, images) is not None), 0)
        size, windows = _grid(queries - before, images), (1, 1)
    if size is None or windows is None:
        size, windows, shift, before = None, (count, 1), (0, 0), 0
    return AttentionMap(
        call.layer, call.op, "", len(images), heads, size, size, before, windows, shift, queries, keys, rows_of
    )


def _grid(tokens: int, images: Tensor) -> Size | None:
    """The sides of a map of so many tokens, in the proportion of the images; None where no rectangle is like them."""
    wanted = math.log(images.shape[-2] / images.shape[-1])
    pairs = [(n, tokens // n) for n in range(1, max(tokens, 0) + 1) if tokens % n == 0]
    if not pairs:
        return None
    best = min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1]) - wanted))
    return best if abs(math.log(best[0] / best[1]) - wanted) < math.log(1.3) else None


def _windows(frames: Sequence[Frame], count: int, window: Size) -> Size | None:
    """How many windows, by rows and columns, the map of an image is cut into; its size is that of a module's input."""
    if count == 1:
        return 1, 1
    for frame in reversed(frames):
        if len(shape := frame.first_shape) == 4:
            for height, width in (shape[1:3], shape[2:4]):  # (B, H, W, C) or (B, C, H, W)
                cut = -(-height // window[0]), -(-width // window[1])
                if math.prod(cut) == count:
                    return cut
    return None


def _window_size(frames: Sequence[Frame], tokens: int) -> Size | None:
    size = _attribute(frames, "window_size", None)
    return _pair(size) if size is not None and math.prod(_pair(size)) == tokens else None


def _attribute(frames: Sequence[Frame], name: str, default: Any) -> Any:
    """An attribute of the innermost module that has it."""
    return next((getattr(f.module, name) for f in reversed(frames) if hasattr(f.module, name)), default)


def _pair(value: Any) -> Size:
    both = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    return both[0], both[1]
