"""`fuse`: a model for inference on a CPU, rewritten for each size of input; `unfuse` gives the model back."""

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import first_line
from ..attention_ops._op import is_traced, under_transform
from ..attention_ops.calibration import takes_product
from .errors import FuseError
from .plan import Plan, make_plan
from .report import FuseReport

_CAPTURING = RLock()  # torch.export patches the modules that it traces: one capture at a time
MOST_SIZES = 4  # plans that are kept: each holds packed weights of its own


class FusedModel(nn.Module):
    """A model whose forward pass runs as one rewritten graph per input size. Made by `fuse`.

    The model itself stays as it is in `model`; its weights are shared. Whatever changes them (an optimizer step,
    load_state_dict, `.to(dtype)`, another layer) is seen at the next call, which makes a new plan.
    """

    def __init__(self, model: nn.Module, most_sizes: int = MOST_SIZES) -> None:
        super().__init__()
        self.model = model
        self.most_sizes = most_sizes
        self.training = False
        self._forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, and the hooks on the fused model itself if it has any.

        Not through nn.Module's own `__call__`: torch.export replaces that in all threads while it captures in one.
        """
        if self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, x: Tensor) -> Any:
        """Return what the model returns for an image batch (B, C, H, W), without gradients.

        Raises:
            FuseError: gradients are asked for, a layer has hooks, or the model cannot be captured at this size.
        """
        if _is_looked_at(x):
            return self.model(x)
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise FuseError("a fused model gives no gradients, and the input requires one; unfuse the model to train")
        plan = self._plan(x)
        with torch.no_grad():
            return plan(x)

    def prepare(self, x: Tensor) -> FuseReport:
        """Make the plan for inputs like x, (B, C, H, W), before the first call, and return its report."""
        return FuseReport.of(self._plan(x), self.model)

    def train(self, mode: bool = True) -> "FusedModel":
        """Raise FuseError unless `mode` is False: a fused model is for inference."""
        if mode:
            raise FuseError("a fused model is for inference; unfuse(model).train() trains")
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The model's own, under the model's own keys; inside a larger model the keys begin with `model.`."""
        if args or destination is not None or prefix:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.model.state_dict(keep_vars=keep_vars)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights into the model; the next call makes a new plan."""
        return self.model.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Take what is not here from the model: num_classes, pretrained_cfg, feature_info, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if (name.startswith("_") and name not in ("_model_args",)) or name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_plans", "_lock", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedModel":
        return FusedModel(deepcopy(self.model, memo), self.most_sizes)

    def _forget(self) -> None:
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._lock = RLock()
        self._seen: Callable[[], bool] | None = None

    def _plan(self, x: Tensor) -> Plan:
        if not isinstance(x, Tensor) or x.device.type != "cpu":
            raise FuseError(f"a fused model takes a tensor on a CPU, got {getattr(x, 'device', type(x).__name__)}")
        key = (tuple(x.shape), x.dtype, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        with self._lock:
            if self._seen is None or not self._seen():
                _check(self.model)
                self._plans.clear()
                self._seen = watch(self.model)
            if key not in self._plans:
                while len(self._plans) >= self.most_sizes:
                    self._plans.popitem(last=False)
                self._plans[key] = _make(self.model, x)
            self._plans.move_to_end(key)
            return self._plans[key]


def _is_looked_at(x: Any) -> bool:
    """Say whether an exporter, a compiler or torch.func is at work in this thread: they see the model itself."""
    if torch.compiler.is_dynamo_compiling():  # not is_compiling(), which torch.export sets for all threads
        return True
    return isinstance(x, Tensor) and (is_traced([x]) or under_transform([x]))


def _make(model: nn.Module, x: Tensor) -> Plan:
    with _CAPTURING, torch.inference_mode(False):
        example = torch.zeros(x.shape, dtype=x.dtype)  # an inference tensor cannot be captured
        try:
            return make_plan(model, example, takes_product)
        except FuseError:
            raise
        except Exception as error:  # torch.export raises many types, and a model its own for a size it does not take
            raise FuseError(
                f"{type(model).__name__} at {tuple(x.shape)} cannot be captured: {first_line(error)}"
            ) from error


def _check(model: nn.Module) -> None:
    """Refuse what a rewritten graph would lose."""
    if model.training:
        raise FuseError("the model is in training mode; call model.eval() first")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu":
            raise FuseError(f"fuse is for models on a CPU, the model has weights on {tensor.device}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise FuseError(f"{name or type(module).__name__} has hooks, which a fused model would not call")


def watch(model: nn.Module) -> Callable[[], bool]:
    """Return a function that says whether the model has the same modules, tensors and values as now, and no hooks."""
    slots: list[tuple[dict[str, Any], str, Any]] = []
    hooks: list[dict[int, Any]] = []
    tensors: list[tuple[Tensor, int, int]] = []
    for module in model.modules():
        for held in (module._modules, module._parameters, module._buffers):
            slots += [(held, name, value) for name, value in held.items()]
        hooks += [module._forward_hooks, module._forward_pre_hooks]
    for _, _, value in slots:
        if isinstance(value, Tensor):
            tensors.append((value, _version(value), value.data_ptr()))
    modes = [(module, module.training) for module in model.modules()]

    def unchanged() -> bool:
        return (
            all(held.get(name) is value for held, name, value in slots)
            and all(_version(t) == version and t.data_ptr() == place for t, version, place in tensors)
            and not any(hooks)
            and all(module.training is mode for module, mode in modes)
        )

    return unchanged


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def fuse(model: nn.Module, example: Tensor | None = None, *, most_sizes: int = MOST_SIZES) -> FusedModel:
    """Rewrite a model for inference on a CPU: the same numbers up to rounding, in fewer passes over memory.

    The forward pass is captured by torch.export for each size of input. Norms with fixed statistics, layer scale and
    other constant factors go into the weights beside them; activations and residual sums run inside convolutions and
    matrix products, which oneDNN computes with packed weights and channels-last maps where a calibration found that
    faster; attention that is spelled out becomes fused attention. It works on any model that torch.export captures.

    Args:
        model: in eval mode, on a CPU. It stays as it is, and shares its weights; `unfuse` returns it.
        example: an image batch (B, C, H, W) to make the first plan for; one image of the model's own size when None.
        most_sizes: plans kept at a time. A new size of input costs a capture, a few seconds, and a copy of the weights.

    Returns:
        The fused model. `fused.prepare(x)` returns the report: what was fused, what was left.

    Raises:
        FuseError: the model is in training mode or not on a CPU, has hooks, or cannot be captured.
    """
    if isinstance(model, FusedModel):
        raise FuseError("the model is fused already")
    fused = FusedModel(model, most_sizes)
    if example is None:
        example = _own_example(model)
    if example is None:
        _check(model)
    else:
        fused.prepare(example)
    return fused


def unfuse(model: nn.Module) -> nn.Module:
    """Return the model that was fused, with its present weights."""
    if not isinstance(model, FusedModel):
        raise FuseError(f"unfuse takes a fused model, got {type(model).__name__}")
    return model.model


def _own_example(model: nn.Module) -> Tensor | None:
    cfg = getattr(model, "pretrained_cfg", None)
    size = None if cfg is None or not hasattr(cfg, "get") else cfg.get("input_size")
    if size is None:
        return None
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return torch.zeros(1, getattr(model, "in_chans", None) or size[0], *size[1:], dtype=dtype)
