"""Run a 2:4 plan on sparse tensor cores, with compressed weights."""

import torch
from torch import nn

from .errors import PruningError
from .plan import Plan

_ROWS, _COLUMNS = 32, 64  # torch's kernels need float16 or bfloat16 matrices in multiples of these


def compress(model: nn.Module, plan: Plan) -> list[str]:
    """Apply a 2:4 plan and compress its linear layers, in place, for inference; return their names.

    Convolutions, and layers of sizes that the kernels do not support, are zeroed but not compressed.

    Raises:
        PruningError: the plan has another pattern, or the model is not in half precision on a CUDA device.
    """
    if plan.pattern != "2:4":
        raise PruningError(f"compress: wanted a plan of pattern 2:4, got {plan.pattern}")
    weight = next(model.parameters())
    if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
        raise PruningError(
            f"compress: sparse tensor cores need float16 or bfloat16 on CUDA, the model is {weight.dtype} on "
            f"{weight.device}"
        )
    plan.apply(model)
    done = []
    for name in plan.masks:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, nn.Linear) and not (layer.out_features % _ROWS or layer.in_features % _COLUMNS):
            compressed = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
            layer.weight = nn.Parameter(compressed, requires_grad=False)
            done.append(name)
    return done
