"""Grad-CAM of any timm classifier, by the package grad-cam: where the image speaks for a class."""

import contextlib
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import RequestError
from .._modes import evaluating
from .places import Surroundings
from .views import Canvas, GateView

OP = "Grad-CAM"


def grad_cam(model: nn.Module, image: Tensor, target: int | None = None) -> GateView:
    """Return the Grad-CAM of a class as a view on the image.

    Paper: Selvaraju et al. 2017, arXiv:1610.02391, by the package grad-cam, which scales the map to 0..1. It is taken
    at the model's last feature map, or, in transformers of tokens, at the first norm of the last block: after that
    block's attention, a class token reads no patch. A map of padded patches or strides reaches beyond the image; that
    part is cut off.

    Cost: two forward passes and a backward pass. Gradients of the parameters are left as they are.

    Args:
        image: (1, C, H, W), preprocessed.
        target: number of the class; the most probable one when None.

    Raises:
        RequestError: the package is missing, the class is not there, or the model names no feature map.
    """
    check_grad_cam()
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with evaluating(model), torch.no_grad():
        logits = model(image)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise RequestError(f"Grad-CAM: wanted a classifier with logits (B, classes), got {type(model).__name__}")
        if target is not None and not 0 <= target < logits.shape[1]:
            raise RequestError(f"Grad-CAM: the model has classes 0 to {logits.shape[1] - 1}, got {target}")
        wanted = int(logits.argmax()) if target is None else target
        name, layer, to_map, (height, width) = _feature_map(model, image)
    with evaluating(model), _keeping_gradients(model), torch.enable_grad():
        cam = GradCAM(model=model, target_layers=[layer], reshape_transform=to_map)
        cam.get_target_width_height = lambda _: (width, height)
        try:  # not as a context manager, which prints some errors and goes on
            found = cam(image.detach().clone().requires_grad_(), targets=[ClassifierOutputTarget(wanted)])
        finally:
            cam.activations_and_grads.release()
    found = found[:, : image.shape[2], : image.shape[3]]
    return GateView(
        name, OP, f"class {wanted}", torch.from_numpy(found).float(), ("map",), ("y", "x"), (1.0, 1.0), "Grad-CAM"
    )


def check_grad_cam() -> None:
    """Raise RequestError unless the package is installed."""
    if find_spec("pytorch_grad_cam") is None:
        raise RequestError('Grad-CAM needs grad-cam: pip install "foveate[look]"')


ToMap = Callable[[Tensor], Tensor]


def _feature_map(model: nn.Module, image: Tensor) -> tuple[str, nn.Module, ToMap, tuple[int, int]]:
    """The name and module whose output is looked at, what makes (B, C, H, W) of it, and its (height, width) in px.

    The size is the image's at least: maps whose strides drop the last pixels are stretched over them.
    """
    infos: Any = getattr(model, "feature_info", None) or ()
    info = next((dict(i) for i in reversed(list(infos)) if isinstance(i, dict) and i.get("module")), None)
    modules = dict(model.named_modules())
    ends = [] if info is None else [n for n in modules if n == info["module"] or n.endswith("." + info["module"])]
    if info is None or not ends:
        raise RequestError(f"Grad-CAM: {type(model).__name__} names no module of its last feature map")
    name = min(ends, key=len)
    if f"{name}.norm1" in modules and hasattr(modules[name], "mlp"):
        name += ".norm1"
    shapes: list[Any] = []
    with modules[name].register_forward_hook(lambda _, args, out: shapes.append(getattr(out, "shape", None))):
        model(image)
    if not shapes or shapes[0] is None:
        raise RequestError(f"Grad-CAM: {name} of {type(model).__name__} gives no tensor")
    to_map = _to_map(model, image, name, tuple(shapes[0]), info)
    rows, cols = to_map(torch.empty(shapes[0], device="meta")).shape[2:]
    cell = Canvas.of(model, image).cell((rows, cols))
    size = max(image.shape[2], round(rows * cell[0])), max(image.shape[3], round(cols * cell[1]))
    return name, modules[name], to_map, size


def _to_map(model: Any, image: Tensor, name: str, shape: tuple[int, ...], info: dict[str, Any]) -> ToMap:
    if len(shape) == 4:
        channels = info.get("num_chs")
        is_last = getattr(model, "output_fmt", "NCHW") == "NHWC" or shape[1] != channels == shape[3]
        return (lambda x: x.permute(0, 3, 1, 2)) if is_last else (lambda x: x)
    known = Surroundings.of(model, image)
    if len(shape) == 3:
        for before in dict.fromkeys((known.prefix, 0)):
            if (size := _map_of(shape[1] - before, known, info)) is not None:
                return lambda x: x[:, before:].transpose(1, 2).unflatten(2, size)
    raise RequestError(f"Grad-CAM: the output of {name}, {shape}, is no map")


def _map_of(tokens: int, known: Surroundings, info: dict[str, Any]) -> tuple[int, int] | None:
    """The map of so many tokens, from the patches or the reduction of the last feature map."""
    step, size = info.get("reduction"), known.images.shape[-2:]
    sizes = [] if known.grid is None else [known.grid]
    if isinstance(step, int):
        sizes += [(-(-size[0] // step), -(-size[1] // step)), (size[0] // step, size[1] // step)]
    return next((found for found in sizes if math.prod(found) == tokens), None)


@contextlib.contextmanager
def _keeping_gradients(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of parameters inside, and leave those that they have: the package clears them."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, requires, grad in before:
            p.requires_grad_(requires)
            p.grad = grad
