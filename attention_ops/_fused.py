"""Reasons that keep every op from its Triton kernel."""

import torch
from torch import Tensor

from ..kernels._launch import why_no_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_ELEMENTS = 2**31 - 1  # of one image: kernels count them in int32


def why_no_kernel(*tensors: Tensor) -> str | None:
    """Return the reason why no kernel can run on maps (B, ...), or None. Each op adds its own reasons."""
    x = tensors[0]
    if (reason := why_no_triton(x)) is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"the kernels take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {x.dtype}"
    for t in tensors:
        if sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) > MOST_ELEMENTS:
            return f"one image spans more than {MOST_ELEMENTS} elements in memory"
    return None


MOST_HEAD_DIM = 128


def why_no_local_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> str | None:
    """Return the reason why the kernels of kernels/local.py cannot run on these tensors, or None."""
    if (widest := max(q.shape[-1], v.shape[-1])) > MOST_HEAD_DIM:
        return f"the kernels hold a head_dim of at most {MOST_HEAD_DIM}, got {widest}"
    if scale is not None and scale <= 0:
        return f"the kernels need a scale above 0, got {scale}"
    return why_no_kernel(q, k, v)
