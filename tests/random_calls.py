"""Random calls of every op: sizes, options, dtypes and memory layouts from a seed, with the definition beside each.

    found = check(draw("neighborhood_attention", seed=7), impl="tiled")     None, or what is wrong

A call is compared with its definition in float64 (definitions.py) on the same rounded numbers: the output and all
gradients, for gradients of the output that are plain, expanded or transposed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import definitions
import token_calls  # type: ignore[import-not-found]
import torch
from torch import Tensor

from foveate import attention_ops as ops

ROUNDINGS = 200  # the error allowed, in roundings of the largest number of an output or of all gradients
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """One random call of an op."""

    name: str
    seed: int
    tensors: dict[str, Tensor]  # that have gradients
    run: Callable[..., Tensor]  # takes them in their order, and impl=
    define: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()  # whose gradients are asked for
    grad: str = "plain"

    def __str__(self) -> str:
        of_tensors = (f"{n} {tuple(t.shape)} strides {t.stride()}" for n, t in self.tensors.items())
        dtype = next(iter(self.tensors.values())).dtype
        return f"{self.name} seed {self.seed}: {dtype}, {'; '.join(of_tensors)}; {self.options}; grad {self.grad}"


def draw(name: str, seed: int, device: str = "cpu") -> Call:
    """Make the call of an op that belongs to a seed: the same one on every machine."""
    rng = random.Random(f"{name} {seed}")
    call = MAKERS[name](Maker(rng, rng.choice(DTYPES), device))
    call.name, call.seed = name, seed
    call.needed = frozenset(n for n in call.tensors if rng.random() < 0.8)
    call.grad = rng.choice(("plain", "plain", "expanded", "transposed"))
    return call


def check(call: Call, impl: str) -> str | None:
    """Run a call and its definition; return a line about the first disagreement, or None."""
    given = {n: t.detach().requires_grad_(n in call.needed) for n, t in call.tensors.items()}
    exact = {n: t.detach().double().requires_grad_() for n, t in call.tensors.items()}
    out, wanted = call.run(*given.values(), impl=impl), call.define(*exact.values())
    dtype = next(iter(given.values())).dtype
    if out.shape != wanted.shape or out.dtype != dtype:
        return f"{call}\n{impl} returns {out.dtype} {tuple(out.shape)}, wanted {dtype} {tuple(wanted.shape)}"
    if (worst := _error([out.detach()], [wanted.detach()], dtype)) > 1:
        return f"{call}\n{impl}: the output is {worst:.1f} times as far off as allowed"
    if not call.needed:
        return None
    grad = _gradient(call, wanted).to(dtype)
    grads = torch.autograd.grad(out, [given[n] for n in given if n in call.needed], grad)
    exacts = dict(zip(exact, torch.autograd.grad(wanted, list(exact.values()), grad.double()), strict=True))
    largest = max(float(g.abs().max()) for g in exacts.values())  # one that is zero may be as wrong as the others
    if (worst := _error(grads, [exacts[n] for n in given if n in call.needed], dtype, largest)) > 1:
        return f"{call}\n{impl}: gradients are {worst:.1f} times as far off as allowed"
    return None


def _error(found, wanted, dtype: torch.dtype, largest: float = 0.0) -> float:
    """The largest error over the allowed one."""
    if not all(torch.isfinite(f).all() for f in found):
        return float("inf")
    largest = max(largest, 1e-2, *(float(w.abs().max()) for w in wanted))
    errors = [float((f.double() - w).abs().max()) for f, w in zip(found, wanted, strict=True)]
    return max(errors) / (ROUNDINGS * torch.finfo(dtype).eps * largest)


def _gradient(call: Call, out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(call.seed)
    shape = [1 if call.grad == "expanded" and axis else size for axis, size in enumerate(out.shape)]
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).expand(out.shape)
    if call.grad == "transposed":
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    return grad.to(out.device)


class Maker:
    """Draws sizes and tensors of one call."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, device: str) -> None:
        self.rng, self.dtype, self.device = rng, dtype, device
        self.generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def between(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def pair(self, low: int, high: int) -> tuple[int, int]:
        return self.between(low, high), self.between(low, high)

    def one_of(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def scale(self) -> float | None:
        return self.one_of(None, None, 0.25, 1.0)

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Numbers of one dtype, in a memory layout of many."""
        layout = self.one_of("plain", "plain", "crop", "every other", "axes turned", "expanded")
        if layout == "crop":
            wide = self._numbers([size + self.between(0, 2) for size in shape], scale)
            return wide[tuple(slice(wide.shape[i] - n, None) for i, n in enumerate(shape))]
        if layout == "every other":
            return self._numbers([*shape[:-1], 2 * shape[-1]], scale)[..., ::2]
        if layout == "axes turned":
            order = self.rng.sample(range(len(shape)), len(shape))
            return self._numbers([shape[i] for i in order], scale).permute(*(order.index(i) for i in range(len(shape))))
        if layout == "expanded":
            return self._numbers([1, *shape[1:]], scale).expand(shape)
        return self._numbers(shape, scale)

    def _numbers(self, shape, scale: float) -> Tensor:
        numbers = torch.randn(list(shape), generator=self.generator, dtype=torch.float64) * scale
        return numbers.to(self.dtype).to(self.device)

    def qkv(self, batch: int, size: tuple[int, ...], heads: int, dim: int) -> dict[str, Tensor]:
        """Three maps, at times out of one packed tensor."""
        shape = (batch, *size, heads, dim)
        if self.rng.random() < 0.4:
            place = self.one_of(3, 4)  # (B, H, W, 3, heads, d) or (B, H, W, heads, 3, d)
            packed = self._numbers([*shape[:place], 3, *shape[place:]], 1.0)
            return dict(zip("qkv", packed.unbind(place), strict=True))
        return {name: self.tensor(*shape) for name in "qkv"}

    def qkv_of_any_width(self, batch: int, size: tuple[int, ...], heads: int, dim: int) -> dict[str, Tensor]:
        """Three maps; at times values are wider or narrower than keys."""
        tensors = self.qkv(batch, size, heads, dim)
        if self.rng.random() < 0.3:
            tensors["v"] = self.tensor(batch, *size, heads, self.between(1, 40))
        return tensors

    def of_attention(self) -> tuple[int, int, int]:
        """Batch, heads, width of a head."""
        return self.between(1, 3), self.between(1, 3), self.one_of(1, 3, 8, 16, 17, 24, 32, 40)


def joined(results: tuple[Tensor, Tensor]) -> Tensor:
    """The log-sum-exp as one more channel of the output."""
    out, lse = results
    assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


def agent_attention(make: Maker) -> Call:
    batch, heads, dim = make.of_attention()
    queries, keys, agents, scale = make.between(1, 90), make.between(1, 90), make.between(1, 30), make.scale()
    counts = {"q": queries, "k": keys, "v": keys, "agents": agents}
    tensors = {name: make.tensor(batch, count, heads, dim) for name, count in counts.items()}
    tensors |= {"bias_to": make.tensor(heads, agents, keys)} if make.one_of(True, False) else {}
    tensors |= {"bias_from": make.tensor(heads, queries, agents)} if make.one_of(True, False) else {}

    def run(*given, impl):
        return ops.agent_attention(**dict(zip(tensors, given, strict=True)), scale=scale, impl=impl)

    def define(*given):
        named = dict.fromkeys(("bias_to", "bias_from")) | dict(zip(tensors, given, strict=True))
        return definitions.agent(**named, scale=scale)

    return Call("", 0, tensors, run, define, {"scale": scale})


def neighborhood_attention(make: Maker) -> Call:
    return _neighborhood(make, ops.neighborhood_attention, definitions.attend)


def neighborhood_attention_lse(make: Maker) -> Call:
    def op(*args, **kwargs):
        return joined(ops.neighborhood_attention_lse(*args, **kwargs))

    return _neighborhood(make, op, definitions.attend_lse)


def _neighborhood(make: Maker, op: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Call:
    kernel, dilation = make.pair(1, 6), make.pair(1, 3)
    size = tuple(k * d + make.between(0, 5) for k, d in zip(kernel, dilation, strict=True))
    batch, heads, dim = make.of_attention()
    tensors = make.qkv_of_any_width(batch, size, heads, dim)
    if make.one_of(True, False):
        tensors["rpb"] = make.tensor(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    causal, scale = (make.one_of(True, False, False), make.one_of(True, False, False)), make.scale()
    stride = tuple(make.one_of(1, make.between(1, k)) for k in kernel)

    def run(q, k, v, rpb=None, *, impl):
        return op(q, k, v, kernel, dilation, stride=stride, rpb=rpb, is_causal=causal, scale=scale, impl=impl)

    def define(q, k, v, rpb=None):
        return definitions.neighborhood(q, k, v, kernel, dilation, stride, rpb, causal, scale, attend)

    options = {"kernel": kernel, "dilation": dilation, "stride": stride, "causal": causal, "scale": scale}
    return Call("", 0, tensors, run, define, options)


def window_attention(make: Maker) -> Call:
    call = _window(make, ops.window_attention, definitions.attend)
    return token_calls.clipped_and_gated(make, call)


def window_attention_lse(make: Maker) -> Call:
    def op(*args, **kwargs):
        return joined(ops.window_attention_lse(*args, **kwargs))

    return _window(make, op, definitions.attend_lse)


def _window(make: Maker, op: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Call:
    size = make.pair(1, 7)
    tokens, windows = size[0] * size[1], make.pair(1, 3)
    batch, heads, dim = make.of_attention()
    tensors = make.qkv_of_any_width(batch, tuple(s * n for s, n in zip(size, windows, strict=True)), heads, dim)
    shift = make.one_of((0, 0), tuple(make.between(0, s - 1) for s in size))
    if make.one_of(True, False):
        tensors["bias"] = make.tensor(heads, tokens, tokens)
    mask, scale = None, make.scale()
    if make.rng.random() < 0.3:
        mask = torch.rand(windows[0] * windows[1], tokens, tokens, generator=make.generator) < 0.6
        mask = (mask | torch.eye(tokens, dtype=torch.bool)).to(make.device)

    def run(q, k, v, bias=None, *, impl, **more):
        return op(q, k, v, size, shift=shift, bias=bias, mask=mask, scale=scale, impl=impl, **more)

    def define(q, k, v, bias=None, attend=attend):
        return definitions.window(q, k, v, size, bias, mask, scale, attend, shift)

    options = {"window": size, "shift": shift, "mask": mask is not None, "scale": scale}
    return Call("", 0, tensors, run, define, options)


def halo_attention(make: Maker) -> Call:
    return _halo(make, ops.halo_attention, definitions.attend)


def halo_attention_lse(make: Maker) -> Call:
    def op(*args, **kwargs):
        return joined(ops.halo_attention_lse(*args, **kwargs))

    return _halo(make, op, definitions.attend_lse)


def _halo(make: Maker, op: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Call:
    stride = make.one_of(1, 1, 2)
    block = tuple(stride * n for n in make.pair(1, 4))
    halo, size, scale = make.pair(0, 3), make.pair(1, 11), make.scale()
    batch, heads, dim = make.of_attention()
    wide = make.one_of(dim, dim, make.between(1, 40))
    of_queries = tuple(-(-n // stride) for n in size)
    tensors = {"q": make.tensor(batch, *of_queries, heads, dim), "k": make.tensor(batch, *size, heads, dim)}
    tensors["v"] = make.tensor(batch, *size, heads, wide)
    if make.one_of(True, False):
        for name, b, h in zip(("rel_h", "rel_w"), block, halo, strict=True):
            tensors[name] = make.tensor(2 * (b + 2 * h) - 1, dim, scale=dim**-0.5)

    def run(q, k, v, rel_h=None, rel_w=None, *, impl):
        return op(q, k, v, block, halo, stride=stride, rel_h=rel_h, rel_w=rel_w, scale=scale, impl=impl)

    def define(q, k, v, rel_h=None, rel_w=None):
        return definitions.halo(q, k, v, block, halo, stride, rel_h, rel_w, scale, attend)

    return Call("", 0, tensors, run, define, {"block": block, "halo": halo, "stride": stride, "scale": scale})


def circle_attention(make: Maker) -> Call:
    return _circle(make, ops.circle_attention, definitions.attend)


def circle_attention_lse(make: Maker) -> Call:
    def op(*args, **kwargs):
        return joined(ops.circle_attention_lse(*args, **kwargs))

    return _circle(make, op, definitions.attend_lse)


def _circle(make: Maker, op: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Call:
    radius, scale = make.between(1, 6), make.scale()
    batch, heads, dim = make.of_attention()
    size, cell, tensors = make.pair(1, 12), None, {}
    if make.one_of(True, False, False):
        cell = make.pair(1, 3)
        size = tuple(side * make.between(1, 4) for side in cell)
    wide = make.one_of(dim, dim, make.between(1, 40))
    tensors |= make.qkv(batch, size, heads, dim)
    if wide != dim:
        tensors["v"] = make.tensor(batch, *size, heads, wide)
    if cell is not None:
        tensors["cell_weight"] = make.tensor(*cell, scale=(cell[0] * cell[1]) ** -0.5)
    if make.one_of(True, False, False):
        text = make.between(1, 5)
        tensors |= {"text_k": make.tensor(batch, text, heads, dim), "text_v": make.tensor(batch, text, heads, wide)}

    def named(given):
        return dict.fromkeys(("cell_weight", "text_k", "text_v")) | dict(zip(tensors, given, strict=True))

    def run(*given, impl):
        more = named(given)
        return op(more.pop("q"), more.pop("k"), more.pop("v"), radius, **more, scale=scale, impl=impl)

    def define(*given):
        return definitions.circle_with_more(**named(given), radius=radius, scale=scale, attend=attend)

    return Call("", 0, tensors, run, define, {"radius": radius, "scale": scale, "cell": cell})


def routed_attention(make: Maker) -> Call:
    region, regions = make.pair(1, 5), make.pair(1, 3)
    of_keys = make.one_of(region, make.pair(1, 4))
    batch, heads, dim = make.of_attention()
    wide, scale = make.one_of(dim, dim, make.between(1, 40)), make.scale()
    size, key_size = (tuple(r * n for r, n in zip(side, regions, strict=True)) for side in (region, of_keys))
    tensors = {"q": make.tensor(batch, *size, heads, dim), "k": make.tensor(batch, *key_size, heads, dim)}
    tensors["v"] = make.tensor(batch, *key_size, heads, wide)
    count = regions[0] * regions[1]
    topk = make.between(1, count)
    order = [torch.randperm(count, generator=make.generator)[:topk] for _ in range(batch * count)]
    routes = torch.stack(order).unflatten(0, (batch, count))

    def run(q, k, v, *, impl):
        return ops.routed_attention(
            *(q, k, v, routes.to(q.device)), region_size=region, kv_region_size=of_keys, scale=scale, impl=impl
        )

    def define(q, k, v):
        return definitions.routed(q, k, v, routes, region, of_keys, scale)

    return Call("", 0, tensors, run, define, {"region": region, "keys": of_keys, "topk": topk, "scale": scale})


def hilo_attention(make: Maker) -> Call:
    window, windows = make.pair(1, 4), make.pair(1, 3)
    batch, heads, dim = make.of_attention()
    size, pooled, scale = tuple(w * n for w, n in zip(window, windows, strict=True)), make.pair(1, 5), make.scale()
    tensors = {f"h{name}": t for name, t in make.qkv(batch, size, heads, dim).items()}
    low = make.between(1, 2)
    tensors["lq"] = make.tensor(batch, *size, low, dim)
    tensors |= {name: make.tensor(batch, *pooled, low, dim) for name in ("lk", "lv")}

    def run(hq, hk, hv, lq, lk, lv, *, impl):
        return ops.hilo_attention([hq, hk, hv], [lq, lk, lv], window, scale=scale, impl=impl)

    return Call("", 0, tensors, run, lambda *t: definitions.hilo(*t, window, scale), {"window": window, "scale": scale})


def channel_attention(make: Maker) -> Call:
    batch, heads, dim = make.of_attention()
    size = make.pair(1, 9)
    tensors, scale = make.qkv(batch, size, heads, dim), make.one_of(None, (size[0] * size[1]) ** -0.5)
    if scale is None:  # the logits are sums over tokens: with numbers of size 1 one key would get all the weight
        tensors = {name: t * (size[0] * size[1]) ** -0.25 for name, t in tensors.items()}

    def run(q, k, v, *, impl):
        return ops.channel_attention(q, k, v, scale=scale, impl=impl)

    return Call("", 0, tensors, run, lambda q, k, v: definitions.channel(q, k, v, scale), {"scale": scale})


def channel_gate(make: Maker) -> Call:
    tensors = {"x": make.tensor(make.between(1, 3), make.between(1, 40), *make.pair(1, 9))}
    tensors["weight"] = make.tensor(1, 1, make.one_of(1, 3, 5, 9))
    return Call("", 0, tensors, ops.channel_gate, definitions.channel_gate)


def strip_gate(make: Maker) -> Call:
    groups, of_norm = make.one_of(1, 2, 4), make.one_of(1, 2, 4)
    channels, taps = 4 * make.between(1, 5), make.one_of(1, 3, 5, 7)
    tensors = {"x": make.tensor(make.between(1, 3), channels, *make.pair(2, 9))}
    tensors["weight"] = make.tensor(channels, channels // groups, taps, scale=(channels // groups * taps) ** -0.5)
    tensors |= {name: make.tensor(channels) for name in ("norm_weight", "norm_bias")}
    eps = make.one_of(1e-5, 1e-2)

    def run(x, weight, norm_weight, norm_bias, *, impl):
        return ops.strip_gate(x, weight, norm_weight, norm_bias, of_norm, eps, impl=impl)

    def define(x, weight, norm_weight, norm_bias):
        return definitions.strip_gate(x, weight, norm_weight, norm_bias, of_norm, eps)

    return Call("", 0, tensors, run, define, {"groups of the norm": of_norm, "eps": eps})


def subspace_gate(make: Maker) -> Call:
    groups, size = make.between(1, 12), make.between(1, 5)
    channels = groups * size
    tensors = {"x": make.tensor(make.between(1, 3), channels, *make.pair(1, 9))}
    tensors |= {name: make.tensor(channels) for name in ("scale", "shift")}
    tensors |= {"weight": make.tensor(groups, size, scale=size**-0.5), "bias": make.tensor(groups)}
    return Call("", 0, tensors, ops.subspace_gate, definitions.subspace_gate, {"groups": groups})


def grouped_query_attention(make: Maker) -> Call:
    batch, kv_heads, dim = make.of_attention()
    heads, queries, keys, scale = make.between(1, 6), make.between(1, 20), make.between(1, 20), make.scale()
    tensors = {"q": make.tensor(batch, queries, heads, dim), "k": make.tensor(batch, keys, kv_heads, dim)}
    tensors["v"] = make.tensor(batch, keys, kv_heads, make.between(1, 40))
    rows = make.one_of(1, batch)
    key_heads = torch.randint(kv_heads, (rows, heads), generator=make.generator).to(make.device)

    def run(q, k, v, *, impl):
        return ops.grouped_query_attention(q, k, v, key_heads, scale=scale, impl=impl)

    def define(q, k, v):
        return definitions.grouped_query(q, k, v, key_heads, scale)

    return Call("", 0, tensors, run, define, {"key_heads": key_heads.tolist(), "scale": scale})


def large_kernel_attention(make: Maker) -> Call:
    channels, dilation = make.between(1, 24), make.between(1, 4)
    tensors = {"x": make.tensor(make.between(1, 2), channels, *make.pair(1, 12))}
    for name in ("local", "dilated"):
        taps = make.one_of(1, 3, 5), make.one_of(1, 3, 5)
        tensors[f"{name}_weight"] = make.tensor(channels, 1, *taps, scale=(taps[0] * taps[1]) ** -0.5)
        tensors[f"{name}_bias"] = make.tensor(channels)
    tensors["point_weight"] = make.tensor(channels, channels, 1, 1, scale=channels**-0.5)
    tensors["point_bias"] = make.tensor(channels)

    def run(*given, impl):
        return ops.large_kernel_attention(*given, dilation, impl=impl)

    return Call("", 0, tensors, run, lambda *t: definitions.large_kernel(*t, dilation), {"dilation": dilation})


def dense(make: Maker) -> Call:
    lead, inputs, outputs = (
        [make.between(1, 4) for _ in range(make.between(1, 3))],
        make.between(1, 40),
        make.between(1, 40),
    )
    tensors = {"x": make.tensor(*lead, inputs), "weight": make.tensor(outputs, inputs, scale=inputs**-0.5)}
    tensors |= {"bias": make.tensor(outputs)} if make.one_of(True, False) else {}
    tensors |= {"residual": make.tensor(*lead, outputs)} if make.one_of(True, False) else {}
    activation = make.one_of(None, "relu", "gelu", "silu")

    def run(*given, impl):
        by_name = dict(zip(tensors, given, strict=True))
        return ops.dense(by_name.pop("x"), by_name.pop("weight"), **by_name, activation=activation, impl=impl)

    def define(*given):
        named = dict.fromkeys(("bias", "residual")) | dict(zip(tensors, given, strict=True))
        return definitions.dense(named["x"], named["weight"], named["bias"], activation, named["residual"])

    return Call("", 0, tensors, run, define, {"activation": activation})


def aggregated_attention(make: Maker) -> Call:
    (batch, heads, dim), size, pooled = make.of_attention(), make.pair(1, 7), make.pair(1, 3)
    wide, table = make.one_of(dim, make.between(1, 20)), make.pair(1, 9)
    few = pooled[0] * pooled[1]
    tensors = {"q": make.tensor(batch, *size, heads, dim), "pooled_k": make.tensor(batch, few, heads, dim)}
    tensors["pooled_v"] = make.tensor(batch, few, heads, wide)
    tensors["embedding"] = make.tensor(heads, dim, scale=0.5)
    tensors["temperature"] = make.tensor(heads).abs() + 0.5
    tensors["pooled_bias"] = make.tensor(heads, *table)
    if make.one_of(True, True, False):
        kernel = make.one_of((3, 3), (3, 3), (1, 3), (5, 3))
        near = kernel[0] * kernel[1]
        tensors |= {"local_k": make.tensor(batch, *size, heads, dim), "local_v": make.tensor(batch, *size, heads, wide)}
        tensors |= {"local_bias": make.tensor(heads, *kernel), "tokens": make.tensor(heads, dim, near, scale=0.3)}
        tensors["token_bias"] = make.tensor(heads, near, scale=0.3)
    kept = None
    if make.one_of(True, False):
        tensors["gates"] = make.tensor(batch, *size, heads)
        kept = torch.rand(batch, *size, heads, generator=make.generator) < make.one_of(0.3, 0.7, 1.0)
    cells = [
        torch.randint(0, top, (side, few), generator=make.generator)
        for top, side, few in zip(table, size, pooled, strict=True)
    ]
    optional = ("local_k", "local_v", "local_bias", "tokens", "token_bias", "gates")

    def named(given):
        found = dict.fromkeys(optional) | dict(zip(tensors, given, strict=True))
        if kept is not None:
            found["gates"] = found["gates"] * kept.to(found["gates"].dtype).to(found["gates"].device)
        return found

    def run(*given, impl):
        device = given[0].device
        return ops.aggregated_attention(
            **named(given), bias_rows=cells[0].to(device), bias_cols=cells[1].to(device), impl=impl
        )

    def define(*given):
        found = named(given)
        return definitions.aggregated(**found | {"table": found.pop("pooled_bias"), "rows": cells[0], "cols": cells[1]})

    return Call("", 0, tensors, run, define, {"pooled": pooled, "gates": kept is not None})


def flow_attention(make: Maker) -> Call:
    form, (batch, heads, dim) = make.one_of("vision", "core", "causal"), make.of_attention()
    tokens = make.between(1, 12)
    keys = tokens if form == "causal" else make.between(1, 12)
    tensors = {"q": make.tensor(batch, tokens, heads, dim), "k": make.tensor(batch, keys, heads, dim)}
    tensors["v"] = make.tensor(batch, keys, heads, make.one_of(dim, make.between(1, 20)))

    def run(q, k, v, *, impl):
        return ops.flow_attention(q, k, v, form=form, impl=impl)

    return Call("", 0, tensors, run, lambda q, k, v: definitions.flow(q, k, v, form), {"form": form})


def kernelized_attention(make: Maker) -> Call:
    (batch, heads, dim), size, prefix = make.of_attention(), make.pair(1, 4), make.one_of(0, 0, 2)
    form, normalize = make.one_of("dense", "fft", "auto"), make.one_of(True, True, False)
    tokens = prefix + size[0] * size[1]
    tensors = {name: make.tensor(batch, tokens, heads, dim, scale=0.5) for name in ("q", "k")}
    tensors["v"] = make.tensor(batch, tokens, heads, make.one_of(dim, make.between(1, 20)))
    tensors["omega"] = make.tensor(make.between(1, 6), dim, scale=0.7)
    if make.one_of(True, True, False):
        tensors["rel"] = make.tensor(heads, 2 * size[0] - 1, 2 * size[1] - 1)

    def run(q, k, v, omega, rel=None, *, impl):
        options = {"prefix_tokens": prefix, "normalize": normalize, "form": form}
        return ops.kernelized_attention(q, k, v, omega, size, rel=rel, **options, impl=impl)

    def define(q, k, v, omega, rel=None):
        return definitions.kernelized(q, k, v, omega, rel, size, prefix, normalize)

    return Call("", 0, tensors, run, define, {"size": size, "prefix": prefix, "form": form, "normalize": normalize})


def cluster_attention(make: Maker) -> Call:
    (batch, heads, dim), clusters = make.of_attention(), make.between(1, 3)
    tokens, keys = make.between(1, 6), make.between(1, 6)
    causal, self_logit, masked = make.one_of(True, False), make.one_of(None, None, -3.0), make.one_of(True, False)
    wide, scale, eps = make.one_of(dim, make.between(1, 20)), make.scale(), make.one_of(1e-2, 1e-5)
    tensors = {"q": make.tensor(batch, tokens, heads, dim), "k": make.tensor(batch, keys, heads, dim)}
    tensors["v"] = make.tensor(batch, keys, heads, wide)
    if make.one_of(True, False, False):
        few = make.between(1, 2)
        tensors |= {
            "memory_k": make.tensor(heads, clusters, few, dim),
            "memory_v": make.tensor(heads, clusters, few, wide),
        }

    def members(length: int) -> Tensor:
        window = make.between(1, length)
        order = [torch.randperm(length, generator=make.generator)[:window] for _ in range(batch * heads * clusters)]
        return torch.stack(order).unflatten(0, (batch, heads, clusters))

    of_q, of_k = members(tokens), members(keys)
    mask = torch.rand(batch, heads, keys, generator=make.generator) < 0.3 if masked and "memory_k" in tensors else None

    def run(q, k, v, memory_k=None, memory_v=None, *, impl):
        options = {"is_causal": causal and "memory_k" in tensors, "self_logit": self_logit, "count_eps": eps}
        return ops.cluster_attention(
            q, k, v, of_q.to(q.device), of_k.to(q.device), memory_k=memory_k, memory_v=memory_v,
            key_mask=None if mask is None else mask.to(q.device), **options, scale=scale, impl=impl,
        )  # fmt: skip

    def define(q, k, v, memory_k=None, memory_v=None):
        causally = causal and memory_k is not None
        return definitions.clusters(
            q, k, v, of_q, of_k, memory_k, memory_v, mask, causally, self_logit, eps, scale
        )  # fmt: skip

    return Call("", 0, tensors, run, define, {"causal": causal, "self": self_logit, "scale": scale})


MAKERS: dict[str, Callable[[Maker], Call]] = {
    make.__name__: make
    for make in (
        *(neighborhood_attention, window_attention, halo_attention, circle_attention, routed_attention),
        *(neighborhood_attention_lse, window_attention_lse, halo_attention_lse, circle_attention_lse),
        *(hilo_attention, channel_attention, channel_gate, strip_gate, large_kernel_attention, dense),
        *(subspace_gate, grouped_query_attention),
        *(aggregated_attention, flow_attention, kernelized_attention, cluster_attention),
        agent_attention,
    )
}
MAKERS |= {make.__name__: lambda given, make=make: Call("", 0, *make(given)) for make in token_calls.MAKERS}
