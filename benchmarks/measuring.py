"""What the benchmarks of whole models share: models, images, calls in engines, training steps, the machine's limit.

`foveate bench`, engines.py and backbones.py call these; how calls are timed is in _timing.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import timm
import torch
import torch.nn.functional as F
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from ..export import ExportError
from ..export.engines import prepare
from ..fusion import cpu_report
from ._timing import interleaved_seconds

TRAINING_PASSES = 3  # forward, gradient of the input, gradient of the weight
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ON_ANY_DEVICE = ("eager", "compiled")  # engines that run where the model is; the others run on the CPU
KEEPS_BUFFERS = ("onnxruntime", "openvino", "executorch")  # engines whose first call allocates memory that they keep

_PRODUCT_SIDE = 8192  # of the square matrices that a GPU multiplies


def create_model(name: str, px: int, device: str = "cpu") -> nn.Module:
    """Build a timm model in eval mode, for images of px x px where its size is fixed; weights are random, seeded."""
    torch.manual_seed(0)
    return timm.create_model(**resolve_model_input_args(name, {"img_size": px})).eval().to(device)


def random_images(batch: int, px: int, device: str = "cpu") -> Tensor:
    """Return (batch, 3, px, px), normally distributed."""
    return torch.randn(batch, 3, px, px, device=device)


def prepare_call(engine: str, model: nn.Module, images: Tensor, precision: str = "float32") -> Callable[[], object]:
    """Return a call without arguments that runs the model on the images once in an engine.

    Args:
        engine: as in `export.engines.prepare`.
        model: in eval mode, float32; it is left as it is.
        precision: "bfloat16" converts a copy of the model, and the images.

    Raises:
        ExportError, FuseError: the engine refuses the model or the device; one line.
    """
    if images.device.type != "cpu" and engine not in ON_ANY_DEVICE:
        raise ExportError(f"{engine} runs on the CPU, not on {images.device.type}")
    dtype = PRECISIONS[precision]
    return prepare(engine, model if dtype is torch.float32 else deepcopy(model).to(dtype), images.to(dtype))


def training_step(
    model: nn.Module,
    images: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    precision: str = "float32",
) -> Callable[[], object]:
    """Return a call that trains the model on the images once: forward, cross-entropy, backward, optimizer step.

    Args:
        optimizer: of the model's parameters; None: gradients only.
        forward: called in place of the model, such as a compiled one.
        precision: "bfloat16" runs the forward pass under autocast; weights stay float32.
    """
    model.train()
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    dtype, run = PRECISIONS[precision], model if forward is None else forward  # `or` asks a compiled model for its len

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with nullcontext() if dtype is torch.float32 else torch.autocast(images.device.type, dtype):
            logits = run(images)
        F.cross_entropy(logits.float(), labels).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def product_rate(precision: str = "float32", device: str = "cpu") -> float | None:
    """Return the fastest matrix product measured on this machine, in 10^9 multiply-adds a second.

    On a CPU that of the calibration, see `foveate.cpu_report`; on a GPU that of two square matrices.
    None where nothing was measured: FOVEATE_PRODUCTS decides, or oneDNN has no product of this precision.
    """
    if device.startswith("cuda"):
        return _gpu_product_rate(PRECISIONS[precision], device)
    rates = cpu_report().rates
    return max((max(pair) for (dtype, *_), pair in rates.items() if dtype == precision), default=None)


def _gpu_product_rate(dtype: torch.dtype, device: str) -> float:
    a = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device, dtype=dtype)
    seconds = interleaved_seconds({"product": lambda: a @ a}, rounds=7, device=device, warmup=3)["product"]
    return _PRODUCT_SIDE**3 / seconds / 1e9
