"""Optimizer steps: backward, gradient norm, clipping, loss scaling. Numbers that are not finite make no step."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from mmengine.optim import OptimWrapper
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from .together import Flags

_MOST_SKIPPED = 40  # steps in a row: the scale of fp16 has then fallen from 2**16 to 2**-24


class NotFiniteError(Exception):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, loss: float, norm: float) -> None:
        super().__init__(f"the loss is {loss:g}" if not math.isfinite(loss) else f"the gradient norm is {norm:g}")


class Stepper(OptimWrapper):
    """MMEngine's optimizer wrapper, with checks.

    Attributes:
        stepped: the last batch ended an optimizer step that changed the weights.
        ended: the last batch ended an optimizer step, or one that fp16 skipped.
        grad_norm: 2-norm of the last gradient, before clipping.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        flags: Flags,
        *,
        accumulate: int = 1,
        clip: float | None = None,
        clip_mode: Literal["norm", "value", "agc"] = "norm",
        unclipped: Sequence[nn.Parameter] = (),
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Args:
        unclipped: parameters that mode "agc" leaves alone (the head).
        scaler: of fp16. It skips steps with gradients that are not finite; others are errors.
        """
        super().__init__(optimizer, accumulative_counts=accumulate)
        self.flags = flags
        self.clip, self.clip_mode, self.unclipped = clip, clip_mode, set(unclipped)
        self.scaler = scaler
        self.stepped = self.ended = False
        self.grad_norm = 0.0
        self.skipped_in_a_row = 0
        self.losses: list[Tensor] = []  # of the batches since the last step

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        self.stepped = self.ended = False
        self.losses.append(loss.detach())
        super().update_params(loss, step_kwargs, zero_kwargs)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Clip and step, in all processes or in none.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; with fp16 only after many skipped steps in a row.
            TrainError: a process could not read its data.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self._norm()
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        loss, self.grad_norm = torch.stack([torch.stack(self.losses).mean().float(), whole.float()]).tolist()
        self.losses = []
        bad = not (math.isfinite(loss) and math.isfinite(self.grad_norm))
        self.flags.mine["bad"] = int(bad)
        seen = self.flags.gather()
        if seen["failed"]:
            self.flags.raise_failure()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if seen["bad"] else 0
        if seen["bad"] and (self.scaler is None or self.skipped_in_a_row > _MOST_SKIPPED):
            raise NotFiniteError(loss, self.grad_norm)
        self.ended, self.stepped = True, not seen["bad"]
        self._step(norm, **kwargs)
        self.message_hub.update_scalar("train/grad_norm", self.grad_norm)

    def state_dict(self) -> dict:
        state = super().state_dict()
        return state if self.scaler is None else state | {"loss_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        scale = state_dict.pop("loss_scaler", None)
        if self.scaler is not None and scale is not None:
            self.scaler.load_state_dict(scale)
        super().load_state_dict(state_dict)

    def _step(self, norm: Tensor, **kwargs: Any) -> None:
        if self.clip is not None and self.stepped:
            self._clip(self.clip, norm)
        if self.scaler is None:
            self.optimizer.step(**kwargs)
            return
        if self.stepped:
            self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()  # halves the scale after a gradient that is not finite

    def _clip(self, limit: float, norm: Tensor) -> None:
        parameters = self._with_gradients()
        if self.clip_mode == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        else:
            dispatch_clip_grad([p for p in parameters if p not in self.unclipped], limit, self.clip_mode)

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._with_gradients() if p.grad is not None])

    def _with_gradients(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
