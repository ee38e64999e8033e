"""Calls of the local attention ops as the tests of their kernels make them: inputs, results and gradients, errors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.attention_ops import circle_attention, halo_attention, neighborhood_attention, window_attention

OPS: dict[str, Callable[..., Tensor]] = {
    "neighborhood": neighborhood_attention,
    "window": window_attention,
    "circle": circle_attention,
    "halo": halo_attention,
}


@dataclass(frozen=True)
class Case:
    """One call of an op on a map of `size`; `table` asks for a bias or relative logits."""

    op: str
    size: tuple[int, int]
    arguments: dict = field(hash=False)
    table: bool = False
    heads: int = 1
    dim: int = 16
    value_dim: int | None = None  # as `dim` where None

    def __str__(self) -> str:
        words = "-".join(str(value).replace(" ", "") for value in self.arguments.values())
        return f"{self.op}-{self.size[0]}x{self.size[1]}-{words}{'-table' if self.table else ''}-d{self.dim}"

    def inputs(self, dtype: torch.dtype = torch.float32, batch: int = 1) -> list[Tensor]:
        """Packed qkv, or q and packed kv for halos; then tables."""
        torch.manual_seed(0)
        a, d = self.arguments, self.dim
        wide = d if self.value_dim is None else self.value_dim
        packed, tables = [torch.randn(batch, *self.size, 3, self.heads, d)], []
        if wide != d:
            packed = [torch.randn(batch, *self.size, self.heads, 2 * d + wide)]
        if self.op == "neighborhood" and self.table:
            tables = [torch.randn(self.heads, *(2 * k - 1 for k in a["kernel_size"]))]
        if self.op == "window" and self.table:
            tokens = a["window_size"][0] * a["window_size"][1]
            tables = [torch.randn(self.heads, tokens, tokens)]
        if self.op == "halo":
            queries = [-(-n // a.get("stride", 1)) for n in self.size]
            packed = [torch.randn(batch, *queries, self.heads, d)]
            packed += [torch.randn(batch, *self.size, self.heads, d + wide)]
            if self.table:
                windows = [b + 2 * h for b, h in zip(a["block_size"], a["halo"], strict=True)]
                tables = [torch.randn(2 * w - 1, d) * d**-0.5 for w in windows]
        return [x.to(dtype) for x in packed + tables]

    def call(self, inputs: list[Tensor], impl: str) -> Tensor:
        arguments = dict(self.arguments)
        if self.op == "halo":
            qkv = [inputs[0], inputs[1][..., : self.dim], inputs[1][..., self.dim :]]
            tables = inputs[2:]
            arguments |= dict(zip(("rel_h", "rel_w"), tables, strict=False))
        else:
            widths = (self.dim, self.dim, inputs[0].shape[-1] - 2 * self.dim)
            qkv = list(inputs[0].unbind(3) if inputs[0].dim() == 6 else inputs[0].split(widths, -1))
            tables = inputs[1:]
            if tables:
                arguments["rpb" if self.op == "neighborhood" else "bias"] = tables[0]
        return OPS[self.op](*qkv, **arguments, impl=impl)


def na(size, kernel, dilation=(1, 1), causal=(False, False), stride=(1, 1), **more) -> Case:
    arguments = {"kernel_size": kernel, "dilation": dilation, "is_causal": causal, "stride": stride}
    return Case("neighborhood", size, arguments, **more)


def windows(size, window, shift=(0, 0), **more) -> Case:
    return Case("window", size, {"window_size": window, "shift": shift}, **more)


def halos(size, block, reach, stride=1, **more) -> Case:
    return Case("halo", size, {"block_size": block, "halo": reach, "stride": stride}, **more)


def results(case: Case, inputs: list[Tensor], impl: str) -> list[Tensor]:
    """The output, and the gradients of all inputs under one probe."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = case.call(leaves, impl)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, probe.to(out.dtype))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((f.double() - e).abs().max() / e.abs().max()) for f, e in zip(found, exact, strict=True)]
