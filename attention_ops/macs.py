"""Count the multiply-adds that a model needs, not those that a body happens to do.

torch's FlopCounterMode counts convolutions, matrix products and scaled_dot_product_attention as they are executed; half
of its figure is multiply-adds. Neighborhood attention's tiled body computes 2.5 to 3.5 times the logits that a query
sees, and masks the rest; a fused kernel does work that torch cannot see. For such ops, what the body did is taken out
of the count and the definition's cost put in. Elementwise work (norms, gates, softmax) is not counted, as in papers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def _neighborhood(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: list[int], *_, **__) -> int:
    return 2 * q.numel() * kernel_size[0] * kernel_size[1]  # q k^T and probs v, for every channel of every token


def _routed(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region_size: list[int], kv_region_size: list[int], *_
) -> int:
    keys = routes.shape[2] * kv_region_size[0] * kv_region_size[1]
    return q[..., 0].numel() * keys * (q.shape[-1] + v.shape[-1])


def _window(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, window: list[int], *_) -> int:
    return 2 * q.numel() * window[0] * window[1]


def _halo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    block_size: list[int],
    halo: list[int],
    *_,
) -> int:
    rows, cols = (size + 2 * reach for size, reach in zip(block_size, halo, strict=True))
    relative = 0 if rel_h is None else q.numel() * (rows + cols)
    return q[..., 0].numel() * rows * cols * (q.shape[-1] + v.shape[-1]) + relative


def _circle(q: Tensor, k: Tensor, v: Tensor, radius: int, *_) -> int:
    rows, cols = (torch.arange(length) for length in q.shape[1:3])
    apart_y, apart_x = ((x[:, None] - x).square().flatten().bincount() for x in (rows, cols))  # pairs by distance ** 2
    near = torch.arange(len(apart_y))[:, None] + torch.arange(len(apart_x)) < radius * radius
    pairs = int((apart_y[:, None] * apart_x * near).sum())
    return 2 * q.shape[0] * q.shape[3] * q.shape[4] * pairs


USEFUL_MACS: dict[str, Callable[..., int]] = {
    "circle_attention": _circle,
    "halo_attention": _halo,
    "neighborhood_attention": _neighborhood,
    "routed_attention": _routed,
    "window_attention": _window,
}


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Return the multiply-adds of one forward pass on these images; the model should be in eval mode."""
    with torch.no_grad(), FlopCounterMode(display=False) as done, _UsefulWork() as useful:
        model(images)
    return done.get_total_flops() // 2 - useful.excess_macs


class _UsefulWork(TorchFunctionMode):
    """Watch our ops: what their bodies did beyond the definition (below zero where torch could not see it)."""

    def __init__(self) -> None:
        super().__init__()
        self.excess_macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        useful = USEFUL_MACS.get(_our_name(func))
        if useful is None:
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as body:
            out = func(*args, **(kwargs or {}))
        self.excess_macs += body.get_total_flops() // 2 - useful(*args, **(kwargs or {}))
        return out


def _our_name(func: Callable) -> str | None:
    space, _, name = str(func).partition(".")
    return name.partition(".")[0] if space == "foveate" else None
