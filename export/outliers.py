"""Outliers of a model's activations: the largest norm and the kurtosis of every layer's output.

Paper      Bondarenko, Nagel, Blankevoort 2023, arXiv:2306.12929. Their code measures other layers of BERT and of OPT;
           the paper's tables name the output of attention. Here every block and its children are measured, by role.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._modes import evaluating
from .errors import ExportError

_IN_BLOCKS = re.compile(r"(.+\.)?\d+(\.[^.]+)?")  # a numbered module, or a child of one


@dataclass(frozen=True)
class Outliers:
    """Numbers of one module, means over images."""

    inf_norm: float  # the largest absolute number of an image
    kurtosis: float  # 3 for normal numbers


@dataclass(frozen=True)
class RoleOutliers:
    """Numbers of all modules with one role, such as `blocks.*.attn`."""

    modules: int
    max_inf_norm: float
    mean_kurtosis: float
    max_kurtosis: float


def inf_norms(x: Tensor) -> Tensor:
    """Return the largest absolute number of every image: (B, ...) -> (B,)."""
    return x.flatten(1).abs().amax(1)


def kurtoses(x: Tensor) -> Tensor:
    """Return the kurtosis of every image's numbers: (B, ...) -> (B,).

    The mean of (x - mean) ** 4 over (s ** 4 + 1e-6), with s the unbiased standard deviation, as in the authors' code.
    """
    flat = x.flatten(1)
    away = flat - flat.mean(1, keepdim=True)
    return away.pow(4).mean(1) / (flat.std(1).pow(4) + 1e-6)


def in_blocks(name: str) -> bool:
    """Say whether a module is a numbered one, such as a block, or a child of one."""
    return _IN_BLOCKS.fullmatch(name) is not None


def measure_outliers(
    model: nn.Module, batches: Iterable[Tensor], chosen: Callable[[str], bool] = in_blocks
) -> dict[str, Outliers]:
    """Measure the outputs of modules on images, in eval mode. Cost: one forward pass per batch.

    Args:
        model: any model of images.
        batches: (B, C, H, W), preprocessed.
        chosen: says by its name whether a module is measured. Modules whose output is no floating-point tensor are left
            out; of a tuple the first part counts.

    Raises:
        ExportError: no batch, or no module with an output that can be measured.
    """
    sums: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: _add(sums, name, out))
        for name, module in model.named_modules()
        if name and chosen(name)
    ]
    images = 0
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                model(batch)
                images += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not images or not sums:
        what = "batches of images" if not images else "modules with outputs that can be measured"
        raise ExportError(f"measure_outliers: wanted {what}, got none")
    return {name: Outliers(*(total[:2] / total[2]).tolist()) for name, total in sums.items()}


def _add(sums: dict[str, Tensor], name: str, out: object) -> None:
    out = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() < 2 or out[0].numel() < 2:
        return
    x = out.detach().float()
    found = torch.stack([inf_norms(x).double().sum(), kurtoses(x).double().sum(), torch.tensor(float(len(x)))]).cpu()
    sums[name] = sums[name] + found if name in sums else found


def by_role(found: Mapping[str, Outliers]) -> dict[str, RoleOutliers]:
    """Put modules together that differ in numbers only: `blocks.3.attn` has the role `blocks.*.attn`."""
    roles: dict[str, list[Outliers]] = {}
    for name, one in found.items():
        roles.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(one)
    return {
        role: RoleOutliers(
            len(ones),
            max(one.inf_norm for one in ones),
            sum(one.kurtosis for one in ones) / len(ones),
            max(one.kurtosis for one in ones),
        )
        for role, ones in roles.items()
    }
