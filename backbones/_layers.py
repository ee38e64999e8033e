"""Layers that timm has not, or not as fast."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Layer scale, where there is one."""
    return x if gamma is None else x * gamma


class MapGELU(nn.Module):
    """Exact GELU of a (B, C, H, W) map that lies channels-last in memory.

    PyTorch has oneDNN's GELU for contiguous tensors only; seen as (B, H, W, C) the map is one. 8 x 256 x 56 x 56 took
    1.6 ms so and 3.5 ms otherwise (2 threads of a Xeon with AVX-512, torch 2.15); a whole VAN-B0 gains a tenth.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# glibc maps anything above 32 MB anew at every call, and the kernel clears its pages: a block of VAN-B0's first stage
# took 33 ms for 8 images at once (26 MB of hidden channels) and 12 ms for 4 and 4; VAN-B1's 67 and 33 ms (as above).
CHUNK_BYTES = 16 << 20


def by_images(f: Callable[[Tensor], Tensor], x: Tensor, hidden_numel: int) -> Tensor:
    """Return f(x), on a CPU without gradients a few images at a time, so that what `f` makes stays small.

    Args:
        f: a map from (B, ...) to (B, ...) that treats every image alone.
        x: the batch; under a tracer or compiler it passes whole.
        hidden_numel: elements of the largest tensor that `f` makes for one image.
    """
    traced = type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or x.is_cuda or torch.is_grad_enabled():
        return f(x)
    images = max(1, CHUNK_BYTES // (hidden_numel * x.element_size()))
    return f(x) if len(x) <= images else torch.cat([f(part) for part in x.split(images)])
