"""A linear layer with what often follows it, an activation or a sum, in one pass over memory.

Tiled      in inference on a CPU oneDNN multiplies, with the activation or the sum in its epilogue, where the
           calibration (`foveate.cpu_report()`) found its product no slower than torch's own; else, and wherever
           gradients are recorded, torch's operations. Weights are not packed: `foveate.fuse` packs them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _onednn as onednn
from ._attend import accumulator
from ._checks import check_alike
from ._onednn import GELU, NONE, RELU, SILU, Activation
from ._op import Impl, declare, run
from .calibration import cpu_report

OP = "dense"
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Activation]] = {
    "relu": (F.relu, RELU),
    "gelu": (F.gelu, GELU),
    "silu": (F.silu, SILU),
}


def dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Multiply, activate and add: activation(x @ weight^T + bias) + residual.

    Cost: rows * K * N multiply-adds.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
        activation: "relu", "gelu" (exact), "silu", or None.
        residual: (..., N), added last.
        impl: "auto", "tiled" or "reference"; there is no kernel of ours: "fused" is refused.

    Returns:
        (..., N), dtype of x (under autocast: the autocast dtype).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the activation is unknown.
        NotImplementedError: `impl="fused"`.
    """
    return run(OP, x, weight, bias, activation, residual, impl)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{OP}: x must be (..., K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    check_alike(OP, **{name: t for name, t in given.items() if t is not None})
    outputs = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"{OP}: bias must be ({outputs},), got {tuple(bias.shape)}")
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], outputs):
        raise ValueError(f"{OP}: residual must be {(*x.shape[:-1], outputs)}, got {tuple(residual.shape)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be one of {[*ACTIVATIONS, None]}, got {activation!r}")


def dense_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """The definition, float32 inside at least."""
    wide = accumulator(x.dtype)
    out = torch.einsum("...k,nk->...n", x.to(wide), weight.to(wide))
    out = out if bias is None else out + bias.to(wide)
    out = out if activation is None else ACTIVATIONS[activation][0](out)
    out = out if residual is None else out + residual.to(wide)
    return out.to(x.dtype)


def dense_graph(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    out = F.linear(x, weight, bias)
    out = out if activation is None else ACTIVATIONS[activation][0](out)
    return out if residual is None else out + residual


def dense_tiled(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    records = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    rows = x.shape[:-1].numel()
    outputs, depth = weight.shape
    if records or x.device.type != "cpu" or not cpu_report().takes_product(rows, depth, outputs, x.dtype):
        return dense_graph(x, weight, bias, activation, residual)
    image = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    epilogue = NONE if activation is None else ACTIVATIONS[activation][1]
    if residual is None:
        return onednn.multiply(x, image, bias, epilogue)
    if activation is None:
        return onednn.multiply_onto(x, image, bias, NONE, residual)
    return onednn.multiply(x, image, bias, epilogue).add_(residual)


def _why_not_fused() -> str:
    return "the product is torch's and oneDNN's; there is no Triton kernel"


def _macs(x: Tensor, weight: Tensor) -> int:
    return x.shape[:-1].numel() * weight.numel()


declare(
    dense,
    check=_check,
    reference=dense_reference,
    tiled=dense_tiled,
    graph=dense_graph,
    why_not_fused=_why_not_fused,
    cast=("x", "weight", "bias", "residual"),
    macs=_macs,
)
