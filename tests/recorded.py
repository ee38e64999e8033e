"""Recorded layers of official code (tests/goldens/module__*): a layer of ours with their weights, against their output.

The comparison is with the recorded output, and with the norm and a dot product of every recorded gradient.
"""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def load(layer: nn.Module, case: dict, det, rename: Rename = dict, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give a layer the weights of a recorded case."""
    weights = det.det_state_dict(case["state_dict"], case.get("mul"), case.get("gain", 1.0))
    layer.load_state_dict(rename(weights))
    return layer.to(dtype)


def given(case: dict, det, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])).to(dtype)


def off(ours: Tensor, theirs: np.ndarray) -> float:
    """The largest difference from the samples of a recorded array, in standard deviations of the samples."""
    flat = ours.detach().contiguous().flatten().numpy()
    picked = flat if flat.size == theirs.size else flat[np.linspace(0, flat.size - 1, theirs.size).astype(int)]
    return float(np.abs(picked - theirs.ravel()).max() / theirs.std())


def backward(out: Tensor, det) -> None:
    """The loss of all recorded gradients."""
    (out * torch.from_numpy(det.det_input(out.shape, 7)).to(out.dtype)).mean().backward()


def wrong_gradients(found: dict[str, Tensor], case: dict, det, tolerance: float = 1e-4) -> list[tuple[str, float]]:
    """The recorded gradients that ours, by the official name, are not."""
    wrong = []
    for name, (norm, dot) in case["grads"].items():
        grad = found[name].double()
        probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{name}".encode()))).double()
        by = max(abs(float(grad.norm()) - norm), abs(float((grad * probe).sum()) - dot)) / max(norm, 1e-30)
        if not by <= tolerance:
            wrong.append((name, by))
    return wrong
